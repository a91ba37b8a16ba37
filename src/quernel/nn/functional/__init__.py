"""Pure functions behind the modules: tensors in, tensors out, no state."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "fold_batch_norm": ".batch_norm",
        "int4_linear": ".int4",
        "int8_linear": ".int8",
        "singular_values": ".low_rank",
        "truncated_svd": ".low_rank",
        "whitened_svd": ".low_rank",
        "whitening_factor": ".low_rank",
    },
)
