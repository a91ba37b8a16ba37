"""Checks that modules and stored weights share: config and state round trips, saving, damaged files."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._io import CONFIG
from quernel._load import load, save_model
from quernel._registry import example_of
from quernel.nn.weights import StoredWeight
from quernel.testing._suite import generator, outputs, require, require_equal

MUTATIONS = 24


def made(cls: type) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a fresh example in eval mode and its inputs."""
    example = example_of(cls)
    return example["make"]().eval(), tuple(example["input"](generator()))


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs without gradients; a stored weight answers with ``matmul``."""
    call: Callable[..., Any] = module.matmul if isinstance(module, StoredWeight) else module
    with torch.no_grad():
        return outputs(call(*inputs))


def check_config_round_trip(cls: type) -> None:
    """``from_config(config())`` plus the state dict gives the same outputs, bit for bit; config is JSON."""
    module, inputs = made(cls)
    config = json.loads(json.dumps(module.config()))  # type: ignore[operator]
    twin = cls.from_config(config).eval()  # type: ignore[attr-defined]
    shapes = {k: (v.shape, v.dtype) for k, v in twin.state_dict().items()}
    wanted = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
    require(shapes == wanted, cls, f"from_config gives tensors {shapes}, the original has {wanted}")
    twin.load_state_dict(module.state_dict())
    require(json.loads(json.dumps(twin.config())) == config, cls, "config() changes over a round trip")
    for got, want in zip(run(twin, inputs), run(module, inputs), strict=True):
        require_equal(cls, "output after a config round trip", got, want)


def check_state_is_stable(cls: type) -> None:
    """The state dict has the same keys, shapes and values before and after an eval forward."""
    module, inputs = made(cls)
    before = copy.deepcopy(module.state_dict())
    run(module, inputs)
    after = module.state_dict()
    require(list(before) == list(after), cls, "forward changes the keys of the state dict")
    for key, value in before.items():
        require_equal(cls, f"state {key!r} after a forward", after[key], value)


def check_save_and_load(cls: type) -> None:
    """A saved model that holds the module comes back bit for bit."""
    module, inputs = made(cls)
    with tempfile.TemporaryDirectory() as folder:
        save_model(_holder(module), folder)
        twin = load(folder, model=lambda: _holder(nn.Identity()))[0]
    require(type(twin) is cls, cls, f"load returns a {type(twin).__name__}")
    for got, want in zip(run(twin, inputs), run(module, inputs), strict=True):
        require_equal(cls, "output after save and load", got, want)


def check_damaged_files(cls: type) -> None:
    """Truncated and altered files raise a Quernel error or, where harmless, change nothing."""
    module, inputs = made(cls)
    wanted = run(module, inputs)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(_holder(module), name)
        files = {file: file.read_bytes() for file in folder.iterdir()}
        for i in range(MUTATIONS):
            file = sorted(files)[i % len(files)]
            file.write_bytes(_mutated(files[file], i))
            _require_refused(cls, folder, file, inputs, wanted)
            file.write_bytes(files[file])
        (folder / CONFIG).unlink()
        _require_refused(cls, folder, folder / CONFIG, inputs, wanted)


def _require_refused(cls: type, folder: Path, file: Path, inputs: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    try:
        twin = load(folder, model=lambda: _holder(nn.Identity()))[0]
    except QuernelError:
        return
    same = all(torch.equal(a, b) for a, b in zip(run(twin, inputs), wanted, strict=True))
    require(same, cls, f"a damaged {file.name} loads silently with other numbers")


def _mutated(data: bytes, seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    if seed % 3 == 0:
        return data[: int(draw.integers(0, len(data)))]
    place = int(draw.integers(0, len(data)))
    return data[:place] + bytes([data[place] ^ int(draw.integers(1, 256))]) + data[place + 1 :]


def _holder(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(module)
