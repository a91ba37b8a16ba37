"""The frame of a conformance suite: a list of named checks over a registered class."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError

Check = Callable[[type], None]

SUITES = {
    "cache": ".caches",
    "estimator": ".estimators",
    "index": ".indexes",
    "method": ".methods",
    "mixer": ".mixers",
    "model": ".modules",
    "module": ".modules",
    "sketch": ".sketches",
    "weight": ".weights",
}
# A whole model may need its inputs in the dtype of its parameters.
LEFT_OUT = {"model": ("low_precision",)}
# fp32 sums taken in another order differ by a few units in the last place of the largest term.
RTOL, ATOL = 1e-4, 1e-5


class ConformanceError(QuernelError):
    """A class breaks a promise of its contract."""


def checks_for(contract: str) -> dict[str, Check]:
    """Return the checks of a contract by name; empty where the contract has no suite."""
    if contract not in SUITES:
        return {}
    checks: dict[str, Check] = importlib.import_module(SUITES[contract], __package__).CHECKS
    return {name: check for name, check in checks.items() if name not in LEFT_OUT.get(contract, ())}


def run_all(cls: type, contract: str) -> None:
    """Run every check of a contract on a class."""
    for check in checks_for(contract).values():
        check(cls)


def require(condition: bool, cls: type, message: str) -> None:
    """Raise ``ConformanceError`` unless a promise holds."""
    if not condition:
        raise ConformanceError(f"{cls.__name__}: {message}")


def require_close(cls: type, what: str, got: Tensor, wanted: Tensor, *, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Raise unless two tensors agree in shape and, in float32, in value."""
    require(got.shape == wanted.shape, cls, f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    worst = float((got.float() - wanted.float()).abs().max()) if got.numel() else 0.0
    close = torch.allclose(got.float(), wanted.float(), rtol=rtol, atol=atol, equal_nan=True)
    require(close, cls, f"{what}: differs by up to {worst:.3g}")


def require_equal(cls: type, what: str, got: Tensor, wanted: Tensor) -> None:
    """Raise unless two tensors are bit-equal."""
    same = got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)
    require(same, cls, f"{what}: not bit-equal")


@contextmanager
def global_generators_untouched(cls: type, what: str) -> Iterator[None]:
    """Raise if the block draws from torch's or NumPy's global generator."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    yield
    same_torch = torch.equal(torch_state, torch.get_rng_state())
    now = np.random.get_state(legacy=False)  # noqa: NPY002
    same_numpy = numpy_state["state"]["pos"] == now["state"]["pos"] and np.array_equal(
        numpy_state["state"]["key"], now["state"]["key"]
    )
    require(same_torch and same_numpy, cls, f"{what} draws from a global random generator")


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator for example inputs."""
    return torch.Generator().manual_seed(seed)


def outputs(value: object) -> list[Tensor]:
    """Return the tensors in what a module returned."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in outputs(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in outputs(v)]
    return []
