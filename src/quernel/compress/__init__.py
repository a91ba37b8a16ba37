"""Shrink a trained model: ``compress`` applies methods, ``search`` finds the best under a budget."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Budget": "._search",
        "Cast": ".cast",
        "Context": "._context",
        "CrossQuant": ".quant.crossquant",
        "DGQ": ".quant.dual_grained",
        "DGQWeight": "quernel.nn.functional.dual_grained",
        "FactorizeConv": ".lowrank.factorize_conv",
        "FeatureMerging": ".prune.feature_merging",
        "LayerPlan": "._method",
        "Method": "._method",
        "PerModuleMethod": "._method",
        "Plan": "._method",
        "Result": "._compress",
        "SNNK": ".lowrank.snnk",
        "SearchResult": "._search",
        "ShiftAdd": ".shift_add",
        "SmoothQuant": ".quant.smoothquant",
        "SparsePointwise": ".prune.sparse_pointwise",
        "UniformLowRank": ".lowrank.uniform",
        "WeLore": ".lowrank.welore",
        "WeightInt4": ".quant.weight_int4",
        "WeightInt8": ".quant.weight_int8",
        "compress": "._compress",
        "dgq_search": "quernel.nn.functional.dual_grained",
        "feature_complexity": ".prune._complexity",
        "graph": ".graph",
        "methods_from_recipe": "._method",
        "quantization_kernel": "quernel.nn.functional.activation_quant",
        "search": "._search",
        "to_onnx": "._onnx",
    },
)
