"""``MultShiftMoE``: a linear layer with a multiplying and a shifting expert and a router (arXiv 2306.06446).

    y = p_e(x) E_e(x),   p = softmax(x G),   e = argmax p,

each token through one expert only.  ``aux_loss`` draws the shares of tokens towards the inverse of the experts'
latencies.  Cost: one product a token, two more columns for the router, and a sort of the tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel import _timing
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.nn._described import layer_config, layer_from_config
from quernel.nn._running import evaluating
from quernel.nn._stored import applied
from quernel.nn.functional.expert_balance import expert_balance_loss
from quernel.nn.linear.shift import ShiftLinear

EXPERTS = 2
# Tokens of one measurement of latency: an image of 16 x 16 patches.
TOKENS = 256
# Spread of the router's first weights: next to no preference, but no ties.
ROUTER_STD = 1e-2


class _Pending:
    """Losses of forward passes that nobody collected yet; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.stale = False

    def __deepcopy__(self, memo: Any) -> _Pending:
        return _Pending()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Pending, ()

    def clear(self) -> None:
        self.losses, self.stale = [], False


def _example() -> dict[str, Any]:
    def make() -> nn.Module:
        linear = nn.Linear(8, 6)
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(-2, 2, 48).reshape(6, 8).sin())
            linear.bias.copy_(torch.linspace(-1, 1, 6))
        return MultShiftMoE.from_linear(linear, latencies=(6, 4), generator=torch.Generator().manual_seed(0))

    return {"make": make, "input": lambda generator: (torch.randn(5, 3, 8, generator=generator),)}


