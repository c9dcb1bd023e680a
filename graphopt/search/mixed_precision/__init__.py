"""Mixed precision: which layer gets how many bits. `graphopt.mixed_precision` names what is public."""
