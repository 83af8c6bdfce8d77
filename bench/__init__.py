"""Measuring: our claims against llama.cpp's own tools, each a command."""
