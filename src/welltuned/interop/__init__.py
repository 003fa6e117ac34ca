"""Other tools' configuration files, read into one neutral structure (advice/lint/config.py). Nothing is executed."""

from welltuned.interop.read import read_config

__all__ = ["read_config"]
