"""Differential privacy: budgets, calibrated noise on integers, releases that can be published, audits."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AuditResult": ".auditing",
        "Ball": ".domain",
        "Box": ".domain",
        "Mechanism": ".mechanism",
        "PrivacyLedger": ".ledger",
        "PrivacyTerms": ".terms",
        "PrivateStructure": ".structure",
        "PrivateVectorSum": ".vector_sum",
        "PublicRelease": ".structure",
        "PublicVectorSum": ".vector_sum",
        "Sensitivity": ".mechanism",
        "audit": ".auditing",
        "calibrate": ".mechanism",
        "gaussian_delta": ".calibration",
        "gaussian_epsilon": ".calibration",
        "gaussian_mu": ".calibration",
        "gaussian_sigma": ".calibration",
        "release_vector_sum": ".vector_sum",
    },
)
