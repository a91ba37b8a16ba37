"""What a user would do instead of a fixed simplex: train towards the old classifier or features, or align afterwards.

All have a trained classifier.  BCT (Shen et al., arXiv 2003.11942) lets new features be classified by the old
classifier too, with mean old features in the place of rows for classes it never saw.  Distillation pulls features to
the old ones.  Procrustes turns the features of finished models by the best rotation on paired images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from _compatible_nets import Loss, Matrix, Pair, images
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.search import compatibility_matrix, features_of


def plain(model: nn.Module, old: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy alone."""
    return lambda x, y: F.cross_entropy(model(x)[0], y)


def distilled(weight: float) -> Loss:
    """Cross-entropy, and ``weight`` times one less the cosine to the old features."""

    def loss(model: nn.Module, old: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
        def of_batch(x: Tensor, y: Tensor) -> Tensor:
            logits, z = model(x)
            cross = F.cross_entropy(logits, y)
            if old is None:
                return cross
            with torch.no_grad():
                before = old(x)[1]
            return cross + weight * (1 - F.cosine_similarity(z, before)).mean()

        return of_batch

    return loss


def bct(weight: float, known: Sequence[int], data: Callable[[int], Pair]) -> Loss:
    """Cross-entropy, and ``weight`` times the cross-entropy of the old classifier on the new features.

    ``known`` are the classes of each version, ``data(t)`` the images that version t is trained on.
    """
    version = iter(range(len(known)))

    def loss(model: nn.Module, old: nn.Module | None) -> Callable[[Tensor, Tensor], Tensor]:
        t = next(version)
        rows = None if old is None else old_rows(old, known[t - 1], data(t))

        def of_batch(x: Tensor, y: Tensor) -> Tensor:
            logits, z = model(x)
            cross = F.cross_entropy(logits, y)
            return cross if rows is None else cross + weight * F.cross_entropy(z @ rows.T, y)

        return of_batch

    return loss


@torch.no_grad()
def old_rows(old: nn.Module, known: int, data: Pair) -> Tensor:
    """Return the old classifier with rows for the new classes: their mean old direction, as long as its own rows."""
    head: nn.Module = old.get_submodule("1.classifier")
    rows = head.get_parameter("weight").detach()[:known].clone()
    length = rows.norm(dim=1).mean()
    x, y = data
    made = []
    for label in range(known, int(y.max()) + 1):
        mean = torch.from_numpy(features_of(old, x[y == label])).mean(0)
        made.append(length * F.normalize(mean, dim=0))
    return torch.cat((rows, torch.stack(made))) if made else rows


def procrustes_matrix(models: Sequence[nn.Module], part: str = "test") -> Matrix:
    """Return the lower triangle where queries are turned into the space of the gallery's model.

    The rotation of a pair of models is fitted on the unit features of the paired images.
    """
    queries, gallery = images(part), images("gallery")
    lower = []
    for i, new in enumerate(models):
        pairs = [compatibility_matrix([old, turned(new, old)], queries, gallery) for old in models[:i]]
        lower.append([*(float(c[1, 0]) for c in pairs), float(compatibility_matrix([new], queries, gallery)[0, 0])])
    return lower


def turned(new: nn.Module, old: nn.Module) -> Callable[[Tensor], np.ndarray]:
    """Return the features of the new model in the space of the old one."""
    paired = images("paired")[0]
    rotation = orthogonal_procrustes(features_of(new, paired), features_of(old, paired))[0]
    return lambda x: features_of(new, x) @ rotation
