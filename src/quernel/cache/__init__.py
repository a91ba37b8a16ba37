"""Caches of keys and values that store less or read less; they plug into ``generate`` of transformers."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Cache": ("._cache", "hf"),
        "CacheReport": ("._cache", "hf"),
        "WindowCache": (".window", "hf"),
        "attention": ("._attention", "hf"),
    },
)
