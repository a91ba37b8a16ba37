"""Pure functions behind the modules: tensors in, tensors out, no state."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DGQWeight": ".dual_grained",
        "OneWayFit": ".one_way_fit",
        "binary_linear_attention": ".binary_attention",
        "compensate": ".compensated_rounding",
        "dgq_search": ".dual_grained",
        "expert_balance_loss": ".expert_balance",
        "fit_one_way": ".one_way_fit",
        "floor_through": ".straight_through",
        "fold_batch_norm": ".batch_norm",
        "heaviside_through": ".straight_through",
        "int4_linear": ".int4",
        "int8_linear": ".int8",
        "magnitude_mask": ".magnitude",
        "one_way_conv": ".one_way",
        "one_way_conv_transpose": ".one_way",
        "one_way_kernel": ".one_way",
        "one_way_parameters": ".one_way",
        "pass_through": ".straight_through",
        "pointwise_depthwise_conv2d": ".pointwise_depthwise",
        "power_of_two": ".straight_through",
        "round_through": ".straight_through",
        "round_to_nearest": ".dual_grained",
        "shift_codes": ".shift",
        "shift_linear": ".shift",
        "sign_through": ".straight_through",
        "singular_values": ".low_rank",
        "truncated_svd": ".low_rank",
        "whitened_svd": ".low_rank",
        "whitening_factor": ".low_rank",
    },
)
