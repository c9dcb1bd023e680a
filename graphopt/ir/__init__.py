"""Programs and their graphs: what is captured, how it is edited, and what passes write on it."""
