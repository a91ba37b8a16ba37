"""Modules, the storage of their weights, and the pure functions behind them."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CrossQuantLinear": ".linear.crossquant",
        "DynamicCrossQuantLinear": ".linear.dynamic_crossquant",
        "LowRankLinear": ".linear.low_rank",
        "StoredConv2d": "._stored",
        "StoredEmbedding": "._stored",
        "StoredLinear": "._stored",
        "functional": ".functional",
        "replace_module": "._replace",
        "weights": ".weights",
    },
)
