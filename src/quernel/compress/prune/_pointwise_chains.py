"""Which batch norm and activation belong to a convolution, and which convolution reads the result: found by running.

Hooks on one batch note whose output object is whose input. That nothing else reads what is in between is then proven:
with norm and activation computed behind the convolution and skipped in their place, the model's output must be
bit-equal. That a tensor may leave its layer in the aligned layout is proven by handing it on in that layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quernel.compress._context import Context, evaluating, run_batch
from quernel.nn._channel_major import aligned_copy

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
# Outputs that read the same values in another layout may sum them in another order.
RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Chain:
    """A layer with what is computed inside it afterwards, and whether its output is handed on aligned."""

    layer: str
    norm: str | None = None
    activation: str | None = None
    aligned: bool = False

    @property
    def end(self) -> str:
        """The module that gives the chain's output."""
        return self.activation or self.norm or self.layer


def find_chains(
    model: nn.Module,
    context: Context,
    sparse: Sequence[str],
    depthwise: Sequence[str],
    plain: Sequence[str],
    fold: bool,
) -> list[Chain]:
    """Return the chain of every layer of ``sparse``, of the depthwise layers beside them, and of plain convolutions
    that take in a batch norm, and nothing else.

    ``fold`` says whether batch norms may be taken in. Without data and example inputs nothing can be proven: every
    sparse layer then stands alone.
    """
    if not sparse or (context.data is None and context.example_inputs is None):
        return [Chain(name) for name in sparse]
    probe = _Probe(model, context)
    known = dict(model.named_modules())
    around = [n for n, m in known.items() if n and context.allows(n) and (type(m) in ACTIVATIONS or _foldable(m))]
    readers = probe.readers({*sparse, *depthwise, *plain, *around})
    chains = [_chain(name, known, readers, fold) for name in (*sparse, *depthwise, *plain)]
    chains = [replace(chain, activation=None) if chain.layer in plain else chain for chain in chains]
    proven = probe.proven([c for c in chains if c.end != c.layer], lambda chain: _fused(chain, known), exact=True)
    chains = [chain if chain in proven else Chain(chain.layer) for chain in chains]
    ends = {chain.end: chain.layer for chain in chains}
    pairs = [(ends[source], reader) for source in ends for reader in readers.get(source, ())]
    beside = {a for a, b in pairs if b in sparse} | {b for a, b in pairs if a in sparse}
    own = {*sparse, *(name for name in depthwise if name in beside)}
    handed = [c for c in chains if c.layer in own and own & set(readers.get(c.end, ()))]
    handed = [c for c in handed if isinstance(known[c.layer], nn.Conv2d)]
    proven = probe.proven(handed, lambda chain: [(chain.end, _realigned)], exact=False)
    chains = [chain for chain in chains if chain.layer in own or (chain.norm is not None and chain.layer in plain)]
    return [replace(chain, aligned=chain in proven) for chain in chains]


def _foldable(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None


def _chain(name: str, known: Mapping[str, nn.Module], readers: Mapping[str, Sequence[str]], fold: bool) -> Chain:
    chain = Chain(name)
    following = readers.get(chain.end, ())
    if fold and len(following) == 1 and _foldable(known[following[0]]) and isinstance(known[name], nn.Conv2d):
        chain = replace(chain, norm=following[0])
        following = readers.get(chain.end, ())
    if len(following) == 1 and type(known[following[0]]) in ACTIVATIONS:
        chain = replace(chain, activation=following[0])
    return chain


def _fused(chain: Chain, known: Mapping[str, nn.Module]) -> list[tuple[str, Hook]]:
    """Return hooks that compute the whole chain behind its layer and nothing in the places of the others."""
    later = [name for name in (chain.norm, chain.activation) if name is not None]

    def compute(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for name in later:
            output = known[name].forward(output)
        return output

    return [(chain.layer, compute), *((name, _skip) for name in later)]


def _skip(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    # Where the module worked in place it was an activation, which changes nothing the second time.
    return args[0]


def _realigned(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return aligned_copy(output) if output.ndim == 4 else output


class _Probe:
    """Runs the model on one batch, with hooks."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        self.model = model
        self.forward = context.forward
        self.batch = next(context.batches()) if context.example_inputs is None else context.example_inputs
        self.wanted = self._outputs([])

    def readers(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return for each module the modules whose first input is its very output; all of them are called once."""
        made: dict[int, tuple[str, Tensor, int]] = {}  # holds the tensors, so that no id is used twice
        calls: dict[str, int] = dict.fromkeys(names, 0)
        found: dict[str, list[str]] = {name: [] for name in calls}

        def before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                calls[name] += 1
                source, tensor, version = made.get(id(args[0]) if args else 0, ("", None, 0))
                if tensor is not None and _version(tensor) == version:
                    found[source].append(name)

            return hook

        def after(name: str) -> Hook:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor):
                    made[id(output)] = (name, output, _version(output))

            return hook

        handles = [self.model.get_submodule(name).register_forward_pre_hook(before(name)) for name in calls]
        try:
            self._outputs([(name, after(name)) for name in calls])
        finally:
            for handle in handles:
                handle.remove()
        once = {name for name, count in calls.items() if count == 1}
        return {name: readers for name, readers in found.items() if name in once and once.issuperset(readers)}

    def proven(
        self, chains: Sequence[Chain], hooks_of: Callable[[Chain], list[tuple[str, Hook]]], *, exact: bool
    ) -> list[Chain]:
        """Return the chains whose hooks leave the output as it was: tried all at once, then one by one."""
        if not self.wanted:
            return []  # an output without tensors that can be seen proves nothing
        whole = [hook for chain in chains for hook in hooks_of(chain)]
        if not chains or self._holds(whole, exact):
            return list(chains)
        return [chain for chain in chains if self._holds(hooks_of(chain), exact)]

    def _holds(self, hooks: Sequence[tuple[str, Hook]], exact: bool) -> bool:
        try:
            got = self._outputs(hooks)
        except RuntimeError:  # a view of what is not contiguous any more
            return False
        if len(got) != len(self.wanted):
            return False
        pairs = list(zip(got, self.wanted, strict=True))
        if exact:
            return all(torch.equal(a, b) for a, b in pairs)
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=RTOL, atol=ATOL, equal_nan=True) for a, b in pairs)

    def _outputs(self, hooks: Sequence[tuple[str, Hook]]) -> list[Tensor]:
        handles = [self.model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks]
        try:
            with evaluating(self.model), torch.no_grad():
                return _tensors(run_batch(self.model, self.batch, self.forward))
        finally:
            for handle in handles:
                handle.remove()


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; not known inside ``inference_mode``."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.clone()]
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    return []
