"""What is in a program and what was done to it: sizes, errors, pages, pictures."""
