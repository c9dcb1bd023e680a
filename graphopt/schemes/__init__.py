"""Compression schemes: spec and tensor in, constants and vocabulary ops out."""
