"""Seeded hash functions of integers, bytes, vectors and sets; results depend on their arguments alone."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BlockMap": ".block_map",
        "BucketTables": ".tables",
        "LSHFamily": "._family",
        "MinHash": ".minhash",
        "ModPrime": ".universal",
        "PStable": ".pstable",
        "Sets": ".minhash",
        "SignProjection": ".simhash",
        "TileMap": ".tile_map",
        "WinnerTakeAll": ".winner_take_all",
        "angle_between": ".simhash",
        "debias": "._family",
        "fastrange": ".mixers",
        "jaccard_similarity": ".minhash",
        "mix64": ".mixers",
        "murmur3_32": ".murmur",
        "murmur3_x64_128": ".murmur",
        "pstable_probability": ".pstable",
        "rehash_to_range": "._family",
        "sign_bit": ".mixers",
        "sphere_items": ".inner_product",
        "sphere_queries": ".inner_product",
    },
)
