"""Capture of models by torch.export, with what that needs."""

from graphopt.capture.capture import capture

__all__ = ["capture"]
