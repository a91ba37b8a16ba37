"""SNNK: a layer over random features against the linear layer it replaces, and closed-form fitting against Adam.

Layers are 1024 x 1024 with m = d l / (4 (d + l)) = 128 features: a quarter of the multiply-adds, so 4 is the ideal.
The bfloat16 and int8 forms of the original layer are shown beside, because they are what a user of this processor
would try first; so is a low-rank layer of as many numbers.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._machine import FLOAT32_OPS, L3_BYTES
from benchmarks._runner import Case
from quernel._load import save_model
from quernel.kernels.features import gaussian_directions, hadamard_directions, hadamard_projection
from quernel.nn import CrossQuantLinear, LowRankLinear, SNNKLinear

SIZE = 1024
FEATURES = SIZE * SIZE // (4 * (SIZE + SIZE))
ROWS, EPOCHS, BATCH = 16384, 3, 64
# Two float32 products of 1024 and 128 terms against the same in float64.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def layers(rows: int, projection: str = "orthogonal") -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(SIZE, SIZE)
    with torch.no_grad():
        linear.weight.normal_(std=SIZE**-0.5, generator=generator)
    x = torch.randn(rows, SIZE, generator=generator)
    ours = SNNKLinear(SIZE, SIZE, FEATURES, projection=projection, generator=generator)  # type: ignore[arg-type]
    half = copy.deepcopy(linear).bfloat16()
    return SimpleNamespace(
        x=x,
        x_half=x.bfloat16(),
        linear=linear,
        half=half,
        int8=CrossQuantLinear.from_linear(linear, x.abs().amax(0), activation="gelu"),
        thin=LowRankLinear.from_linear(linear, FEATURES),
        ours=ours,
        ours_half=copy.deepcopy(ours).bfloat16(),
    )


def rows_of(phi: nn.Module) -> Tensor:
    """Return G / sqrt(m) as a matrix."""
    return phi.project(torch.eye(SIZE, dtype=torch.float64)).mT


@torch.no_grad()
def follows_the_definition(s: SimpleNamespace) -> None:
    phi = (s.x.double() @ rows_of(s.ours.phi).mT).clamp_min(0)
    wanted = phi @ s.ours.weight.double().mT + s.ours.bias.double()
    torch.testing.assert_close(s.ours(s.x).double(), wanted, **TOLERANCE)
    bytes_are_the_formulas(s.ours)


def bytes_are_the_formulas(layer: SNNKLinear) -> None:
    """Trained numbers, optimiser state and checkpoint of a dense-direction layer follow from its sizes."""
    numbers = FEATURES * SIZE + SIZE
    fixed = FEATURES * SIZE + FEATURES if not layer.phi.structured else 2 * FEATURES
    signs = 3 * SIZE if layer.phi.structured else 0
    twin = copy.deepcopy(layer)
    with torch.enable_grad():
        twin(torch.ones(1, SIZE)).sum().backward()
    optimizer = torch.optim.AdamW(twin.parameters())
    optimizer.step()
    state = sum(t.nbytes for held in optimizer.state.values() for t in held.values() if t.ndim)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(nn.Sequential(layer), name)
        file = next(Path(folder).glob("*.safetensors")).read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    wanted = (numbers, 8 * numbers, 4 * (numbers + fixed) + signs)
    got = (sum(p.numel() for p in layer.parameters()), state, len(file) - header)
    if got != wanted:
        raise ValueError(f"trained numbers, optimiser bytes, checkpoint bytes are {got}, by formula {wanted}")


def layer_bound(rows: int, state: SimpleNamespace, threads: int) -> float:
    products = 2 * SIZE * FEATURES
    return max(2 * rows * products / FLOAT32_OPS, 4 * products / L3_BYTES) / threads * 1e3


def run(what: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        if what == "linear":
            return F.gelu(s.linear(s.x))
        if what == "half":
            return F.gelu(s.half(s.x_half))
        if what == "thin":
            return F.gelu(s.thin(s.x))
        return getattr(s, what)(s.x_half if what == "ours_half" else s.x)


def distillation() -> SimpleNamespace:
    """Return a layer to distil: inputs, the targets of a linear layer with GELU, and a layer to fit."""
    s = layers(ROWS)
    with torch.no_grad():
        y = F.gelu(s.linear(s.x))
    return SimpleNamespace(x=s.x, y=y, layer=s.ours, start=copy.deepcopy(s.ours), rate=3e-3)


def closed_form(s: SimpleNamespace) -> SNNKLinear:
    s.layer.fit([(s.x, s.y)])
    return s.layer


def by_adam(s: SimpleNamespace) -> SNNKLinear:
    layer = copy.deepcopy(s.start)
    optimizer = torch.optim.Adam(layer.parameters(), lr=s.rate, fused=True)
    for _ in range(EPOCHS):
        for x, y in zip(s.x.split(BATCH), s.y.split(BATCH), strict=True):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
    return layer


def closed_form_is_at_least_as_good(s: SimpleNamespace) -> None:
    with torch.no_grad():
        ours = float((closed_form(s)(s.x) - s.y).square().mean())
        peers = {}
        for rate in (1e-3, 3e-3, 1e-2):
            s.rate = rate
            with torch.enable_grad():
                trained = by_adam(s)
            peers[rate] = float((trained(s.x) - s.y).square().mean())
    s.rate = min(peers, key=lambda rate: peers[rate])
    if ours > peers[s.rate]:
        raise ValueError(f"training error {ours:.4g} in closed form, {peers[s.rate]:.4g} by Adam")


def projections(m: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    rows = hadamard_directions(m, SIZE, 0)
    return SimpleNamespace(
        x=torch.randn(512, SIZE, generator=generator),
        signs=torch.from_numpy(rows.signs),
        lengths=torch.from_numpy(rows.lengths).float(),
        dense=torch.from_numpy(gaussian_directions(m, SIZE, 0)).float(),
    )


def structured(s: SimpleNamespace) -> Tensor:
    return hadamard_projection(s.x, s.signs, s.lengths)


def same_as_its_rows(s: SimpleNamespace) -> None:
    matrix = hadamard_projection(torch.eye(SIZE, dtype=torch.float64), s.signs, s.lengths)
    torch.testing.assert_close(structured(s).double(), s.x.double() @ matrix, rtol=1e-3, atol=1e-3)


CASES = [
    *(
        Case(
            name=f"1024x1024 with GELU over 128 features, M={rows}",
            setup=partial(layers, rows),
            ours=partial(run, "ours"),
            peers={
                "fp32": partial(run, "linear"),
                "bf16": partial(run, "half"),
                "int8": partial(run, "int8"),
                "rank 128": partial(run, "thin"),
            },
            gate=follows_the_definition,
            target=target,
            bound_ms=partial(layer_bound, rows),
            bound="multiply-adds at 94 GFLOP/s or bytes at 97 GB/s a core",
        )
        for rows, target in ((1, {}), (32, {}), (512, {"fp32": 2.5}))
    ),
    Case(
        name="the same in bfloat16, M=512",
        setup=partial(layers, 512),
        ours=partial(run, "ours_half"),
        peers={"bf16": partial(run, "half")},
        gate=follows_the_definition,
    ),
    Case(
        name="the same with Hadamard directions, M=512",
        setup=partial(layers, 512, "hadamard"),
        ours=partial(run, "ours"),
        peers={"fp32": partial(run, "linear"), "bf16": partial(run, "half")},
        gate=follows_the_definition,
    ),
    Case(
        name=f"closed-form fit of the layer on {ROWS:,} rows",
        setup=distillation,
        ours=closed_form,
        peers={f"{EPOCHS} epochs of Adam": by_adam},
        gate=closed_form_is_at_least_as_good,
        target={f"{EPOCHS} epochs of Adam": 10.0},
        min_ms=100.0,
    ),
    *(
        Case(
            name=f"Hadamard projection of 512 rows, 1024 to {m}",
            setup=partial(projections, m),
            ours=structured,
            peers={"dense product": lambda s: s.x @ s.dense.mT},
            gate=same_as_its_rows,
        )
        for m in (256, 1024)
    ),
]
