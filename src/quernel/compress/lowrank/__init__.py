"""Compression by low-rank factors."""
