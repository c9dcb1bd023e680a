"""Ops in the forms that coreai-torch gets right, where that is about Core AI alone."""
