"""Core AI: programs as .aimodel files, which run on Linux too."""
