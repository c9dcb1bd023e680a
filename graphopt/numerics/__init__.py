"""Pure functions of tensors: clustering, bit packing."""
