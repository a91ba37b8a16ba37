"""What all token mixers share: (B, *S, C) in and out, a keep-mask, and for causal ones a state and single steps.

A mixer moves information between the tokens of a sample, channels last, S one to three spatial axes.  A subclass
writes ``_mix(x, mask)`` and, where it can go on from a state, ``init_state`` and ``_continue(x, state)``; checks,
``step``, ``config`` and ``param_groups`` follow from these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._module_tree import changed_modules, signature, swap_modules
from quernel._validate import check_int, check_type
from quernel.nn._described import check_config


class Mixer(nn.Module, ABC):
    """Base of the token mixers.

    Attributes
    ----------
    spatial_ndim : tuple of int
        How many spatial axes the input may have.
    causal : bool
        Whether a token's output depends on no later token.
    fixed_shape : tuple of int, optional
        The only spatial shape, of mixers that have one.
    max_len : int, optional
        The largest number of tokens, of mixers that have one.
    options : tuple of str
        Names of the constructor's arguments after ``dim``; each is kept under its name and written into ``config()``.
    """

    spatial_ndim: ClassVar[tuple[int, ...]] = (1, 2, 3)
    options: ClassVar[tuple[str, ...]] = ()
    causal: bool = False
    fixed_shape: tuple[int, ...] | None = None
    max_len: int | None = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, low=1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> Any:
        """Mix the tokens of every sample.

        Parameters
        ----------
        x : Tensor, shape (B, *S, C)
            Tokens of one sample, channels last.
        mask : Tensor, shape (B, *S), optional
            Bool, True where a token counts.  Others are read as zeros and left out of every mean and sum; what stands
            in their place in the output has no meaning.
        state : optional
            From ``init_state`` or an earlier call: x goes on where that ended.  Causal mixers only, S of one axis.

        Returns
        -------
        y : Tensor, shape (B, *S, C), or (y, state) if a state was given

        Raises
        ------
        QuernelError
            If x is not floating, the mask not bool, or the shapes do not fit.
        """
        self._check(x)
        if mask is not None and state is not None:
            raise QuernelError("mask cannot be given with state: a token that goes on from a state is always kept")
        given, x = x.dtype, widened(x, self)
        if mask is not None:
            mask = checked_mask(mask, x)
            x = x.masked_fill(~mask[..., None], 0.0)
        if 0 in x.shape[1:-1]:
            # Without tokens there is nothing to mix, and most operations refuse it.
            return x.to(given) if state is None else (x.to(given), state)
        if state is None:
            return self._mix(x, mask).to(given)
        self._check_recurrent()
        y, state = self._continue(x, state)
        return y.to(given), state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Return the state before the first token of ``batch`` streams."""
        raise self._no_recurrent_form()

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the output of one more token and the state after it; equals ``forward`` token by token.

        A stream may be longer than ``max_len``, which ``forward`` refuses: kernels then reach ``max_len`` tokens back.

        Parameters
        ----------
        x : Tensor, shape (B, C)
        state
            From ``init_state`` or the step before.
        """
        y, state = self(one_token(x, state), state=state)
        return y[:, 0], state

    @abstractmethod
    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the floating-point operations of a forward pass over (B, *S, C), additions and products alike."""

    def fuse(self) -> Self:
        """Return a module for inference that gives the same outputs; here the mixer itself."""
        return self

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return groups for an optimiser: here all parameters at ``lr``."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, and every inner layer that is not what the constructor made."""
        options = {name: getattr(self, name) for name in ("dim", *self.options)}
        with torch.device("meta"):
            made = signature(type(self)(**options))
        return {name: _plain(value) for name, value in options.items()} | {"replaced": changed_modules(self, made)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained mixer from ``config()``."""
        check_config(cls.__name__, config, ("dim", *cls.options, "replaced"))
        new = cls(**{name: config[name] for name in ("dim", *cls.options)})
        swap_modules(new, config["replaced"], file=cls.__name__)
        return new

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join([str(self.dim), *(f"{name}={getattr(self, name)!r}" for name in self.options)])

    @abstractmethod
    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, *S, C), (B, *S) -> (B, *S, C)
        """Mix all tokens; masked ones are zeros in x already."""

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # (B, T, C)
        """Go on from a state."""
        raise self._no_recurrent_form()

    def _check_recurrent(self) -> None:
        """Raise unless the mixer, with its options, can go on from a state."""
        if not self.causal:
            raise self._no_recurrent_form()

    def _state_device(self, device: torch.device | str | None) -> torch.device | str:
        """Return where a new state lies: where it was asked for, or where the parameters are."""
        return next(self.parameters()).device if device is None else device

    def _no_recurrent_form(self) -> QuernelError:
        why = "" if self.causal else ": it is not causal"
        return QuernelError(f"{type(self).__name__} has no recurrent form{why}")

    def _check(self, x: Tensor) -> None:
        """Raise unless x, (B, *S, C), is what ``forward`` takes."""
        if not check_type("x", x, Tensor).is_floating_point():
            raise QuernelError(f"x must hold real floating-point numbers; got {x.dtype}. Convert it, or take x.real")
        if x.ndim - 2 not in self.spatial_ndim or x.shape[-1] != self.dim:
            axes = " or ".join(map(str, self.spatial_ndim))
            first = x.ndim - 2 in self.spatial_ndim and x.shape[1] == self.dim
            raise QuernelError(
                f"x must have shape (B, *S, {self.dim}), channels last, with {axes} axes in S; got {tuple(x.shape)}"
                f"{'. Wrap the mixer in ChannelsFirst for (B, C, *S)' if first else ''}"
            )
        if self.fixed_shape is not None and tuple(x.shape[1:-1]) != self.fixed_shape:
            raise QuernelError(f"x must have the spatial shape {self.fixed_shape}; got {tuple(x.shape[1:-1])}")
        if self.max_len is not None and x.shape[1:-1].numel() > self.max_len:
            raise QuernelError(f"x must have at most {self.max_len} tokens; got {x.shape[1:-1].numel()}")


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:  # (B, *S), (B, *S, C)
    """Return the mask of the tokens of x that count, if it is one."""
    if check_type("mask", mask, Tensor).dtype is not torch.bool:
        raise QuernelError(
            f"mask must be bool, True where a token counts; got {mask.dtype}. Pass mask.bool() if it is 1 there, "
            "mask == 0 if it is added to scores"
        )
    if mask.shape != x.shape[:-1]:
        raise QuernelError(
            f"mask must have shape {tuple(x.shape[:-1])}, as x without channels; got {tuple(mask.shape)}"
        )
    return mask


def one_token(x: Tensor, state: Any) -> Tensor:  # (B, C) -> (B, 1, C)
    """Return one token a stream as sequences, if that is what x is and there is a state to go on from."""
    if check_type("x", x, Tensor).ndim != 2:
        raise QuernelError(f"x must have shape (B, C), one token a stream; got {tuple(x.shape)}")
    if state is None:
        raise QuernelError("state must come from init_state or the step before; got None")
    return x[:, None]


def widened(x: Tensor, module: nn.Module) -> Tensor:
    """Return x, from half precision in the dtype of the module's parameters."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x
    wanted = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return x.to(wanted)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
