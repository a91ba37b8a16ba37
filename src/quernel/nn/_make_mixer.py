"""``make_mixer``: a token mixer by the name of its system or of its class, as the registry has it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from quernel._errors import QuernelError
from quernel._registry import catalogue
from quernel._validate import check_type
from quernel.nn._mixer import Mixer


def mixer_names() -> list[str]:
    """Return the names of the systems that have token mixers."""
    return sorted({entry.slug for entry in catalogue() if entry.contract == "mixer"})


def make_mixer(name: str, dim: int, **options: Any) -> Mixer:
    """Build a token mixer.

    Parameters
    ----------
    name : str
        Of the system (its headline mixer) or of a class, e.g. ``"softmax-attention"`` or ``"SoftmaxAttention"``.
    dim : int
        Channels.
    **options
        As in the class.

    Raises
    ------
    QuernelError
        If no mixer has this name, or its class needs an option that is not given, or has none of that name.

    Examples
    --------
    >>> make_mixer("softmax-attention", 64, num_heads=4)  # doctest: +ELLIPSIS
    SoftmaxAttention(...
    """
    check_type("name", name, str)
    entries = [entry for entry in catalogue() if entry.contract == "mixer"]
    # Of a system's mixers the headline comes first.
    for entry in entries:
        if name in (entry.slug, entry.name):
            cls = entry.resolve()
            _check_options(name, cls, options)
            mixer: Mixer = cls(dim, **options)
            return mixer
    raise QuernelError(f"name must be one of {', '.join(mixer_names())}, or the name of a mixer's class; got {name!r}")


def _options_of(cls: type) -> list[inspect.Parameter]:
    """Return the options after ``dim``, those in place of ``**options`` too, which are the base class's."""
    own = list(inspect.signature(cls).parameters.values())[1:]
    if not any(p.kind is p.VAR_KEYWORD for p in own):
        return own
    own = [p for p in own if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in own}
    return own + [p for p in _options_of(cls.__mro__[1]) if p.name not in names]


def _check_options(name: str, cls: type, options: Mapping[str, Any]) -> None:
    own = _options_of(cls)
    takes = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in own) or "no options"
    missing = [p.name for p in own if p.default is p.empty and p.name not in options]
    if missing:
        raise QuernelError(f"{' and '.join(missing)} must be given for mixer {name!r}, which takes {takes}")
    unknown = [option for option in options if option not in {p.name for p in own}]
    if unknown:
        raise QuernelError(f"mixer {name!r} has no option {', '.join(map(repr, unknown))}; it takes {takes}")
