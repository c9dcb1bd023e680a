"""ExecuTorch: programs as .pte files for XNNPACK, portable kernels, Core ML and Core AI."""
