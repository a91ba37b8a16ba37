"""FeatureMerging: merge channels that compute and are used alike, without data (IFM, arXiv 2310.06756).

v_i = [rows that make channel i, columns that read it]; the closest pair of a group merges, rows summed and
columns averaged by multiplicity, while min D <= beta * max D, D_ij = ||v_i - v_j||^2.  Tensors really shrink.
Batch norms are folded first.  Cost O(n) a merge inside a group plus O(n_other^2 k) in its neighbours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_probability, check_type
from quernel.compress._context import Context, evaluating, run_batch
from quernel.compress._method import Method, Plan
from quernel.compress.graph import ChannelGroup, ChannelMap, LeftAlone, channel_map, explicit_map
from quernel.compress.prune._merging import Merger, Rule, Space
from quernel.compress.prune._outcome import layer_plans, summary, warnings
from quernel.compress.prune._refit import Target, refit
from quernel.compress.prune._surgery import Surgery, cut, kept_positions, operate, read_tensors, with_folds

NamedGroups = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        """Every hidden channel exists twice, so half of them can go without changing the function."""
        net: Any = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(),
            nn.Linear(16, 5),
        )  # fmt: skip
        with torch.no_grad():
            for first, second in ((net[0], net[4]), (net[4], net[6])):
                rows, columns = len(first.weight) // 2, second.weight.shape[1] // 2
                first.weight[rows:] = first.weight[:rows]
                second.weight[:, columns:] = second.weight[:, :columns]
            net[4].bias[8:] = net[4].bias[:8]
        return net.eval()

    data = [torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.linspace(1, -0.5, 128).reshape(2, 1, 8, 8)]
    return {"method": FeatureMerging(beta=0.0), "model": model, "data": data, "example_inputs": (data[0],)}


@register(
    "feature-merging", pillar="compress", contract="method", paper="2310.06756", status="stable", example=_example
)
@dataclass(frozen=True)
class FeatureMerging(Method):
    """Merge similar channels of a trained network, without data and without training.

    In each group of channels that exist together, the closest pair is merged as long as its distance is at
    most ``beta`` times the largest distance. Exact where two channels are the same; otherwise the merged
    channel stands in for both. Over-wide networks lose half of their channels and little else.

    Parameters
    ----------
    beta : float, default=0.15
        Share of the maximum distance up to which pairs merge, in [0, 1]; 0 merges exact duplicates only.
    max_ratio : float, default=0.8
        Share of a group's channels that may go at most, in [0, 1].
    reference : {"initial", "current"}, default="initial"
        Which maximum ``beta`` refers to: that of the unmerged network, or the paper's, which grows with the
        merged rows so that merging can run away.
    scale : {"sum", "mean"}, default="sum"
        "sum" adds rows and averages columns (the paper); "mean" averages rows and adds columns, the same
        function behind ReLU and the only right one behind GELU, SiLU or tanh.
    normalize : bool, default=False
        Compare summed rows after dividing by their multiplicity; only with ``scale="sum"``. Chains channels
        into one cluster and is much worse; here for comparison.
    distance : {"both", "producers"}, default="both"
        Whether the columns that read a channel count. "producers" finds equal features that are used
        differently, and compares biases, too.
    order : {"sweep", "global"}, default="sweep"
        One merge a group and sweep (the paper), or the relatively closest pair of all groups.
    refit : bool, default=False
        Refit each reading layer by least squares on ``data``; this is not part of the paper.
    repair : bool, default=False
        Rescale merged rows and offsets by sqrt(k / (1 + (k - 1) rho)), rho the mean cosine of the k original
        rows, to give back the variance that imperfectly correlated features lose. Data-free and rough: it
        helps some wide nets that lose most of their channels and costs accuracy elsewhere.
    keep_bn : bool, default=False
        Leave a neutral batch norm in the place of each folded one, for further training.
    groups : sequence of (producers, consumers), optional
        Module names of each group, for models that ``torch.export`` cannot read. A batch norm stands right
        after its layer among the producers.

    Raises
    ------
    QuernelError
        If a value is out of range, the model cannot be traced, or it cannot run with other widths.

    Notes
    -----
    The groups share tensors, so all are merged at once: in float64, with two Gram matrices of (n, n) a group, beside
    the model and the result.

    Departures from the authors' code: (1) batch norms are folded first (theirs sums running variances, which
    is off by sqrt(2) on duplicates); (2) exact duplicates merge (theirs stops with an assertion); (3) ``beta``
    refers to the unmerged network by default; (4) depthwise weights are averaged, not summed; (5) distances
    are updated, not recomputed. Merge before quantising: the sum rule changes the range of activations.

    References
    ----------
    Chen et al., "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its
    Interpretation Using Category Theory", arXiv 2310.06756, ICLR 2024. Variance factor after Wang et al.,
    "Forget the Data and Fine-Tuning! Just Fold the Network to Compress", arXiv 2502.10216, ICLR 2025.

    Examples
    --------
    >>> import torch
    >>> from quernel.compress import FeatureMerging, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> small = compress(net, FeatureMerging(beta=1.0, max_ratio=0.5), example_inputs=torch.ones(2, 8)).model
    >>> small[0].out_features, small[2].in_features
    (16, 16)
    """

    beta: float = 0.15
    max_ratio: float = 0.8
    reference: Literal["initial", "current"] = "initial"
    scale: Literal["sum", "mean"] = "sum"
    normalize: bool = False
    distance: Literal["both", "producers"] = "both"
    order: Literal["sweep", "global"] = "sweep"
    refit: bool = False
    repair: bool = False
    keep_bn: bool = False
    groups: NamedGroups | None = None

    stage: ClassVar[str] = "prune"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    keeps_shapes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_probability("beta", self.beta)
        check_probability("max_ratio", self.max_ratio)
        check_choice("reference", self.reference, ("initial", "current"))
        check_choice("scale", self.scale, ("sum", "mean"))
        check_choice("distance", self.distance, ("both", "producers"))
        check_choice("order", self.order, ("sweep", "global"))
        for name in ("normalize", "refit", "repair", "keep_bn"):
            check_type(name, getattr(self, name), bool)
        if self.normalize and self.scale == "mean":
            raise QuernelError('normalize=True divides summed rows; with scale="mean" they are means already')
        if self.groups is not None:
            object.__setattr__(self, "groups", _named_groups(self.groups))

    @property
    def needs(self) -> frozenset[str]:
        """The graph unless ``groups`` are given; data for ``refit``."""
        return frozenset({"graph"} if self.groups is None else ()) | ({"data"} if self.refit else frozenset())

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Data-free thresholds, and fixed shares with a refit; means suit every activation."""
        shares = (cls(beta=1.0, max_ratio=r, scale="mean", refit=True) for r in (0.25, 0.5))
        return (*(cls(beta=b) for b in (0.1, 0.2, 0.3)), *shares)

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find the groups, merge copies of their tensors, and try the narrower model once."""
        if not context.selected(model, self.targets):
            return Plan((), Surgery())
        channels = self._channels(model, context)
        groups, excluded = _allowed(channels.groups, context)
        folds = dict(channels.folds)
        merger = build_merger(model, replace(channels, groups=tuple(groups)), self)
        merger.run(self.beta, self.max_ratio, self.order, lambda done: context.tell("merge channels", done))
        if self.repair:
            _repair(model, merger, folds)
        surgery = cut(model, merger.tensors, merger.spaces, folds)
        if surgery.layers and (context.data is not None or context.example_inputs is not None):
            surgery = self._tried(model, merger, surgery, folds, context)
        left = (*channels.left_alone, *excluded)
        layers = layer_plans(model, surgery, merger, left)
        return Plan(layers, surgery, summary(merger, left), warnings(merger, left))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the narrower layers in and take the folded batch norms out."""
        operate(model, plan.payload, keep_bn=self.keep_bn)

    def _channels(self, model: nn.Module, context: Context) -> ChannelMap:
        if self.groups is not None:
            return explicit_map(model, self.groups)
        return channel_map(model, _example_batch(context), context.forward)

    def _tried(
        self, model: nn.Module, merger: Merger, surgery: Surgery, folds: Mapping[str, str], context: Context
    ) -> Surgery:
        """Run the merged model once, and refit it if that is wanted."""
        # Parameters are shared: those that change are replaced.
        trial = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        operate(trial, surgery, keep_bn=self.keep_bn)
        try:
            with evaluating(trial), torch.no_grad():
                run_batch(trial, _example_batch(context), context.forward)
        except (RuntimeError, ValueError, IndexError) as error:
            raise QuernelError(
                f"{type(model).__name__} cannot run with narrower layers: {error}. Its forward probably has a width "
                "written into it, such as view(-1, 400): write flatten(1), or leave those layers out with exclude="
            ) from error
        if not self.refit:
            return surgery
        refit(model, trial, _targets(model, merger, surgery, folds), context)
        layers = {name: _tensors_of(trial.get_submodule(name)) for name in surgery.layers}
        return replace(surgery, layers=layers)


