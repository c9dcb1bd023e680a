"""Fitting compressed weights to what they must compute: moments, feedback, gradients, tuning."""
