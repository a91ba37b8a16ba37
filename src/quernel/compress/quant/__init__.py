"""Compression by quantisation."""
