"""``make_mixer``: every registered class by its name with all options, and options that a class hands to its base."""

from __future__ import annotations

import pytest

from quernel._errors import QuernelError
from quernel._registry import catalogue, example_of
from quernel.nn import LongConvBlock, make_mixer

MIXERS = {entry.name: entry for entry in catalogue() if entry.contract == "mixer"}


@pytest.mark.parametrize("name", MIXERS)
def test_make_mixer_builds_every_class_with_all_its_options(name: str) -> None:
    example = example_of(MIXERS[name].resolve())["make"]()
    made = make_mixer(name, example.dim, **{option: getattr(example, option) for option in example.options})
    assert type(made) is type(example) and made.config() == example.config()


def test_make_mixer_gives_options_of_a_base_class_their_defaults() -> None:
    made = make_mixer("LongConvBlock", 16, l_max=64, heads=2, prenorm=False)
    assert isinstance(made, LongConvBlock) and (made.heads, made.prenorm, made.norm) == (2, False, "layer")
    with pytest.raises(QuernelError, match=r"^l_max must be given .* takes l_max, norm='layer', prenorm=True, heads=1"):
        make_mixer("LongConvBlock", 16)
