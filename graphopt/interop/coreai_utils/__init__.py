"""The code behind `graphopt.coreai_utils`."""
