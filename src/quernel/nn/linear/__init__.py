"""Linear layers over stored weights."""
