"""Ops written in simpler ones, for the targets whose converters lack or miscompute them."""
