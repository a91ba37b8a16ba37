"""Checks that modules and stored weights share: config and state round trips, saving, damaged files."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quernel._errors import FormatError
from quernel._io import CONFIG, digest_of
from quernel._load import load, save_model
from quernel._registry import example_of
from quernel.nn.weights import StoredWeight
from quernel.testing._suite import generator, outputs, require, require_equal

MUTATIONS = 24
# A model takes tens of milliseconds to build, a module one.
FORGED_FIELDS, FORGED_FIELDS_OF_MODEL = 24, 6


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
        twin = _loaded(cls, save_model(_holder(cls, module), folder))
    require(type(twin) is cls, cls, f"load returns a {type(twin).__name__}")
    for got, want in zip(run(twin, inputs), run(module, inputs), strict=True):
        require_equal(cls, "output after save and load", got, want)


def check_damaged_files(cls: type) -> None:
    """Truncated and altered files raise a Quernel error or, where harmless, change nothing."""
    module, inputs = made(cls)
    wanted = run(module, inputs)
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(_holder(cls, module), name)
        for change in damages(folder, FORGED_FIELDS_OF_MODEL if _is_model(cls) else FORGED_FIELDS):
            _require_refused(cls, folder, change, inputs, wanted)


def _require_refused(cls: type, folder: Path, change: str, inputs: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    try:
        twin = _loaded(cls, folder)
    except FormatError as error:
        require(str(folder) in str(error), cls, f"{change} is refused without naming the file: {error}")
        return
    got = run(twin, inputs)
    same = len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    require(same, cls, f"{change} loads silently with other numbers")


def damages(folder: Path, fields: int) -> Iterator[str]:
    """Damage a saved folder in one way after another, each from the whole one, and say how."""
    files = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for i in range(MUTATIONS):
        file = sorted(files)[i % len(files)]
        file.write_bytes(mutated(files[file], i))
        yield f"a damaged {file.name}"
        file.write_bytes(files[file])
    for change, document in forged(json.loads(files[folder / CONFIG]), fields):
        (folder / CONFIG).write_text(json.dumps(document), encoding="utf-8")
        yield change
    (folder / CONFIG).unlink()
    yield f"a missing {CONFIG}"


def mutated(data: bytes, seed: int) -> bytes:
    """Return the bytes cut short, or with one byte changed."""
    draw = np.random.default_rng(seed)
    if seed % 3 == 0:
        return data[: int(draw.integers(0, len(data)))]
    place = int(draw.integers(0, len(data)))
    return data[:place] + bytes([data[place] ^ int(draw.integers(1, 256))]) + data[place + 1 :]


def forged(document: dict[str, Any], fields: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield documents with one field changed and a digest that matches: what no checksum can catch."""
    paths = [path for path in _paths(document["quernel"]) if path[0] != "digest" and "extra" not in path]
    draw = np.random.default_rng(0)
    # Every field once would take seconds for a model with a long config.
    chosen = sorted(draw.permutation(len(paths))[:fields])
    for path in (paths[i] for i in chosen):
        for word, replace in _FORGERIES.items():
            forged = copy.deepcopy(document)
            holder = forged["quernel"]
            for step in path[:-1]:
                holder = holder[step]
            if not replace(holder, path[-1]):
                continue
            subtree = forged["quernel"]
            subtree["digest"] = digest_of({k: v for k, v in subtree.items() if k != "digest"})
            yield f"{word} field {'.'.join(map(str, path))} with a matching digest", forged


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (step,)
        yield from ((step, *rest) for rest in _paths(inner))


def _mistyped(holder: Any, step: Any) -> bool:
    holder[step] = [{"x": 1}]
    return True


def _missing(holder: Any, step: Any) -> bool:
    del holder[step]
    return True


def _renamed(holder: Any, step: Any) -> bool:
    # A number in place of a name is a wrong type; another class is a wrong name.
    if step != "class":
        return False
    holder[step] = "Catalogue"
    return True


def _resized(holder: Any, step: Any) -> bool:
    # Only sizes: another stride is another model, as valid as the first.
    if step not in _SIZES or not isinstance(holder[step], int):
        return False
    holder[step] += 1
    return True


_SIZES = ("in_features", "out_features", "n_features", "rank", "embed_dim", "channels")
_FORGERIES: dict[str, Callable[[Any, Any], bool]] = {
    "mistyped": _mistyped,
    "missing": _missing,
    "renamed": _renamed,
    "resized": _resized,
}


def _is_model(cls: type) -> bool:
    return cls.__dict__.get("_quernel_contract") == "model"


def _holder(cls: type, module: nn.Module) -> nn.Module:
    # A model is saved by itself, anything else within the model that it was put into.
    return module if _is_model(cls) else nn.Sequential(module)


def _loaded(cls: type, folder: Path) -> nn.Module:
    return load(folder) if _is_model(cls) else load(folder, model=lambda: nn.Sequential(nn.Identity()))[0]
