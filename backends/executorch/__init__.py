"""ExecuTorch: programs as .pte files, delegated to XNNPACK, which run on Linux too."""
