"""Searches that choose specs: mixed precision, rate and distortion."""