def _named_groups(groups: Any) -> NamedGroups:
    try:
        pairs = tuple((tuple(producers), tuple(consumers)) for producers, consumers in groups)
    except (TypeError, ValueError) as error:
        raise QuernelError(f"groups must be pairs (producers, consumers) of module names; got {groups!r}") from error
    if any(isinstance(side, str) for pair in groups for side in pair) or not all(
        isinstance(name, str) for pair in pairs for side in pair for name in side
    ):
        raise QuernelError(f'groups must hold sequences of module names such as (("fc1",), ("fc2",)); got {groups!r}')
    return pairs


def _example_batch(context: Context) -> Any:
    return next(context.batches()) if context.example_inputs is None else context.example_inputs


def _allowed(groups: Sequence[ChannelGroup], context: Context) -> tuple[list[ChannelGroup], list[LeftAlone]]:
    kept, left = [], []
    for group in groups:
        closed = [name for name in group.names if not context.allows(name)]
        if closed:
            reason = f"include= and exclude= leave out '{closed[0]}', which holds the same channels"
            left.append(LeftAlone(group.names, group.size, reason))
        else:
            kept.append(group)
    return kept, left


def build_merger(model: nn.Module, channels: ChannelMap, method: FeatureMerging) -> Merger:
    """Read the tensors of all groups, batch norms folded, and get ready to merge."""
    folds = dict(channels.folds)
    ready = [with_folds(group, folds) for group in channels.groups]
    names = dict.fromkeys(name for group in ready for name in group.names)
    rule = Rule(method.reference, method.scale, method.normalize, method.distance)
    return Merger(read_tensors(model, tuple(names), folds), ready, rule)


