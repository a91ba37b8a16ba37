"""Shrink a trained model: ``compress`` applies methods, ``search`` finds the best under a budget."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Budget": "._search",
        "Cast": ".cast",
        "Context": "._context",
        "CrossQuant": ".quant.crossquant",
        "FeatureMerging": ".prune.feature_merging",
        "LayerPlan": "._method",
        "Method": "._method",
        "PerModuleMethod": "._method",
        "Plan": "._method",
        "Result": "._compress",
        "SearchResult": "._search",
        "SmoothQuant": ".quant.smoothquant",
        "UniformLowRank": ".lowrank.uniform",
        "WeLore": ".lowrank.welore",
        "WeightInt8": ".quant.weight_int8",
        "compress": "._compress",
        "feature_complexity": ".prune._complexity",
        "graph": ".graph",
        "methods_from_recipe": "._method",
        "quantization_kernel": "quernel.nn.functional.activation_quant",
        "search": "._search",
    },
)
