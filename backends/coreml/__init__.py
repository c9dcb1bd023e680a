"""Core ML: programs as .mlpackage folders, read back and evaluated on any host."""