@register(
    "shiftaddvit", pillar="nn", contract="module", paper="2306.06446", status="stable", headline=False, example=_example
)
class MultShiftMoE(nn.Module):
    """A linear layer that sends each token to a multiplying or to a shifting expert.

    Parameters
    ----------
    mult, shift : nn.Module
        The experts: linear layers of one size.
    latencies : pair of float
        Positive time of each expert a token; only their ratio counts.
    noise : float, default=0.5
        Standard deviation of what is added to the router's logits while training.
    balance : float, default=0.01
        Factor of the balance loss.
    gate : {"weighted", "hard"}, default="weighted"
        Multiply the output by the probability of its expert; or by 1, which leaves the router without a gradient of
        the task.
    generator : torch.Generator, optional
        For the router's first weights; default is torch's own.

    Attributes
    ----------
    aux_loss : Tensor, shape ()
        Balance loss of the training forward passes since it was last collected; see ``collect_aux_loss``.

    Raises
    ------
    QuernelError
        If the experts' sizes differ or a number is out of range.

    Notes
    -----
    Differs from the authors' code: outputs are multiplied by p and not shifted by log p; the load is computed from the
    logits that choose; importance counts all tokens; eval mode draws nothing.

    References
    ----------
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.

    Examples
    --------
    >>> import torch
    >>> mixture = MultShiftMoE.from_linear(torch.nn.Linear(16, 16), latencies=(6, 4))
    >>> mixture(torch.randn(8, 16)).shape, bool(collect_aux_loss(mixture) > 0)
    (torch.Size([8, 16]), True)
    """

    def __init__(
        self,
        mult: nn.Module,
        shift: nn.Module,
        latencies: Sequence[float],
        *,
        noise: float = 0.5,
        balance: float = 0.01,
        gate: Literal["weighted", "hard"] = "weighted",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [(getattr(e, "in_features", None), getattr(e, "out_features", None)) for e in (mult, shift)]
        if None in sizes[0] or sizes[0] != sizes[1]:
            raise QuernelError(f"mult and shift must be linear layers of one size; got (in, out) = {sizes}")
        self.in_features, self.out_features = (int(size) for size in sizes[0])  # type: ignore[arg-type]
        self.latencies = _checked_latencies(latencies)
        self.noise = check_float("noise", noise, low=0.0)
        self.balance = check_float("balance", balance, low=0.0)
        self.gate = check_choice("gate", gate, ("weighted", "hard"))
        self.mult, self.shift = mult, shift
        self.router = nn.Parameter(torch.empty(EXPERTS, self.in_features))
        nn.init.normal_(self.router, std=ROUTER_STD, generator=generator)
        self._pending = _Pending()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 5,
        latencies: Literal["measure"] | Sequence[float] = "measure",
        noise: float = 0.5,
        balance: float = 0.01,
        *,
        gate: Literal["weighted", "hard"] = "weighted",
        channel_scale: bool = True,
        rounding: Literal["log", "nearest"] = "log",
        tokens: int = TOKENS,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Build both experts from a trained layer, which is copied.

        Parameters
        ----------
        linear : nn.Linear
        bits : int, default=5
            Of the shifting expert, 3 to 6.
        latencies : "measure" or pair of float, default="measure"
            Of the multiplying and the (packed) shifting expert; measured here and now on ``tokens`` tokens.
        noise, balance, gate, generator
            As in the class.
        channel_scale, rounding
            As in ``ShiftLinear``.
        tokens : int, default=256
            Tokens of the measurement.

        Notes
        -----
        With ``gate="weighted"`` both experts start at twice the weight and bias, because an undecided router halves
        their outputs: the layer starts as the one that it replaces, up to the rounding of the shifting expert.
        """
        check_type("linear", linear, nn.Linear)
        mult = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        factor = EXPERTS if gate == "weighted" else 1
        for name, parameter in linear.named_parameters():
            trains = parameter.requires_grad
            setattr(mult, name, nn.Parameter(factor * parameter.detach(), requires_grad=trains))
        shift = ShiftLinear.from_linear(mult, bits, channel_scale=channel_scale, rounding=rounding)
        if isinstance(latencies, str):
            check_choice("latencies", latencies, ("measure",))
            latencies = measured_latencies(mult, shift, tokens)
        new = cls(mult, shift, latencies, noise=noise, balance=balance, gate=gate, generator=generator)
        return new.to(linear.weight.device).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Route each token to one expert."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise QuernelError(f"x must have shape (..., {self.in_features}); got {tuple(x.shape)}")
        tokens = x.reshape(-1, self.in_features)
        clean = tokens.to(self.router.dtype) @ self.router.T  # (T, experts)
        noisy = clean + self.noise * torch.randn_like(clean) if self.training and self.noise else clean
        weight, chosen = noisy.softmax(1).max(1)  # (T,) each
        order = chosen.argsort(stable=True)
        # As a number: int() would ask an exported graph for its value.
        first: Any = (chosen == 0).sum().item()
        torch._check(first >= 0)
        torch._check(first <= len(tokens))
        routed = tokens[order]
        experts = ((self.mult, routed[:first]), (self.shift, routed[first:]))
        parts = [applied(expert, part) for expert, part in experts]
        y = torch.cat(parts)[order.argsort()]
        if self.gate == "weighted":
            y = y * weight[:, None].to(y.dtype)
        if self.training:
            self._remember(clean, noisy, y)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def share(self, x: Tensor) -> Tensor:
        """Return the share of the tokens in ``x`` that each expert gets in eval mode, shape (2,)."""
        with torch.no_grad():
            chosen = (x.reshape(-1, self.in_features).to(self.router.dtype) @ self.router.T).argmax(1)
        return torch.bincount(chosen, minlength=EXPERTS) / max(1, len(chosen))

    @property
    def aux_loss(self) -> Tensor:
        """Balance loss of the training forward passes since the last collection; 0 if there was none."""
        return torch.stack(self._pending.losses).sum() if self._pending.losses else self.router.new_zeros(())

    def clear_aux_loss(self) -> None:
        """Drop what was not collected, and the graph behind it."""
        self._pending.clear()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; leaving training drops losses that were not collected."""
        if not mode:
            self.clear_aux_loss()
        return super().train(mode)

    def pack(self) -> Self:
        """Return the layer for inference, its shifting expert packed; the other parts are shared."""
        shift = self.shift.pack() if isinstance(self.shift, ShiftLinear) else self.shift
        options: dict[str, Any] = {name: getattr(self, name) for name in ("noise", "balance", "gate")}
        # A generator of its own: the router drawn here is replaced below.
        new = type(self)(self.mult, shift, self.latencies, **options, generator=torch.Generator())
        new.router = self.router
        return new.train(self.training)

    def _remember(self, clean: Tensor, noisy: Tensor, y: Tensor) -> None:
        pending = self._pending
        if pending.stale:  # a backward pass went by: those losses belong to a step that is over
            pending.clear()
        if not torch.is_grad_enabled() or not self.balance or not self.router.requires_grad:
            return
        latencies = clean.new_tensor(self.latencies)
        pending.losses.append(self.balance * expert_balance_loss(clean, noisy, latencies, self.noise))
        if y.requires_grad:
            held = weakref.ref(pending)
            y.register_hook(lambda _: _mark_stale(held))

    def config(self) -> dict[str, Any]:
        """Return the experts' classes, latencies and options."""
        return {
            "mult": layer_config(self.mult),
            "shift": layer_config(self.shift),
            "latencies": list(self.latencies),
            "noise": self.noise,
            "balance": self.balance,
            "gate": self.gate,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained layer from ``config()``."""
        options = {name: config[name] for name in ("noise", "balance", "gate")}
        return cls(
            layer_from_config(config["mult"]), layer_from_config(config["shift"]), config["latencies"], **options
        )

    def extra_repr(self) -> str:
        """Show sizes and latencies."""
        latencies = ", ".join(f"{x:.3g}" for x in self.latencies)
        return f"in_features={self.in_features}, out_features={self.out_features}, latencies=({latencies})"


def collect_aux_loss(model: nn.Module) -> Tensor:
    """Return the balance losses of all mixtures in a model since the last call, summed, and clear them.

    Parameters
    ----------
    model : nn.Module
        Call this after each forward pass in training and add the result to the loss.  Passes in eval mode or under
        ``torch.no_grad`` leave nothing behind, and what was not collected before a backward pass is dropped by the
        next forward pass.

    Returns
    -------
    loss : Tensor, shape ()
        0 if the model has no mixture.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(MultShiftMoE.from_linear(torch.nn.Linear(4, 4), latencies=(1, 1)))
    >>> loss = model(torch.randn(2, 4)).sum() + collect_aux_loss(model)
    >>> float(collect_aux_loss(model))
    0.0
    """
    mixtures = [m for m in model.modules() if isinstance(m, MultShiftMoE)]
    losses = [m.aux_loss for m in mixtures]
    for mixture in mixtures:
        mixture.clear_aux_loss()
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else torch.zeros(())


def measured_latencies(mult: nn.Module, shift: ShiftLinear, tokens: int = TOKENS) -> tuple[float, float]:
    """Return the milliseconds that each expert needs for so many tokens, the shifting one packed."""
    check_int("tokens", tokens, low=1)
    weight = next(mult.parameters())
    x = torch.linspace(-1, 1, tokens * shift.in_features, device=weight.device, dtype=weight.dtype)
    x, packed = x.view(tokens, -1), shift.pack()
    with evaluating(mult, packed), torch.inference_mode():
        ratio = _timing.paired_ratio(lambda: packed(x), lambda: mult(x), rounds=5)
    return ratio.peer_ms, ratio.ours_ms


def _checked_latencies(latencies: Sequence[float]) -> tuple[float, ...]:
    held = tuple(check_float("latencies", value, low=0.0, open_low=True) for value in latencies)
    if len(held) != EXPERTS:
        raise QuernelError(f"latencies must hold {EXPERTS} numbers, multiplying and shifting expert; got {held}")
    return held


def _mark_stale(held: weakref.ref[_Pending]) -> None:
    pending = held()
    if pending is not None:
        pending.stale = True
