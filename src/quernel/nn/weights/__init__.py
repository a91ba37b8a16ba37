"""Storage formats of weights: dense casts, int8, 4 bits, low rank, products of these."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DenseWeight": ".dense",
        "HashedBlockWeight": ".hashed",
        "HashedTileWeight": ".hashed",
        "Int4GroupWeight": ".int4",
        "Int4TableWeight": ".int4",
        "Int8Weight": ".int8",
        "LowRankWeight": ".low_rank",
        "ProductWeight": ".product",
        "ShiftWeight": ".shift",
        "SparseWeight": ".sparse",
        "StackedWeight": ".stacked",
        "StoredWeight": "._base",
        "unique_bytes": "._base",
    },
)
