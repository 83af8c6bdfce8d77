"""HALO: pretrained mixed-precision policies for GGUF, applied zero-shot, measured on the device."""

__version__ = "0.1.0"
