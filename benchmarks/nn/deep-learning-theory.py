"""Critical initialisation and advice: the time they take against loops over torch.nn.init, and against their limits.

Networks are 50 linear layers with GELU between them. Ours reads the model, finds the activation and draws; the loops
are told which layers to fill. A limit is a peer that waits as long as it allows.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from benchmarks._runner import Case
from quernel.kernels.theory import criticality
from quernel.kernels.theory.activations import _of_module
from quernel.kernels.theory.critical_points import _found
from quernel.nn import ArchitectureAdvisor, critical_init_

DEPTH, OUTPUTS = 50, 10
INIT_LIMIT_MS, ADVICE_LIMIT_MS = 50.0, 500.0
NORMALS_A_SECOND = 3e8  # float32 normals of torch's own generator, a core


def deep(width: int) -> SimpleNamespace:
    sizes = [width] * DEPTH + [OUTPUTS]
    layers: list[nn.Module] = []
    for i in range(DEPTH):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.GELU()]
    net = nn.Sequential(*layers[:-1])
    return SimpleNamespace(net=net, linear=net[::2], weights=sum(p.numel() for p in net.parameters()))


def variances_are_critical(s: SimpleNamespace) -> None:
    critical_init_(s.net)
    point = criticality("gelu")
    for layer in s.linear[1:-1]:
        found = float(layer.weight.detach().var()) * layer.in_features
        if abs(found / point.C_W - 1) > 0.1:
            raise ValueError(f"C_W is {found:.3f} instead of {point.C_W:.3f}")


def kaiming(s: SimpleNamespace) -> None:
    for layer in s.linear:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


def xavier(s: SimpleNamespace) -> None:
    for layer in s.linear:
        nn.init.xavier_normal_(layer.weight, gain=5 / 3)
        nn.init.zeros_(layer.bias)


def default(s: SimpleNamespace) -> None:
    for layer in s.linear:
        layer.reset_parameters()


def wait(limit_ms: float, s: SimpleNamespace) -> None:
    end = time.perf_counter() + limit_ms * 1e-3
    while time.perf_counter() < end:
        pass


def advise(s: SimpleNamespace) -> dict[str, Any]:
    return ArchitectureAdvisor.diagnose(s.net).to_dict()


def advise_afresh(s: SimpleNamespace) -> dict[str, Any]:
    """As in a new process: nothing is known of the activation yet."""
    _of_module.cache_clear()
    _found.cache_clear()
    return advise(s)


def advice_is_that_of_the_activation(s: SimpleNamespace) -> bool:
    found = advise(s)
    return found["depth"] == DEPTH and abs(found["K_star"] - criticality("gelu").K_star) < 1e-9


CASES = [
    *(
        Case(
            name=f"initialise 50 layers of width {width}",
            setup=partial(deep, width),
            ours=lambda s: critical_init_(s.net),
            peers={
                "kaiming_normal_": kaiming,
                "xavier_normal_": xavier,
                "reset_parameters": default,
                **({f"{INIT_LIMIT_MS:.0f} ms": partial(wait, INIT_LIMIT_MS)} if width == 128 else {}),
            },
            gate=variances_are_critical,
            target={f"{INIT_LIMIT_MS:.0f} ms": 1.0} if width == 128 else {},
            bound_ms=lambda s, threads: s.weights / NORMALS_A_SECOND * 1e3,
            bound="normal numbers at 300 million a second",
            threads=(1,),
        )
        for width in (128, 512)
    ),
    *(
        Case(
            name=f"advice on a model of 50 layers, {what}",
            setup=partial(deep, 128),
            ours=ours,
            peers={f"{ADVICE_LIMIT_MS:.0f} ms": partial(wait, ADVICE_LIMIT_MS)},
            gate=advice_is_that_of_the_activation,
            target={f"{ADVICE_LIMIT_MS:.0f} ms": 1.0},
            threads=(1,),
        )
        for what, ours in (("activation known", advise), ("activation new", advise_afresh))
    ),
]
