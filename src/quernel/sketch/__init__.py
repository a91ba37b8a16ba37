"""Sketches: small arrays that answer questions about data that is gone; they merge, and some forget on request."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "RACE": ".race",
        "RepresenterClassifier": ".representer",
        "RepresenterRegressor": ".representer",
        "Sketch": "._sketch",
    },
)
