"""What FeatureMerging refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quernel._errors import QuernelError
from quernel.compress import FeatureMerging, feature_complexity
from tests.compress.prune._nets import merged, mlp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta must be .* in \[0\.0, 1\.0\]; got 1\.5"),
        ({"beta": -0.1}, "beta must be"),
        ({"max_ratio": 2.0}, "max_ratio must be"),
        ({"reference": "later"}, "reference must be one of 'initial', 'current'"),
        ({"scale": "max"}, "scale must be"),
        ({"distance": "all"}, "distance must be"),
        ({"order": "random"}, "order must be"),
        ({"refit": 1}, "refit must be bool"),
        ({"normalize": True, "scale": "mean"}, "means already"),
        ({"groups": ("a", "b")}, "groups must"),
        ({"groups": (("a", "b"),)}, "groups must hold sequences"),
        ({"groups": (((1,), ("b",)),)}, "groups must hold sequences"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        FeatureMerging(**options)


def test_bad_values_are_refused() -> None:
    net, x = mlp(4, 8, 2), torch.zeros(1, 4)
    with pytest.raises(QuernelError, match="betas must be"):
        feature_complexity(net, x, (2.0,))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises(QuernelError, match=r"0\.weight holds NaN"):
        merged(net, x)
