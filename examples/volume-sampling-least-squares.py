"""Which patients to examine: a model of disease progression from few labels, chosen by design or at random.

All 442 patients of scikit-learn's diabetes table have ten cheap measurements; the label, how far the disease has come
a year later, is what costs. ``DesignRegressor`` says whom to follow up. The picture shows how close the model comes to
the one of all labels, over repeated draws, and who is chosen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import PolynomialFeatures

from quernel.kernels import DesignRegressor, EmpiricalSpace

DRAWS = 30
FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def uniform_errors(features: np.ndarray, y: np.ndarray, n: int, rng: np.random.Generator) -> list[float]:
    """Return mean squared errors over all patients of least squares on ``n`` patients chosen uniformly."""
    errors = []
    for _ in range(DRAWS):
        rows = rng.choice(len(y), n, replace=False)
        coef = np.linalg.lstsq(features[rows], y[rows], rcond=None)[0]
        errors.append(float(np.mean((features @ coef - y) ** 2)))
    return errors


def main() -> None:
    """Compare the two ways to choose and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("volume-sampling-least-squares.png"))
    output = parser.parse_args().output

    x, y = load_diabetes(return_X_y=True)
    # Measurements and products with the body mass index and the blood pressure: 28 features and a constant.
    kinds = PolynomialFeatures(2, include_bias=False).fit(x)
    chosen = [i for i, p in enumerate(kinds.powers_) if p.sum() == 1 or p[2] or p[3]]
    features = kinds.transform(x)[:, chosen]
    with_constant = np.column_stack((features, np.ones(len(x))))
    best = float(np.mean((LinearRegression().fit(features, y).predict(features) - y) ** 2))
    m, rng = with_constant.shape[1], np.random.default_rng(0)

    curves: dict[str, list[list[float]]] = {"design (repeated processes)": [], "design (volume)": [], "uniform": []}
    for factor in FACTORS:
        for name, method in (("design (repeated processes)", "dpp_repeat"), ("design (volume)", "volume")):
            errors = []
            for _ in range(DRAWS):
                model = DesignRegressor(budget=factor, method=method, random_state=int(rng.integers(2**31)))
                rows = model.query(features)
                model.fit(features, y[rows])
                errors.append(float(np.mean((model.predict(features) - y) ** 2)))
            curves[name].append(errors)
        curves["uniform"].append(uniform_errors(with_constant, y, int(np.ceil(factor * m)), rng))

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for name, errors in curves.items():
        values = np.array(errors) / best
        left.plot(np.array(FACTORS) * m, np.median(values, 1), marker="o", label=name)
        left.fill_between(np.array(FACTORS) * m, *np.quantile(values, (0.1, 0.9), axis=1), alpha=0.2)
    left.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="patients drawn", ylabel="mean squared error / that with all 442 labels", yscale="log")
    left.set_title(f"median of {DRAWS} draws, and where 80 % of them lie")
    left.legend()

    space = EmpiricalSpace(with_constant)
    rows = DesignRegressor(budget=2.0, random_state=0).query(features)
    plane = PCA(2).fit_transform(x)
    shades = right.scatter(*plane.T, c=space.leverage, s=18, cmap="viridis")
    right.scatter(*plane[rows].T, s=90, facecolors="none", edgecolors="crimson", label=f"{len(rows)} to be followed up")
    right.set(xlabel="first principal component", ylabel="second principal component")
    right.set_title("the chosen: spread out, unusual patients more often")
    right.legend()
    figure.colorbar(shades, ax=right, label="leverage")
    figure.tight_layout()
    figure.savefig(output, dpi=100)
    sys.stdout.write(f"wrote {output}\n")


if __name__ == "__main__":
    main()
