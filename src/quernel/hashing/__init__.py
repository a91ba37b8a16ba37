"""Seeded hash functions of integers and bytes; results depend on their arguments alone."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ModPrime": ".universal",
        "fastrange": ".mixers",
        "mix64": ".mixers",
        "murmur3_32": ".murmur",
        "murmur3_x64_128": ".murmur",
        "sign_bit": ".mixers",
    },
)
