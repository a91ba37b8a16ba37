"""Conformance of modules: numbers independent of batch, layout, threads and processes; state that lasts."""

from __future__ import annotations

import copy
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import example_of
from quernel._timing import threads
from quernel.testing._modules_shared import (
    check_config_round_trip,
    check_damaged_files,
    check_save_and_load,
    check_state_is_stable,
    made,
    run,
)
from quernel.testing._suite import (
    global_generators_untouched,
    outputs,
    require,
    require_close,
    require_equal,
    run_all,
)

FORK_SECONDS = 30
# Threads of earlier checks may still be ending, inside a lock of MKL that a child forked now would find held for ever.
SETTLE_SECONDS = 0.2


def check_module(cls: type) -> None:
    """Run every check of the ``module`` contract.

    The registered ``example()`` returns ``{"make": () -> module, "input": (generator) -> tuple of tensors}``,
    batch first; ``"compile": False``, ``"export": False`` or ``"batch_independent": False`` withdraw those
    promises, and ``"keeps_dtype": False`` says that the output dtype is the stored one.
    """
    run_all(cls, "module")


def check_outputs(cls: type) -> None:
    """Outputs are finite, keep the input's dtype, and leave inputs unchanged; non-contiguous inputs give the same."""
    example = example_of(cls)
    module, inputs = made(cls)
    copies = [x.clone() for x in inputs]
    wanted = run(module, inputs)
    for got, copied in zip(inputs, copies, strict=True):
        require_equal(cls, "input after forward", got, copied)
    for y in wanted:
        require(bool(y.isfinite().all()), cls, "output is not finite")
        if example.get("keeps_dtype", True) and inputs[0].is_floating_point():
            require(y.dtype == inputs[0].dtype, cls, f"output is {y.dtype} for an input of {inputs[0].dtype}")
    spread = tuple(torch.stack([x, x], dim=-1)[..., 0] for x in inputs)
    for got, want in zip(run(module, spread), wanted, strict=True):
        require_close(cls, "output for a non-contiguous input", got, want)


def check_low_precision(cls: type) -> None:
    """bfloat16 inputs are accepted, finite, and near the float32 outputs."""
    module, inputs = made(cls)
    if not inputs[0].is_floating_point():
        return
    wanted = run(module, inputs)
    halves = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    for got, want in zip(run(module, halves), wanted, strict=True):
        # 8 bits of mantissa on inputs and on every partial sum.
        require_close(cls, "bfloat16 output", got, want, rtol=0.1, atol=0.05 * float(want.float().abs().max()) + 1e-3)


def check_batch_independence(cls: type) -> None:
    """A row's output does not depend on the rows beside it; an empty batch gives an empty output."""
    module, inputs = made(cls)
    wanted = run(module, inputs)
    if not example_of(cls).get("batch_independent", True):
        return
    for i in range(inputs[0].shape[0]):
        for got, want in zip(run(module, tuple(x[i : i + 1] for x in inputs)), wanted, strict=True):
            require_close(cls, f"output of row {i} alone", got[0], want[i])
    for got, want in zip(run(module, tuple(x[:0] for x in inputs)), wanted, strict=True):
        require(tuple(got.shape) == (0, *want.shape[1:]), cls, f"an empty batch gives shape {tuple(got.shape)}")


def check_determinism(cls: type) -> None:
    """Eval forwards draw nothing, repeat bit for bit, and agree over thread counts and Python threads."""
    module, inputs = made(cls)
    with global_generators_untouched(cls, "eval forward"):
        wanted = run(module, inputs)
        for got, want in zip(run(module, inputs), wanted, strict=True):
            require_equal(cls, "second forward", got, want)
    with threads(1):
        for got, want in zip(run(module, inputs), wanted, strict=True):
            require_close(cls, "output on one thread", got, want)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(module, inputs), range(8)):
            for got, want in zip(result, wanted, strict=True):
                require_close(cls, "output from a Python thread", got, want)


