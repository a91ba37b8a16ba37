"""Quernel grinds machine learning down to what it needs.

A trained model and a sample of data go in; a smaller, faster model comes out, with the table of what
was tried. Pillars are modules (``quernel.compress``, ``quernel.nn``, ...) and load on first use.
"""

from quernel._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BudgetExceeded": "._errors",
        "DataError": "._errors",
        "FormatError": "._errors",
        "MissingExtraError": "._errors",
        "PrivacyError": "._errors",
        "QuernelError": "._errors",
        "Report": ".report",
        "apps": ".apps",
        "compress": ".compress",
        "data": ".data",
        "hashing": ".hashing",
        "kernels": ".kernels",
        "list_methods": "._catalogue",
        "load": "._load",
        "models": ".models",
        "nn": ".nn",
        "report": ".report",
        "search": ".search",
        "sketch": ".sketch",
        "testing": ".testing",
        "train": ".train",
    },
)
__all__ += ["__version__"]
