"""Indexes: find the closest items, exactly or fast; one set of verbs for all of them."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CompatibilityBySeen": ".compatibility",
        "FlatIndex": ".flat",
        "FlinngIndex": ".flinng",
        "FlinngSettings": "._flinng_settings",
        "FlinngStats": ".flinng",
        "FunnelIndex": ".funnel",
        "Index": "._index",
        "MaxIPIndex": ".max_inner_product",
        "ModelIndex": ".model_index",
        "MultiVectorIndex": ".multi_vector",
        "ShardError": "._shard_workers",
        "ShardedAnswer": ".sharded",
        "ShardedIndex": ".sharded",
        "average_accuracy": ".compatibility",
        "average_compatibility": ".compatibility",
        "compatibility_by_seen": ".compatibility",
        "compatibility_matrix": ".compatibility",
        "features_of": ".compatibility",
        "self_accuracy": ".compatibility",
    },
)
