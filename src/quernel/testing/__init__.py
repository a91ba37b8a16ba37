"""Public conformance suites: what a class promises by being registered under a contract.

``check_module(cls)``, ``check_mixer(cls)``, ``check_weight(cls)``, ``check_method(cls)``, ``check_estimator(cls)``,
``check_index(cls)``, ``check_sketch(cls)`` and ``check_cache(cls)`` run every check of a contract and raise
``ConformanceError`` at the first that fails; ``checks_for(contract)`` lists them for tests. ``require_mean``,
``require_frequencies``, ``require_distribution``, ``require_proportion`` and ``require_same_distribution`` test random
results at a stated rate of false alarms.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ConformanceError": "._suite",
        "check_cache": ".caches",
        "check_estimator": ".estimators",
        "check_index": ".indexes",
        "check_method": ".methods",
        "check_mixer": ".mixers",
        "check_module": ".modules",
        "check_sketch": ".sketches",
        "check_weight": ".weights",
        "checks_for": "._suite",
        "inject_outliers": ".outliers",
        "require_distribution": ".chance",
        "require_frequencies": ".chance",
        "require_mean": ".chance",
        "require_proportion": ".chance",
        "require_same_distribution": ".chance",
    },
)
