"""When is a quantum kernel worth it? Its own data beside an ordinary table, each against a tuned Gaussian kernel.

Above data that a two-qubit feature map labels itself, below two columns of the wines that come with scikit-learn. Left
the regions that the quantum kernel finds, then those of ``SVC(rbf)``; the kernel matrices, rows by class, say why.
The verdict of ``report_`` goes to the terminal.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC

from quernel.kernels.quantum import (
    AngleRangeWarning,
    QuantumFeatureMap,
    QuantumKernel,
    QuantumKernelClassifier,
    make_adhoc,
)

PENALTIES = [1.0, 10.0, 100.0, 1000.0]


def problems() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return angles and class numbers of both problems."""
    x, y = make_adhoc(100, n_qubits=2, random_state=1)
    wine = load_wine()
    columns = [wine.feature_names.index(name) for name in ("alcohol", "flavanoids")]
    angles = MinMaxScaler((0.0, 2 * math.pi)).fit_transform(wine.data[:, columns])
    return {"ad hoc data": (x, (y > 0).astype(int)), "wines: alcohol, flavanoids": (angles, wine.target)}


def main() -> None:
    """Fit both kernels on both problems and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="quantum-kernels.png", help="picture to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AngleRangeWarning)
    figure, axes = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
    axis = np.linspace(0, 2 * math.pi, 120)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for row, (name, (x, y)) in zip(axes, problems().items(), strict=True):
        train, new, labels, wanted = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
        quantum = QuantumKernelClassifier(rescale=False, random_state=0)
        searched = {"C": PENALTIES, "scale": [0.1, 0.2, 1.0]}
        ours = GridSearchCV(quantum, searched, cv=3).fit(train, labels)
        theirs = GridSearchCV(SVC(), {"C": PENALTIES, "gamma": [0.03, 0.1, 0.3, 1.0, 3.0]}, cv=3).fit(train, labels)
        sys.stdout.write(f"{name}: {ours.best_estimator_.report_.message}\n")
        order = np.argsort(y, kind="stable")
        matrices = {
            f"quantum, s = {ours.best_params_['scale']}": QuantumKernel(
                QuantumFeatureMap(scale=ours.best_params_["scale"])
            )(x[order]),
            f"Gaussian, gamma = {theirs.best_params_['gamma']}": rbf_kernel(
                x[order], gamma=theirs.best_params_["gamma"]
            ),
        }
        for ax, (kind, model) in zip(row[:2], (("quantum kernel", ours), ("SVC(rbf)", theirs)), strict=True):
            regions = model.predict(grid).reshape(len(axis), -1)
            ax.pcolormesh(axis, axis, regions, cmap="tab10", vmin=0, vmax=9, alpha=0.3, shading="auto")
            ax.scatter(*new.T, c=wanted, cmap="tab10", vmin=0, vmax=9, s=12, edgecolors="black", linewidths=0.4)
            ax.set_title(f"{name}\n{kind}: {100 * model.score(new, wanted):.0f} % of new rows", fontsize=10)
            ax.set_xlabel("first angle")
            ax.set_ylabel("second angle")
        for ax, (kind, matrix) in zip(row[2:], matrices.items(), strict=True):
            image = ax.imshow(matrix, vmin=0, vmax=1, cmap="magma")
            ax.set_title(f"{kind}\nkernel matrix, rows by class", fontsize=10)
        figure.colorbar(image, ax=row[3], shrink=0.8)
    figure.savefig(options.output, dpi=100)
    sys.stdout.write(f"wrote {options.output}\n")


if __name__ == "__main__":
    main()