def check_fork(cls: type) -> None:
    """A forked child computes the same, with torch on one thread as a fork demands of torch."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    module, inputs = made(cls)
    wanted = run(module, inputs)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(module, inputs, sender))
    time.sleep(SETTLE_SECONDS)
    child.start()
    try:
        require(receiver.poll(FORK_SECONDS), cls, f"a forked child gave no output within {FORK_SECONDS} s")
        for got, want in zip(receiver.recv(), wanted, strict=True):
            require_close(cls, "output of a forked child", torch.tensor(got).reshape(want.shape), want)
    finally:
        child.kill()
        child.join()


def check_gradients(cls: type) -> None:
    """Where parameters train, backward reaches each with a finite gradient."""
    module, inputs = made(cls)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trained or not example_of(cls).get("trains", True):
        return
    module.train()
    leaves = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    total = sum(y.float().square().sum() for y in outputs(module(*leaves)))
    require(isinstance(total, Tensor) and total.requires_grad, cls, "parameters want gradients but the output has none")
    total.backward()  # type: ignore[union-attr]
    for name, parameter in trained.items():
        require(parameter.grad is not None, cls, f"parameter {name!r} gets no gradient")
        require(bool(parameter.grad.isfinite().all()), cls, f"the gradient of {name!r} is not finite")  # type: ignore[union-attr]


def check_copy(cls: type) -> None:
    """A deep copy computes the same and shares nothing."""
    module, inputs = made(cls)
    twin = copy.deepcopy(module)
    wanted = run(module, inputs)
    for tensor in module.state_dict().values():
        tensor.zero_()
    for got, want in zip(run(twin, inputs), wanted, strict=True):
        require_equal(cls, "output of a deep copy", got, want)


def check_bad_input(cls: type) -> None:
    """An input with one feature too many, or an id out of range, raises instead of giving numbers."""
    module, inputs = made(cls)
    x = inputs[0]
    if x.is_floating_point():
        images = x.ndim == 4 and cls.__dict__.get("_quernel_contract") != "mixer"
        axis = example_of(cls).get("feature_axis", 1 if images else -1)
        wrong = torch.cat([x, x.narrow(axis, 0, 1)], dim=axis)
    else:
        wrong = torch.full_like(x, torch.iinfo(x.dtype).max // 2)
    try:
        run(module, (wrong, *inputs[1:]))
    except (QuernelError, RuntimeError, IndexError, ValueError):
        return
    require(False, cls, f"accepts an input of shape {tuple(wrong.shape)} that cannot be right")


def check_compile(cls: type) -> None:
    """``torch.compile(fullgraph=True)`` and ``torch.export`` give the same outputs, where promised."""
    example = example_of(cls)
    module, inputs = made(cls)
    wanted = run(module, inputs)
    if example.get("compile", True):
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        for got, want in zip(run(compiled, inputs), wanted, strict=True):
            require_close(cls, "compiled output", got, want)
        torch.compiler.reset()
    if example.get("export", True):
        with torch.no_grad():
            program = torch.export.export(module, inputs, strict=False).module()
        for got, want in zip(run(program, inputs), wanted, strict=True):
            require_close(cls, "exported output", got, want)


def _child(module: nn.Module, inputs: tuple[Tensor, ...], sender: Any) -> None:
    torch.set_num_threads(1)
    # Plain lists: torch's own tensor pickling would open shared memory.
    sender.send([y.float().flatten().tolist() for y in run(module, inputs)])


CHECKS = {
    "outputs": check_outputs,
    "low_precision": check_low_precision,
    "batch_independence": check_batch_independence,
    "determinism": check_determinism,
    "fork": check_fork,
    "gradients": check_gradients,
    "copy": check_copy,
    "bad_input": check_bad_input,
    "compile": check_compile,
    "config_round_trip": check_config_round_trip,
    "state_is_stable": check_state_is_stable,
    "save_and_load": check_save_and_load,
    "damaged_files": check_damaged_files,
}
