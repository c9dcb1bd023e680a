"""The `graphopt` command."""
