"""``to_onnx``: write a compressed model whose layers are plain torch as an ONNX file.

Low-rank, merged, factorised and pruned models, and codes that are decoded to floats, consist of torch's own
operations.  Layers that run Quernel's integer or sparse kernels have no ONNX counterpart and are refused by name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quernel._errors import MissingExtraError, QuernelError
from quernel._io import write_atomically
from quernel.nn._running import evaluating


def to_onnx(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> Path:
    """Export ``model`` to an ONNX file whose batch axis is free.

    Parameters
    ----------
    model : nn.Module
        Compressed or not.
    example_inputs : Tensor, tuple or mapping
        Arguments of one forward, tensors with a batch of at least two rows first.
    path : path
        File to write, ``.onnx`` by custom.

    Returns
    -------
    path : Path

    Raises
    ------
    QuernelError
        If a layer runs on a kernel of Quernel, or a tensor is bfloat16, which onnxruntime's CPU kernels do not take;
        the message names the first such layers.  Also if torch cannot export the model.
    MissingExtraError
        Without the extra ``onnx``.

    Examples
    --------
    >>> import torch, tempfile
    >>> from quernel.models import DigitsCNN
    >>> to_onnx(DigitsCNN(), (torch.zeros(2, 1, 8, 8),), tempfile.mkdtemp() + "/digits.onnx").suffix
    '.onnx'
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("quernel.compress.to_onnx", "onnx")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    arguments, named = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    batch = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.ndim else None

    shapes = (tuple(map(free, arguments)), {name: free(value) for name, value in named.items()})
    dynamic = (*shapes[0], *shapes[1].values())
    with evaluating(model), torch.no_grad(), _quiet():
        try:
            program = torch.export.export(model, tuple(arguments), named, dynamic_shapes=dynamic or None)
        except Exception as error:
            raise _failed("torch.export", model, error) from error
        _refuse_kernels(program)
        _refuse_bfloat16(model)
        try:
            exported: Any = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:
            raise _failed("torch.onnx.export", model, error) from error
    target = Path(path)
    write_atomically(target, exported.model_proto.SerializeToString())
    return target


def _failed(step: str, model: nn.Module, error: Exception) -> QuernelError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return QuernelError(
        f"{step} cannot take {type(model).__name__}: {first}. Check that example_inputs are arguments of one forward, "
        "with a batch of at least two rows, and that forward does not branch on values; torch's error is above"
    )


def _refuse_kernels(program: Any) -> None:
    """Raise if the graph calls an operation of Quernel, naming the layers."""
    layers: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("quernel."):
            stack = node.meta.get("nn_module_stack", {})
            place = list(stack.values())[-1][0] if stack else node.name
            layers[place.removeprefix("L['self'].")] = str(node.target).split(".")[1]
    if layers:
        shown = ", ".join(f"{layer} ({op})" for layer, op in list(layers.items())[:3])
        raise QuernelError(
            f"model has {len(layers)} layers on kernels of Quernel that ONNX has no operation for: {shown}. "
            "Serve it with torch (torch.export works), or compress with methods that leave plain torch: WeLore, "
            "FeatureMerging, FactorizeConv, WeightInt8"
        )


def _refuse_bfloat16(model: nn.Module) -> None:
    halves = [name for name, tensor in model.state_dict().items() if tensor.dtype is torch.bfloat16]
    if halves:
        raise QuernelError(
            f"model holds bfloat16 tensors ({', '.join(halves[:3])}), which onnxruntime's CPU kernels do not take; "
            "convert it with model.float() first, or leave Cast out of the methods"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of packages that are not there and of torch's own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(before)
