"""Convolutions whose weights are sparse, factored or otherwise less than dense."""