def _repair(model: nn.Module, merger: Merger, folds: Mapping[str, str]) -> None:
    """Rescale what merged channels put out to the variance that equal features would have given."""
    names = tuple(dict.fromkeys(name for space in merger.spaces for name in space.group.names))
    before = read_tensors(model, names, folds)
    for space in merger.spaces:
        rows = [s for s in space.group.producers if s.role == "row"]
        lines = np.concatenate([before[s.tensor][s.index[:, 0]].reshape(space.group.size, -1) for s in rows], axis=1)
        lines = lines / np.maximum(np.linalg.norm(lines, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        # With its offsets: rows alone would move the threshold of the activation.
        scaled = [*rows, *(s for s in space.slots if s.role in ("row", "shift") and s.parameter == "bias")]
        for i, members in enumerate(space.members):
            k = len(members)
            if k > 1:
                total = float(np.square(lines[members].sum(axis=0)).sum())  # k + k (k - 1) rho
                rho = max(0.0, (total - k) / (k * (k - 1)))
                for slot in scaled:
                    merger.tensors[slot.tensor][slot.index[i]] *= math.sqrt(k / (1 + (k - 1) * rho))


def _targets(model: nn.Module, merger: Merger, surgery: Surgery, folds: Mapping[str, str]) -> dict[str, Target]:
    """Return what each reading layer's output was, in terms of its rows as they are now."""
    kept = kept_positions(merger.tensors, merger.spaces)
    changed = [s for s in merger.spaces if s.merged]
    targets = {}
    for name in dict.fromkeys(slot.module for space in changed for slot in space.group.consumers):
        tensor = f"{name}.weight"
        mix = np.eye(merger.tensors[tensor].shape[0])
        for space in changed:
            for slot in space.group.producers:
                if slot.tensor == tensor:
                    _mix_rows(mix, space, slot.index[:, 0], merger.rule.adds(slot))
        targets[name] = Target(folds.get(name, name), torch.from_numpy(mix[kept[tensor, 0]]))
    return targets


def _mix_rows(mix: np.ndarray, space: Space, positions: np.ndarray, adds: bool) -> None:
    for i, members in enumerate(space.members):
        for member in members:
            mix[positions[i], positions[member]] = 1.0 if adds else 1.0 / len(members)


def _tensors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
