"""A size, and the best artifact of a model that has it: `graphopt.fit`."""
