"""The version of tfbig."""

__version__ = "0.1.0"
