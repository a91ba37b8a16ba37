"""RepresenterSketch: a small network becomes a sum of array look-ups (arXiv 2106.11426).

A student f(x) = b + sum_i alpha_i k(A x, z_i)^K is distilled from the network's own answers on the data; its anchors
are counted into L rows of R cells; the table is then tuned with the hashes fixed, and rounded. What remains is a short
projection, L K hashes and L look-ups, whatever the network was.
Cost: ``n_steps`` steps of training and ``finetune_epochs`` passes over the rows; no labels are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quernel._random import generator, spawn
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.compress._context import Context
from quernel.compress._method import LayerPlan, Method, Plan, Scalar
from quernel.compress._networks import Network, find_networks
from quernel.hashing._fused_cells import Projection
from quernel.kernels._machine_training import Machine, Settings, train_machine
from quernel.kernels._sketched_machine import STORED, Cells, sketch_machine, tune_table
from quernel.nn import SketchLayer, replace_module
from quernel.nn.weights import unique_bytes

# Fewer rows say next to nothing about a function of several variables.
_FEWEST_ROWS = 512
_MOST_ROWS = 2**17
# Rows that are kept from training, to say how far the sketch is from the network.
_HELD_OUT, _MOST_HELD_OUT = 0.1, 4096


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        draw = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 2))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
        return net.eval()

    data = [torch.randn(600, 8, generator=torch.Generator().manual_seed(1))]
    method = RepresenterSketch(n_rows=64, n_cells=8, n_anchors=32, proj_dim=4, n_steps=40)
    return {"method": method, "model": model, "data": data, "example_inputs": (data[0][:4],)}


@register(
    "representer-sketch",
    pillar="compress",
    contract="method",
    paper="2106.11426",
    status="experimental",
    example=_example,
)
@dataclass(frozen=True)
class RepresenterSketch(Method):
    """Replace a network of rows (an MLP, or a head on embeddings) by a sketch that is read, not multiplied.

    Networks are found by running the model: the children of an ``nn.Sequential`` that take and give rows (B, d), from
    the first linear layer on. A class of your own is taken as a whole if ``include`` names it. Everything else is left
    alone, with the reason in the report.

    Parameters
    ----------
    n_rows : int, default=400
        Rows L of the table: look-ups a row; the error falls like 1 / sqrt(L).
    n_cells : int or None, default=16
        Cells R of a row; None with ``kernel="angular"`` for 2^K.
    n_anchors : int, default=500
        Anchors of the student; without influence on what is stored.
    proj_dim : int, default=16
        Rows p of the student's projection A, which is stored.
    kernel, width, n_concat
        As in ``quernel.kernels.LSHKernelMachine``.
    l1 : float, default=1e-4
        Weight of sum |alpha| in the student's training: the noise of the sketch grows with it.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        Of the hashes.
    n_steps : int, default=3000
        Steps of the student's training.
    learning_rate : float, default=5e-3
        Of the student's projection and anchors; the anchors' weights learn four times faster.
    finetune_epochs : int, default=2
        Passes over the rows that tune the table.
    finetune_rate : float, default=0.02
        How far an answer may move in a step of that, in standard deviations of the network's answers.
    bits : {32, 16, 8}, default=16
        Of the numbers in the table; the table trains in 32 bits until ``finetune=`` of ``compress`` is over.
    seed : int, default=0

    Notes
    -----
    The network's answers are what is learned, so labels are not needed; with a ``finetune=`` that trains on labels the
    table learns from those too. The report's ``sketch_error`` is relative, on rows kept from the training.

    References
    ----------
    Coleman et al., "Efficient Inference via Universal LSH Kernel", arXiv 2106.11426, 2021.

    Examples
    --------
    >>> import torch, quernel
    >>> x, draw = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(16, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
    >>> method = quernel.compress.RepresenterSketch(n_rows=100, n_steps=200)
    >>> result = quernel.compress.compress(net, method, data=[x])
    >>> [type(layer).__name__ for layer in result.model], result.report.ratio > 5
    (['SketchLayer', 'Identity', 'Identity'], True)
    """

    n_rows: int = 400
    n_cells: int | None = 16
    n_anchors: int = 500
    proj_dim: int = 16
    kernel: Literal["l2", "l1", "angular"] = "l2"
    width: float = 4.0
    n_concat: int = 2
    l1: float = 1e-4
    directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian"
    n_steps: int = 3000
    learning_rate: float = 5e-3
    finetune_epochs: int = 2
    finetune_rate: float = 0.02
    bits: Literal[32, 16, 8] = 16
    seed: int = 0

    stage: ClassVar[str] = "lowrank"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Sequential,)
    # One layer answers for many: outputs cannot be compared one to one, and nothing is left for other methods.
    keeps_shapes: ClassVar[bool] = False
    combines: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.settings, self.cells
        check_int("finetune_epochs", self.finetune_epochs, low=0)
        check_choice("bits", self.bits, tuple(STORED))
        check_float("finetune_rate", self.finetune_rate, low=0.0, open_low=True)

    @property
    def needs(self) -> frozenset[str]:
        """Data: the student learns from the network's answers on it."""
        return frozenset({"data"})

    @property
    def settings(self) -> Settings:
        """The student and its training."""
        return Settings(
            n_anchors=self.n_anchors,
            proj_dim=self.proj_dim,
            kernel=self.kernel,
            width=self.width,
            n_concat=self.n_concat,
            l1=self.l1,
            n_steps=self.n_steps,
            learning_rate=self.learning_rate,
        )

    @property
    def cells(self) -> Cells:
        """The hashes of the sketch."""
        return Cells.of(self.settings, self.n_rows, self.n_cells, self.directions, self.seed)

    @classmethod
    def menu(cls) -> tuple[RepresenterSketch, ...]:
        """Return a sketch of the usual size and a small one."""
        return (cls(), cls(n_rows=100, bits=8))

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Find networks that a sketch would shrink, distil and sketch each."""
        networks = find_networks(model, context)
        layers: list[LayerPlan] = []
        payload: list[tuple[Network, SketchLayer]] = []
        chosen = [n for n in networks if not n.refusal]
        seeds = dict(zip(chosen, spawn(self.seed, len(chosen)), strict=True))
        for network in networks:
            reason = network.refusal or self._too_small(network)
            rows = torch.zeros(0)
            if not reason:
                rows = network.inputs(model, context, _MOST_ROWS)
                if len(rows) < _FEWEST_ROWS:
                    reason = f"distillation needs at least {_FEWEST_ROWS} rows of data; it got {len(rows)}"
            if reason:
                layers.append(LayerPlan(network.names[0], "skip", reason))
                continue
            context.tell(f"{type(self).__name__}: {network.names[0]}", len(payload) / len(chosen))
            layer, details = self._sketched(network, rows, generator(seeds[network]))
            payload.append((network, layer))
            layers.append(LayerPlan(network.names[0], "sketch", details=details))
            layers += [LayerPlan(name, f"sketched in {network.names[0]}") for name in network.names[1:]]
        return Plan(tuple(layers), tuple(payload), {"sketched networks": len(payload)})

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the sketches in, tables in float32; the other children of a network become identities."""
        for network, layer in plan.payload:
            for name in network.names[1:]:
                replace_module(model, name, nn.Identity())
            replace_module(model, network.names[0], layer)

    def finish(self, model: nn.Module, plan: Plan) -> None:
        """Round the tables, after any fine-tuning."""
        if self.bits == 32:
            return
        for network, _ in plan.payload:
            held = model.get_submodule(network.names[0])
            if isinstance(held, SketchLayer) and held.bits == 32:
                replace_module(model, network.names[0], held.rounded(self.bits))

    def _too_small(self, network: Network) -> str:
        cells, before = self.cells, network.nbytes
        numbers = self.proj_dim * (network.in_features + 1) + network.out_features
        numbers += cells.n_rows if self.bits < 32 else 0
        after = 4 * numbers + cells.n_rows * cells.n_codes * network.out_features * self.bits // 8
        return "" if after < before else f"a sketch of {after} bytes would not be smaller than its {before} bytes"

    def _sketched(
        self, network: Network, rows: Tensor, draw: np.random.Generator
    ) -> tuple[SketchLayer, dict[str, Scalar]]:
        """Distil, count, tune; return the layer and what is known of its error."""
        order = torch.from_numpy(draw.permutation(len(rows)))
        kept = min(_MOST_HELD_OUT, round(_HELD_OUT * len(rows)))
        held_out, train = rows[order[:kept]], rows[order[kept:]]
        wanted, judged = network.answers(train), network.answers(held_out)
        machine = train_machine(train, wanted, self.settings, draw)
        cells = self.cells
        before = Projection.of(machine.projection.numpy(), machine.shift.numpy())
        table = tune_table(
            sketch_machine(machine, cells),
            train,
            wanted,
            before,
            cells,
            draw,
            epochs=self.finetune_epochs,
            batch_size=self.settings.batch_size,
            learning_rate=self.finetune_rate,
        )
        layer = SketchLayer.of(machine.projection, machine.shift, table, cells).to(network.device)
        details: dict[str, Scalar] = {
            "distilled_rows": len(train),
            "student_error": _relative(self._by_kernel(machine, held_out), judged),
            "sketch_error": _relative(torch.from_numpy(layer.predictor()(held_out.numpy())), judged),
            "sketch_bytes": unique_bytes(layer if self.bits == 32 else layer.rounded(self.bits)),
        }
        return layer, details

    def _by_kernel(self, machine: Machine, rows: Tensor) -> Tensor:
        return machine(rows, self.kernel, self.width, self.n_concat)


def _relative(got: Tensor, wanted: Tensor) -> float:
    """Return the error relative to the spread of what is wanted: 1 for a constant that guesses the mean."""
    spread = (wanted - wanted.mean(0)).norm()
    return float((got - wanted).norm() / spread.clamp_min(1e-30))
