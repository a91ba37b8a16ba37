"""Layers whose weights are hashed views of one small shared array."""
