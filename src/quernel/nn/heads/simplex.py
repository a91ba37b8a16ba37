"""``SimplexHead``: a classifier that is never trained, so that every version of a model means the same (2405.02581).

K prototypes are the corners of a regular simplex in d = K - 1 dimensions; features z = P x, logits = z W^T.  As W is
fixed, class c is pulled to the same direction w_c by every model trained with it: features of a new version can be
compared with those an old version stored.  W is neither stored nor multiplied: logits cost O(d) a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int
from quernel.nn.functional.simplex import simplex_logits, simplex_prototypes
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES

ClassMap = Sequence[int] | Mapping[int, int]
# Label without a prototype.
_NONE = -1


def _example() -> dict[str, Any]:
    def make() -> SimplexHead:
        return SimplexHead(8, 5, {0: 7, 1: 3, 4: 0}, generator=torch.Generator().manual_seed(0))

    return {"make": make, "input": lambda generator: (torch.randn(4, 5, generator=generator),)}


@register(
    "stationary-representations", pillar="nn", contract="module", paper="2405.02581", status="stable", example=_example
)
class SimplexHead(nn.Module):
    """Classify by fixed corners of a simplex, so that features of all versions of a model are comparable.

    Parameters
    ----------
    n_prototypes : int, default=1024
        Corners K, for classes to come too: it can never change, and features have K - 1 numbers.
    in_features : int, optional
        Width of the backbone.  A bias-free linear map to K - 1 features is trained in front of the corners; with the
        default, K - 1, the head has nothing to train.
    class_map : sequence or mapping of int, optional
        Prototype of each label; a sequence maps labels 0, 1, ....  Default: label y has prototype y.  The map is part
        of what versions agree on: all must map the labels they share alike.
    device, dtype, generator
        Of the linear map.

    Attributes
    ----------
    class_map : tuple of int
        Prototype of labels 0, 1, ...; -1 for a label that has none.
    spec : Tensor, int64
        K, then the class map: all that the state dict holds of the classifier.

    Raises
    ------
    QuernelError
        If there are more classes than prototypes, two labels share one, or a state dict brings another map.

    Notes
    -----
    Training: ``cross_entropy(logits, head.targets(labels))``; prototypes without a class act as negatives.  Features
    are not normalised there, so their length grows: use weight decay.  Retrieval: ``features`` over their length.
    Differs from the authors' code, which keeps W in float32 and divides its rows by their length plus 1e-8.

    References
    ----------
    Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
    Model Replacements", arXiv 2405.02581, 2024.

    Examples
    --------
    >>> head = SimplexHead(16, in_features=32, class_map=[15, 14, 13])
    >>> logits, features = head(torch.zeros(4, 32))
    >>> tuple(logits.shape), tuple(features.shape), head.targets(torch.tensor([2, 0])).tolist()
    ((4, 16), (4, 15), [13, 15])
    """

    def __init__(
        self,
        n_prototypes: int = 1024,
        in_features: int | None = None,
        class_map: ClassMap | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_prototypes = check_int("n_prototypes", n_prototypes, low=2)
        self.n_features = self.n_prototypes - 1
        self.in_features = self.n_features if in_features is None else check_int("in_features", in_features, low=1)
        self.class_map = _checked_map(class_map, self.n_prototypes)
        if self.in_features == self.n_features:
            self.register_parameter("weight", None)
        else:
            weight = torch.empty(self.n_features, self.in_features, device=device, dtype=dtype)
            bound = self.in_features**-0.5  # as nn.Linear
            self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.register_buffer("spec", torch.tensor([self.n_prototypes, *self.class_map], device=device))
        self.spec: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (..., in_features) -> (..., K), (..., K - 1)
        """Return logits, one a prototype, and the features that are compared with other models'.

        Raises
        ------
        QuernelError
            If ``x`` has another width than ``in_features``.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise QuernelError(
                f"x must have shape (..., {self.in_features}); got {tuple(x.shape)}. Give SimplexHead the width of the "
                f"backbone as in_features=; without it, features must have n_prototypes - 1 = {self.n_features} numbers"
            )
        features = x if self.weight is None else F.linear(x, self.weight.to(x.dtype))
        return simplex_logits(features), features

    def targets(self, labels: Tensor) -> Tensor:
        """Return the prototype of each label, what cross-entropy takes; (n,) int64.

        Raises
        ------
        QuernelError
            If a label has no prototype.
        """
        labels = torch.as_tensor(labels, device=self.spec.device)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise QuernelError(f"labels must be integers; got {labels.dtype}")
        known = (labels >= 0) & (labels < len(self.class_map))
        found = (
            self.spec[1:][torch.where(known, labels, 0).long()] if self.class_map else torch.full_like(labels, _NONE)
        )
        missing = labels[~known | (found == _NONE)].unique()
        if len(missing):
            raise QuernelError(
                f"labels {missing[:5].tolist()} have no prototype; the class map knows {len(self.classes)} labels of "
                f"at most {self.n_prototypes}. Extend it with extended(...), or drop these samples"
            )
        return found.long()

    def predict(self, logits: Tensor) -> Tensor:
        """Return the label with the largest logit among prototypes that have one; (..., K) -> (...)."""
        labels = torch.tensor(self.classes, device=logits.device)
        return labels[logits[..., self.targets(labels).to(logits.device)].argmax(-1)]

    def prototypes(self, labels: Tensor) -> Tensor:
        """Return the directions that features of these labels are pulled to, float32 (n, K - 1), unit length."""
        return simplex_prototypes(self.n_prototypes, self.targets(labels), device=self.spec.device)

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels that have a prototype."""
        return tuple(label for label, place in enumerate(self.class_map) if place != _NONE)

    def check_agrees(self, other: SimplexHead) -> None:
        """Raise unless features of both heads can be compared.

        Raises
        ------
        QuernelError
            If the heads have another number of prototypes, a label another prototype, or a prototype another label.
        """
        if self.n_prototypes != other.n_prototypes:
            raise QuernelError(
                f"n_prototypes must be the same in all versions; got {self.n_prototypes} and {other.n_prototypes}. "
                "Train the new version with the old number: features of different simplexes cannot be compared"
            )
        mine, theirs = (dict(enumerate(head.class_map)) for head in (self, other))
        taken = {place: label for label, place in mine.items()}
        for label in other.classes:
            place = theirs[label]
            if mine.get(label, place) not in (place, _NONE) or taken.get(place, label) != label:
                raise QuernelError(
                    f"class_map must agree with the other version's, where label {label} has prototype {place}; here "
                    f"it has {mine.get(label)} and that prototype belongs to label {taken.get(place)}. Use its map "
                    "and give new classes free prototypes"
                )

    def extended(self, class_map: ClassMap) -> Self:
        """Return a copy that knows more labels; those of this head keep their prototypes.

        Raises
        ------
        QuernelError
            If the map moves or forgets a label of this head.
        """
        new = type(self)(self.n_prototypes, self.in_features, class_map, device="meta")
        new.check_agrees(self)
        if set(self.classes) - set(new.classes):
            raise QuernelError(f"class_map must keep the labels {self.classes}; it has {new.classes}")
        if self.weight is not None:
            new.weight = nn.Parameter(self.weight.detach().clone())
        new.spec = torch.tensor([new.n_prototypes, *new.class_map], device=self.spec.device)
        return new.train(self.training)

    def config(self) -> dict[str, Any]:
        """Return sizes, class map and dtype."""
        return {
            "n_prototypes": self.n_prototypes,
            "in_features": self.in_features,
            "class_map": list(self.class_map),
            "dtype": "float32" if self.weight is None else dtype_name(self.weight.dtype),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained head from ``config()``."""
        dtype = DTYPES[check_choice("dtype", config["dtype"], DTYPES)]
        places = {label: place for label, place in enumerate(config["class_map"]) if place != _NONE}
        new = cls(config["n_prototypes"], config["in_features"], places, dtype=dtype)
        if list(new.class_map) != list(config["class_map"]):
            raise QuernelError(f"class_map must end with a label that has a prototype; got {config['class_map']}")
        return new

    def extra_repr(self) -> str:
        """Show sizes and the number of classes."""
        return f"{self.n_prototypes}, in_features={self.in_features}, classes={len(self.classes)}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        spec = state_dict.get(f"{prefix}spec")
        wanted = [self.n_prototypes, *self.class_map]
        if spec is not None and spec.device.type != "meta" and spec.flatten().tolist() != wanted:
            raise QuernelError(
                f"{prefix}spec must be the K and class map of this head, {_shown(wanted)}; got "
                f"{_shown(spec.flatten().tolist())}. Build the head with the map that the state was saved with, then "
                "extended(...) for new classes"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _checked_map(class_map: ClassMap | None, n_prototypes: int) -> tuple[int, ...]:
    """Return the prototype of labels 0, 1, ..., -1 where a mapping leaves one out."""
    if class_map is None:
        return tuple(range(n_prototypes))
    if not isinstance(class_map, Mapping):
        try:
            class_map = dict(enumerate(class_map))
        except TypeError as error:
            raise QuernelError(f"class_map must be a sequence or a mapping of integers; got {class_map!r}") from error
    if len(class_map) > n_prototypes:
        raise QuernelError(
            f"class_map has {len(class_map)} classes for n_prototypes={n_prototypes}. Take at least one prototype a "
            "class, and more for classes to come"
        )
    found: dict[int, int] = {}
    for label, place in class_map.items():
        # Labels index an array; far beyond any K they are no class numbers.
        label = check_int("label in class_map", label, low=0, high=2**24)
        found[label] = check_int(f"prototype of label {label} in class_map", place, low=0, high=n_prototypes - 1)
    if len(set(found.values())) < len(found):
        twice = next(place for place in found.values() if list(found.values()).count(place) > 1)
        raise QuernelError(f"class_map must give every label a prototype of its own; {twice} is given twice")
    return tuple(found.get(label, _NONE) for label in range(max(found, default=-1) + 1))


def _shown(numbers: list[int]) -> str:
    return f"{numbers[:8]}" if len(numbers) <= 8 else f"{numbers[:8]} and {len(numbers) - 8} more"
