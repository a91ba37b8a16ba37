"""RobeEmbeddings: all large embedding tables of a model become views of one small shared array (arXiv 2108.02191).

    row(i)[c Z + k] = sign * scale * M[(h(i, c) + k) mod m],    m = ratio * numbers of all tables

M begins as the least-squares fit of the tables: each slot is the mean of what reads it. Of unrelated numbers that keeps
a fraction ``ratio`` of the variance, so the model is to be fine-tuned. Cost: one pass over the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._random import torch_generator
from quernel._registry import register
from quernel._validate import check_float, check_int, check_type
from quernel.compress._context import Context, tied_elsewhere
from quernel.compress._method import LayerPlan, Method, Plan
from quernel.nn import RobeArray, RobeEmbedding, RobeEmbeddingBag, replace_module
from quernel.nn.weights.dense import DTYPES

Table = nn.Embedding | nn.EmbeddingBag


@dataclass(frozen=True)
class _Group:
    """Tables that share an array, with the factor of each."""

    size: int
    scales: dict[str, float]


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        table = nn.Embedding(300, 8, padding_idx=0)
        net = nn.Sequential(table, nn.Flatten(), nn.Linear(24, 5)).eval()
        for parameter in net.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape).sin()
        table.weight.data[0] = 0
        return net

    data = [torch.arange(12).reshape(4, 3) * 20]
    return {
        "method": RobeEmbeddings(ratio=0.5, min_numel=1000, block=8),
        "model": model,
        "data": data,
        "example_inputs": (data[0],),
    }


@register("robe", pillar="compress", contract="method", paper="2108.02191", status="stable", example=_example)
@dataclass(frozen=True)
class RobeEmbeddings(Method):
    """Replace embedding tables by hashed views of one small trainable array; fine-tune the result.

    Parameters
    ----------
    ratio : float, default=0.1
        Numbers of the array, as a fraction of those of the tables that it replaces; in (0, 1].
    min_numel : int, default=65536
        Tables of fewer numbers are left alone.
    block : int, default=16
        Consecutive numbers that share a hash; fastest where it divides the tables' row length.
    signs : bool, default=True
        Whether numbers are read with random signs.
    seed : int, default=0
        Decides the hashes.

    Notes
    -----
    The row of ``padding_idx`` becomes zero and gets no gradient. Each table is read with a fixed factor, its root mean
    square relative to the largest, so that small numbers do not drown in large ones. Left alone, with the reason in the
    report: tied tables, ``max_norm``, ``scale_grad_by_freq``, bags with ``mode="max"``. A model that reads the
    ``weight`` of a table past its forward fails when it is run; exclude that table.

    References
    ----------
    Desai et al., "Random Offset Block Embedding Array", arXiv 2108.02191, 2022.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50_000, 16), torch.nn.Linear(16, 1))
    >>> result = quernel.compress.compress(model, quernel.compress.RobeEmbeddings(ratio=0.01))
    >>> type(result.model[0]).__name__, round(result.report.ratio)
    ('RobeEmbedding', 100)
    """

    ratio: float = 0.1
    min_numel: int = 2**16
    block: int = 16
    signs: bool = True
    seed: int = 0

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.EmbeddingBag)

    def __post_init__(self) -> None:
        check_float("ratio", self.ratio, low=0.0, high=1.0, open_low=True)
        check_int("min_numel", self.min_numel, low=1)
        check_int("block", self.block, low=1)
        check_type("signs", self.signs, bool)
        check_int("seed", self.seed, low=0)

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Return nothing: a search does not train, and untrained an array that saves bytes keeps too little."""
        return ()

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the tables, the size of their array, and the factor of each."""
        plans: dict[str, LayerPlan] = {}
        tables: dict[str, Table] = {}
        warnings = []
        for name, module in context.selected(model, self.targets):
            reason = self._refusal(model, name, module)  # type: ignore[arg-type]
            if reason:
                plans[name] = LayerPlan(name, "skip", reason)
                continue
            tables[name] = module  # type: ignore[assignment]
            plans[name] = LayerPlan(name, "robe", details={"numbers": tables[name].weight.numel()})
            padding = module.padding_idx if isinstance(module, nn.Embedding) else None
            if padding is not None and bool(tables[name].weight[padding].any()):
                warnings.append(f"{name}: the row of padding_idx was not zero; it is now")
        groups = self._groups(tables)
        before = sum(table.weight.numel() for table in tables.values())
        after = sum(group.size for group in groups)
        if tables and context.finetune is None and self.ratio < 1:
            warnings.append(
                f"nothing trains the array: of unrelated numbers it keeps about {self.ratio:.0%} of the variance. "
                "Pass finetune=, or train the result"
            )
        summary = {"embedding numbers before": before, "embedding numbers after": after}
        return Plan(tuple(plans.values()), tuple(groups), summary, tuple(warnings))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Fit an array to each group of tables, and put in layers over it."""
        for group in plan.payload:
            tables = {name: model.get_submodule(name) for name in group.scales}
            first = next(iter(tables.values())).weight
            memory = RobeArray(
                group.size,
                seed=self.seed,
                signs=self.signs,
                dtype=first.dtype,
                generator=torch_generator(self.seed),
            ).to(first.device)
            layers = {
                name: self._layer(table, memory, field, group.scales[name])  # type: ignore[arg-type]
                for field, (name, table) in enumerate(tables.items())
            }
            memory.fit([(layers[name], table.weight) for name, table in tables.items()])
            memory.values.requires_grad_(first.requires_grad)
            for name, layer in layers.items():
                replace_module(model, name, layer)

    def _refusal(self, model: nn.Module, name: str, module: Table) -> str:
        weight = module.weight
        tied = tied_elsewhere(model, weight, [module])
        if tied:
            return f"its weight is tied to {tied}, which needs it as a matrix"
        if weight.numel() < self.min_numel:
            return f"its {weight.numel()} numbers are fewer than min_numel={self.min_numel}"
        if weight.dtype not in DTYPES.values():
            return f"its dtype {weight.dtype} is not a floating one"
        if module.max_norm is not None:
            return "max_norm renormalises stored rows, and here none is stored"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq counts rows, and here they share numbers"
        if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
            return "bags by mode='max' are not supported"
        if not bool(weight.isfinite().all()):
            raise QuernelError(f"{name!r} holds NaN or infinity; repair or exclude the layer")
        return ""

    def _groups(self, tables: dict[str, Table]) -> list[_Group]:
        """Group tables by what one array can hold: one dtype on one device, all trained or all frozen."""
        kinds: dict[tuple[torch.dtype, torch.device, bool], list[str]] = {}
        for name, table in tables.items():
            weight = table.weight
            kinds.setdefault((weight.dtype, weight.device, weight.requires_grad), []).append(name)
        groups = []
        for names in kinds.values():
            rms = {name: float(tables[name].weight.detach().float().square().mean().sqrt()) for name in names}
            largest = max(rms.values())
            numbers = sum(tables[name].weight.numel() for name in names)
            size = max(self.block, round(self.ratio * numbers))
            groups.append(_Group(size, {name: rms[name] / largest if rms[name] else 1.0 for name in names}))
        return groups

    def _layer(self, table: Table, memory: RobeArray, field: int, scale: float) -> RobeEmbedding | RobeEmbeddingBag:
        options: dict[str, Any] = {"block": self.block, "memory": memory, "field": field, "scale": scale}
        options |= {"padding_idx": table.padding_idx, "sparse": table.sparse}
        if isinstance(table, nn.EmbeddingBag):
            options |= {"mode": table.mode, "include_last_offset": table.include_last_offset}
            return RobeEmbeddingBag(table.num_embeddings, table.embedding_dim, **options)
        return RobeEmbedding(table.num_embeddings, table.embedding_dim, **options)
