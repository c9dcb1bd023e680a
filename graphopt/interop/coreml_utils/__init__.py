"""The code behind `graphopt.coreml_utils`."""
