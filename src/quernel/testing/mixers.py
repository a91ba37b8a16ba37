"""Conformance of token mixers: all that modules promise, and shapes, masks, causality, states and fusion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import example_of
from quernel.testing._modules_shared import made as made_module
from quernel.testing._modules_shared import run
from quernel.testing._suite import generator, require, require_close, run_all
from quernel.testing.modules import CHECKS as MODULE_CHECKS

# Spatial shapes tried for each rank: one token, primes, a long thin one.
SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (7,), (33,)),
    2: ((1, 1), (5, 7), (1, 6), (8, 8)),
    3: ((1, 1, 1), (2, 3, 5)),
}
# What a later token may add to the gradient of an earlier one, of the largest: round-off of an FFT in float32.
LEAK = 1e-6


def check_mixer(cls: type) -> None:
    """Run every check of the ``mixer`` contract.

    The registered ``example()`` is that of a module, its input one tensor (B, *S, C); ``"shapes": {rank: [S, ...]}``
    replaces the spatial shapes tried (sizes a mixer refuses, such as those below its window), ``"masks": False``
    withdraws the promise that a masked sequence gives what a shorter one does.
    """
    run_all(cls, "mixer")


def check_shapes(cls: type) -> None:
    """The output has the shape and dtype of the input, for every rank, size and layout that the mixer takes."""
    module, inputs = made(cls)
    for shape in _shapes(cls, module):
        x = torch.randn(2, *shape, inputs[0].shape[-1], generator=generator())
        (y,) = run(module, (x,))
        require(y.shape == x.shape and y.dtype == x.dtype, cls, f"{tuple(x.shape)} gives {tuple(y.shape)}, {y.dtype}")
        # The layout of an image that torch's convolutions made: channels first in memory.
        (other,) = run(module, (x.movedim(-1, 1).contiguous().movedim(1, -1),))
        require_close(cls, f"output for channels first in memory, {shape}", other, y)


def check_no_tokens(cls: type) -> None:
    """Samples without tokens give outputs without tokens, and leave a state as it was."""
    module, inputs = made(cls)
    if module.fixed_shape is not None:
        return
    x = inputs[0]
    for axis in range(1, x.ndim - 1):
        (y,) = run(module, (x.narrow(axis, 0, 0),))
        require(y.shape == x.narrow(axis, 0, 0).shape, cls, f"no tokens on axis {axis} give shape {tuple(y.shape)}")
    if type(module).init_state is not _base().init_state:
        with torch.no_grad():
            y, state = module(x[:, :0], state=module.init_state(len(x)))
            first, _ = module(x, state=state)
            wanted, _ = module(x, state=module.init_state(len(x)))
        require(y.shape == x[:, :0].shape, cls, f"no tokens after a state give shape {tuple(y.shape)}")
        require_close(cls, "output after no tokens", first, wanted)


def check_masks(cls: type) -> None:
    """Tokens masked at the end change nothing before them: the output is that of the shorter input."""
    module, inputs = made(cls)
    if module.fixed_shape is not None or not example_of(cls).get("masks", True):
        return
    x = inputs[0]
    for axis in range(1, x.ndim - 1):
        room = torch.full_like(x.narrow(axis, 0, 1), 1e4)
        if axis > 1 and module.causal:
            continue  # a causal mixer of several axes counts row by row: another width is another order
        longer = torch.cat([x, room, room], dim=axis)
        if module.max_len is not None and longer.shape[1:-1].numel() > module.max_len:
            continue
        mask = torch.ones(longer.shape[:-1], dtype=torch.bool)
        mask.narrow(axis, x.shape[axis], 2).fill_(False)
        with torch.no_grad():
            got = module(longer, mask=mask).narrow(axis, 0, x.shape[axis])
            wanted = module(x)
            require_close(cls, f"output beside masked tokens on axis {axis}", got, wanted)
            whole = module(x, mask=torch.ones(x.shape[:-1], dtype=torch.bool))
        require_close(cls, "output with a mask that keeps all", whole, wanted)


def check_causality(cls: type) -> None:
    """No gradient reaches a later token, where the mixer is causal; every earlier one may be reached."""
    module, inputs = made(cls)
    if not module.causal:
        return
    x = inputs[0][:1].clone().requires_grad_()
    y = module(x)
    flat, total = y.flatten(1, -2), x.shape[1:-1].numel()
    for t in range(total):
        (gradient,) = torch.autograd.grad(flat[:, t].sum(), x, retain_graph=True)
        size = gradient.flatten(1, -2).abs().amax(-1)[0]  # (N,)
        later = float(size[t + 1 :].max()) if t + 1 < total else 0.0
        require(later <= LEAK * float(size.max()), cls, f"output {t} depends on a later token by {later:.3g}")


def check_steps(cls: type) -> None:
    """Token by token, in pieces and at once give the same, where the mixer has a recurrent form."""
    module, inputs = made(cls)
    if type(module).init_state is _base().init_state:
        return
    x = inputs[0]
    with torch.no_grad():
        wanted = module(x)
        state, steps = module.init_state(len(x)), []
        for t in range(x.shape[1]):
            y, state = module.step(x[:, t], state)
            steps.append(y)
        require_close(cls, "output token by token", torch.stack(steps, 1), wanted)
        cut = max(x.shape[1] // 3, 1)
        first, state = module(x[:, :cut], state=module.init_state(len(x)))
        second, _ = module(x[:, cut:], state=state)
    require_close(cls, "output in two pieces", torch.cat([first, second], 1), wanted)


def check_parameters_count(cls: type) -> None:
    """After a change of its parameters, even one that torch does not count, and ``eval()``, a mixer is a new one."""
    module, inputs = made(cls)
    run(module, inputs)
    _first_step(module, inputs)
    for parameter in module.parameters():
        parameter.data.mul_(0.5)
    module.eval()
    twin = cls.from_config(module.config()).eval()  # type: ignore[attr-defined]
    twin.load_state_dict(module.state_dict())
    got, wanted = [*run(module, inputs), *_first_step(module, inputs)], [*run(twin, inputs), *_first_step(twin, inputs)]
    for y, want in zip(got, wanted, strict=True):
        require_close(cls, "output with other parameters", y, want)


def check_fuse(cls: type) -> None:
    """The fused module gives the same outputs and leaves the mixer as it was."""
    module, inputs = made(cls)
    _stir(module)
    before = copy.deepcopy(module.state_dict())
    wanted = run(module, inputs)
    for got, want in zip(run(module.fuse().eval(), inputs), wanted, strict=True):
        require_close(cls, "output of the fused module", got, want)
    after = module.state_dict()
    same = list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    require(same, cls, "fuse() changes the mixer")


def check_refusals(cls: type) -> None:
    """Integers, masks that are not bool and options that are neither True nor False raise, and say which it was."""
    module, inputs = made(cls)
    x = inputs[0]
    kept = torch.zeros(x.shape[:-1])
    _require_refused(cls, "x", "an x of integers", lambda: module(torch.ones_like(x, dtype=torch.int64)))
    _require_refused(cls, "mask", "a mask that is added to scores", lambda: module(x, mask=kept))
    _require_refused(cls, "mask", "a mask of integers", lambda: module(x, mask=kept.long()))
    options = {name: getattr(module, name) for name in ("dim", *cls.options)}  # type: ignore[attr-defined]
    for name, value in options.items():
        for flag in value if isinstance(value, tuple) else (value,):
            if isinstance(flag, bool):
                _require_refused(cls, name, f"{name}='no'", lambda name=name: cls(**options | {name: "no"}))  # type: ignore[misc]


def _require_refused(cls: type, name: str, what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except QuernelError as error:
        require(str(error).startswith(f"{name} "), cls, f"{what} is refused without naming {name!r} first: {error}")
        return
    require(False, cls, f"{what} is taken")


def check_groups(cls: type) -> None:
    """``param_groups`` holds every parameter once; ``flops`` is positive and grows with the batch."""
    module, inputs = made(cls)
    grouped = [id(p) for group in module.param_groups(1e-3) for p in group["params"]]
    require(sorted(grouped) == sorted(id(p) for p in module.parameters()), cls, "param_groups misses or repeats some")
    shape = tuple(inputs[0].shape)
    once, twice = module.flops(shape), module.flops((2 * shape[0], *shape[1:]))
    require(0 < once < twice <= 2 * once, cls, f"flops gives {once} for {shape} and {twice} for twice the batch")


def made(cls: type) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a fresh example in eval mode and its inputs."""
    return made_module(cls)


def _first_step(module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the output of one token from the first state, or nothing where there is no recurrent form."""
    if type(module).init_state is _base().init_state:
        return []
    with torch.no_grad():
        y, _ = module.step(inputs[0][:, 0], module.init_state(len(inputs[0])))
    return [y]


def _base() -> Any:
    from quernel.nn import Mixer

    return Mixer


def _stir(module: Any) -> None:
    """Give batch statistics values that a folding must not forget."""
    draw = generator(1)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=draw))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))


def _shapes(cls: type, module: Any) -> list[tuple[int, ...]]:
    if module.fixed_shape is not None:
        return [tuple(module.fixed_shape)]
    tried = SHAPES | example_of(cls).get("shapes", {})
    return [
        tuple(s)
        for rank in module.spatial_ndim
        for s in tried[rank]
        if module.max_len is None or torch.Size(s).numel() <= module.max_len
    ]


CHECKS = MODULE_CHECKS | {
    "shapes": check_shapes,
    "no_tokens": check_no_tokens,
    "masks": check_masks,
    "causality": check_causality,
    "steps": check_steps,
    "parameters_count": check_parameters_count,
    "fuse": check_fuse,
    "groups": check_groups,
    "refusals": check_refusals,
}
