"""Long fits tell how far they are: fractions rise to 1, and nothing else depends on who listens."""

import numpy as np
import pytest
from sklearn.datasets import load_iris

from quernel._errors import QuernelError
from quernel.kernels import (
    DeepKernelClassifier,
    DeepKernelRegressor,
    NTKernel,
    NTKRegressor,
    ReducedMeanEmbedding,
    WeightedRKME,
)
from quernel.kernels.quantum import VariationalQuantumClassifier


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (DeepKernelRegressor(1, n_inducing=8, max_epochs=3, random_state=0), 3),
        (DeepKernelClassifier(1, n_inducing=8, max_epochs=2, random_state=0), 2),
        (VariationalQuantumClassifier(n_steps=4, n_restarts=1, random_state=0), 4),
        (VariationalQuantumClassifier(n_steps=4, n_restarts=1, optimizer="spsa", random_state=0), 4),
        (NTKRegressor(NTKernel(activation="tanh"), ridge=0.1), 1),
        (ReducedMeanEmbedding(3, gamma=0.1, random_state=0), None),
        (WeightedRKME(3, gamma=0.1, random_state=0), None),
    ],
)
def test_progress(model, calls):
    x, y = load_iris(return_X_y=True)
    x, told = x[::3], []
    model.fit(x, y[::3], progress=lambda message, fraction: told.append((message, fraction)))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert all(isinstance(message, str) and message for message, _ in told)
    assert calls is None or len(told) == calls
    if hasattr(model, "predict"):
        np.testing.assert_array_equal(model.predict(x), model.fit(x, y[::3]).predict(x))
    with pytest.raises(QuernelError, match="progress must be a function"):
        model.fit(x, y[::3], progress=True)


def test_progress_of_a_kernel_in_blocks():
    x, told = np.random.default_rng(0).standard_normal((600, 3)), []
    NTKRegressor(NTKernel(), ridge=0.1).fit(x, x[:, 0], progress=lambda _, fraction: told.append(fraction))
    assert told == [i / 6 for i in range(1, 7)]
