"""Springtide: recommenders that fuse long-term and short-term interest, from raw logs to HTTP, on Ray."""

__version__ = "0.1.0"
