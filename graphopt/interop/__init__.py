"""Programs and quantizers of other toolchains: torchao, built Core AI and Core ML models."""
