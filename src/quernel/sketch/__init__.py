"""Sketches: small arrays that answer questions about data that is gone; they merge, and some forget on request."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ExponentialSum": "._exponential_sum",
        "PrivateDistanceSum": ".private_distance",
        "PrivateKDE": ".private_kde",
        "PrivateSimilarityClassifier": ".private_similarity",
        "PublicDistanceSum": ".private_distance",
        "PublicKDE": ".private_kde",
        "PublicSimilarities": ".class_similarities",
        "RACE": ".race",
        "RepresenterClassifier": ".representer",
        "RepresenterRegressor": ".representer",
        "Sketch": "._sketch",
        "dp": ".dp",
    },
)
