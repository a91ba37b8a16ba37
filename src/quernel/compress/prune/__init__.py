"""Compression by removing channels and weights."""
