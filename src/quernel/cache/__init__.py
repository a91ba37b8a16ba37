"""Caches of keys and values that store less or read less; they plug into ``generate`` of transformers."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BitmapRows": ".bitmap_rows",
        "Cache": ("._cache", "hf"),
        "CacheReport": ("._cache", "hf"),
        "KVPool": "._pool",
        "LouisKVCache": (".louiskv", "hf"),
        "LouisKVConfig": (".louiskv", "hf"),
        "MustafarCache": (".mustafar", "hf"),
        "PackedKVPool": "._packed_pool",
        "QuestCache": (".quest", "hf"),
        "WindowCache": (".window", "hf"),
        "attention": ("._attention", "hf"),
        "calibrate_tau": ("._calibration", "hf"),
        "prune_by_output": ".pruning",
        "prune_channels": ".pruning",
        "prune_per_channel": ".pruning",
        "prune_per_token": ".pruning",
    },
)
