"""Token mixers: attention and what takes its place."""
