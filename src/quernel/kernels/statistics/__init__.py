"""Statistics of samples and scores: intervals, and the diversity of pairs."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ConditionalResidual": ".conditional_residual",
        "DegenerateConditioningWarning": ".schur_entropy",
        "Interval": ".intervals",
        "MeanDiscrepancy": ".mmd",
        "PairedDifference": ".intervals",
        "ResidualMode": ".conditional_residual",
        "SchurEntropy": ".schur_entropy",
        "SchurReport": ".schur_report",
        "SchurSplit": ".schur",
        "clopper_pearson": ".intervals",
        "matrix_entropy": "..psd",
        "median_gamma": ".mmd",
        "mmd2": ".mmd",
        "paired_bootstrap": ".intervals",
        "rank_correlation": ".intervals",
        "schur_complement": ".schur",
        "vendi_score": ".vendi",
        "wilson": ".intervals",
    },
)
