"""Statistics of samples and scores."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Interval": ".intervals",
        "PairedDifference": ".intervals",
        "clopper_pearson": ".intervals",
        "paired_bootstrap": ".intervals",
        "rank_correlation": ".intervals",
        "wilson": ".intervals",
    },
)
