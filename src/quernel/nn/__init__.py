"""Modules, the storage of their weights, and the pure functions behind them."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaptedLinear": ".linear.snnk_adapter",
        "BinaryLinearAttention": ".attention.shift_add",
        "BinaryMultiheadAttention": ".attention.multihead",
        "CrossQuantLinear": ".linear.crossquant",
        "DepthwiseConv2d": ".conv.depthwise",
        "DynamicCrossQuantLinear": ".linear.dynamic_crossquant",
        "FactorizedConv1d": ".conv.factorized",
        "FactorizedConv2d": ".conv.factorized",
        "FactorizedConv3d": ".conv.factorized",
        "FactorizedConvTranspose1d": ".conv.factorized_transpose",
        "FactorizedConvTranspose2d": ".conv.factorized_transpose",
        "FactorizedConvTranspose3d": ".conv.factorized_transpose",
        "LowRankLinear": ".linear.low_rank",
        "MultShiftMoE": ".linear.mult_shift",
        "PackedShiftLinear": ".linear.packed_shift",
        "SNNKAdapter": ".linear.snnk_adapter",
        "SNNKLinear": ".linear.snnk",
        "ShiftLinear": ".linear.shift",
        "SparseConv1x1": ".conv.sparse",
        "SparseLinear": ".linear.sparse",
        "StoredConv2d": "._stored",
        "StoredEmbedding": "._stored",
        "StoredLinear": "._stored",
        "W4A8Linear": ".linear.w4a8",
        "add_snnk_adapters": ".linear.snnk_adapter",
        "collect_aux_loss": ".linear.mult_shift",
        "functional": ".functional",
        "replace_module": "._replace",
        "weights": ".weights",
    },
)
