"""Torch: .pt2 files that hold our neutral ops."""
