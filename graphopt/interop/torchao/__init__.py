"""The code behind `graphopt.torchao`."""
