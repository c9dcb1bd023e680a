"""The compressor classes and the pipelines that they run."""
