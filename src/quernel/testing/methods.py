"""Conformance of compression methods: plans change nothing, results are real, repeatable and savable."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._load import load
from quernel._registry import example_of
from quernel.compress import Context, Method, Result, compress
from quernel.compress._method import method_from_description
from quernel.nn.weights import unique_bytes
from quernel.testing._suite import global_generators_untouched, require, require_close, require_equal, run_all


def check_method(cls: type) -> None:
    """Run every check of the ``method`` contract.

    The registered ``example()`` returns ``{"method": instance, "model": () -> nn.Module in eval mode,
    "data": list of batches, "example_inputs": tuple}``; ``"compile": False`` or ``"export": False`` withdraw
    those promises of the compressed model.
    """
    run_all(cls, "method")


def check_description(cls: type) -> None:
    """The method is a frozen, hashable value that JSON carries without loss."""
    method = _example(cls)["method"]
    require(isinstance(method, Method), cls, "is not a Method")
    field = dataclasses.fields(method)[0].name if dataclasses.fields(method) else None
    if field is not None:
        try:
            setattr(method, field, None)
            require(False, cls, f"field {field!r} can be set; declare @dataclass(frozen=True)")
        except dataclasses.FrozenInstanceError:
            pass
    twin = method_from_description(json.loads(json.dumps(method.describe())))
    require(twin == method and hash(twin) == hash(method), cls, "differs after a JSON round trip")
    for choice in type(method).menu():
        require(isinstance(choice, Method), cls, f"menu() holds {choice!r}")


def check_plan_is_pure(cls: type) -> None:
    """``plan`` changes no tensor and no module, draws from no global generator, and names real modules."""
    example = _example(cls)
    model = example["model"]()
    before = copy.deepcopy(model)
    with global_generators_untouched(cls, "plan"):
        plan = example["method"].plan(model, Context(example["data"], example["example_inputs"]))
    _require_same_model(cls, "plan", model, before)
    names = {name for name, _ in model.named_modules()}
    for layer in plan.layers:
        require(layer.name in names, cls, f"the plan names {layer.name!r}, which is no module")
        told = bool(layer.reason) or layer.action != "skip"
        require(told, cls, f"{layer.name} is skipped without a reason")


def check_result(cls: type) -> None:
    """The original is unharmed, outputs keep shape and are finite, reported bytes are stored bytes."""
    example = _example(cls)
    model = example["model"]()
    before = copy.deepcopy(model)
    with global_generators_untouched(cls, "compress"):
        result = _compress(cls, model)
    _require_same_model(cls, "compress", model, before)
    y, reference = _run(result.model, example), _run(model, example)
    require(y.shape == reference.shape, cls, f"output shape {tuple(y.shape)} instead of {tuple(reference.shape)}")
    require(bool(y.isfinite().all()), cls, "output is not finite")
    require(result.report.bytes_after == unique_bytes(result.model), cls, "report.bytes_after is not what is stored")
    require(result.report.bytes_after < result.report.bytes_before, cls, "the example saves no bytes")
    require(result.model.training == model.training, cls, "train/eval mode is lost")
    errors = [layer.relative_error for layer in result.report.layers]
    require(all(e is None or e >= 0 for e in errors), cls, f"relative errors {errors}")


def check_repeatable(cls: type) -> None:
    """The same call gives the same tensors, bit for bit."""
    model = _example(cls)["model"]()
    first, second = (_compress(cls, model).model for _ in range(2))
    _require_same_model(cls, "a second run", second, first)


def check_save_and_load(cls: type) -> None:
    """A saved result loads into the uncompressed architecture and computes the same, bit for bit."""
    example = _example(cls)
    result = _compress(cls, example["model"]())
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        twin = load(folder, model=example["model"])
    require_equal(cls, "output after save and load", _run(twin, example), _run(result.model, example))
    require(unique_bytes(twin) == unique_bytes(result.model), cls, "the loaded model stores other bytes")


def check_dry_run(cls: type) -> None:
    """``dry_run`` returns the original itself and a report of what each layer would get."""
    example = _example(cls)
    model = example["model"]()
    before = copy.deepcopy(model)
    options = {"data": example["data"], "example_inputs": example["example_inputs"]}
    result = compress(model, example["method"], dry_run=True, **options)
    require(result.model is model, cls, "dry_run returns another model")
    _require_same_model(cls, "dry_run", model, before)
    require(bool(result.report.layers), cls, "dry_run reports no layer")


def check_inplace(cls: type) -> None:
    """``inplace=True`` edits the very object, to the same tensors."""
    example = _example(cls)
    model = example["model"]()
    options = {"data": example["data"], "example_inputs": example["example_inputs"]}
    wanted = _compress(cls, model).model
    result = compress(model, example["method"], inplace=True, **options)
    require(result.model is model, cls, "inplace=True returns another model")
    _require_same_model(cls, "inplace", model, wanted)


def check_compile(cls: type) -> None:
    """``torch.compile`` and ``torch.export`` take the result and give the same outputs, where promised."""
    example = _example(cls)
    model = _compress(cls, example["model"]()).model
    wanted = _run(model, example)
    if example.get("compile", True):
        compiled: Any = torch.compile(model, backend="aot_eager")
        require_close(cls, "compiled output", _run(compiled, example), wanted)
        torch.compiler.reset()
    if example.get("export", True):
        with torch.no_grad():
            program = torch.export.export(model, tuple(example["example_inputs"]), strict=False).module()
        require_close(cls, "exported output", _run(program, example), wanted)


def check_refusals(cls: type) -> None:
    """Missing needs, empty data, wrong models and empty selections raise a Quernel error that says so."""
    example = _example(cls)
    method, model, inputs = example["method"], example["model"](), example["example_inputs"]
    options = {"data": example["data"], "include": ("no.such.module",)}
    _require_error(cls, "an empty selection", "nothing", model, method, **options)
    _require_error(cls, "a model that is no module", "model", "model", method)
    if "data" in method.needs:
        _require_error(cls, "missing data", "data", model, method, example_inputs=inputs)
        _require_error(cls, "empty data", "empty", model, method, data=[])
    if "graph" in method.needs:
        _require_error(cls, "missing inputs", "example_inputs", model, method)


def _example(cls: type) -> dict[str, Any]:
    example: dict[str, Any] = example_of(cls)
    return example


def _compress(cls: type, model: nn.Module) -> Result:
    example = _example(cls)
    return compress(model, example["method"], data=example["data"], example_inputs=example["example_inputs"])


def _run(model: nn.Module, example: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(*example["example_inputs"])
    return y


def _require_same_model(cls: type, what: str, got: nn.Module, wanted: nn.Module) -> None:
    kinds = [(n, type(m).__name__) for n, m in got.named_modules()]
    require(kinds == [(n, type(m).__name__) for n, m in wanted.named_modules()], cls, f"{what}: modules differ")
    state = wanted.state_dict()
    for name, tensor in got.state_dict().items():
        require_equal(cls, f"{what}: tensor {name!r}", tensor, state[name])


def _require_error(cls: type, what: str, word: str, model: Any, method: Method, **options: Any) -> None:
    try:
        compress(model, method, **options)
    except QuernelError as error:
        require(word in str(error), cls, f"{what}: the error does not mention {word!r}: {error}")
        return
    require(False, cls, f"{what} raises no QuernelError")


CHECKS = {
    "description": check_description,
    "plan_is_pure": check_plan_is_pure,
    "result": check_result,
    "repeatable": check_repeatable,
    "save_and_load": check_save_and_load,
    "dry_run": check_dry_run,
    "inplace": check_inplace,
    "compile": check_compile,
    "refusals": check_refusals,
}
