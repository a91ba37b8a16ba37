"""The registry: literals read from source without importing, and a closed list of loadable classes."""

import subprocess
import sys

import pytest

from quernel import _registry
from quernel._errors import FormatError, QuernelError
from quernel._registry import Entry, catalogue, example_of, find, register, resolve_class

SOURCE = '''
"""A file."""
raise RuntimeError("the catalogue must not import me")

@register("robe", pillar="nn", contract="module", paper="2108.02191", status="stable", example=lambda: 1)
class Robe:
    """An embedding table read from one small array.

    More.
    """

@other
@register("robe", pillar="nn", contract="weight", paper=None, status="experimental", headline=False)
class RobeWeight:
    pass

class Unregistered:
    pass
'''


def entries(tmp_path, source=SOURCE):
    folder = tmp_path / "nn" / "hashed"
    folder.mkdir(parents=True)
    file = folder / "robe.py"
    file.write_text(source)
    return _registry._entries_in(file, tmp_path)


def test_decorators_are_read_and_nothing_is_run(tmp_path):
    headline, weight = entries(tmp_path)
    assert headline == Entry(
        slug="robe",
        name="Robe",
        module="quernel.nn.hashed.robe",
        pillar="nn",
        contract="module",
        paper="2108.02191",
        status="stable",
        headline=True,
        summary="An embedding table read from one small array.",
    )
    assert (weight.name, weight.headline, weight.paper, weight.summary) == ("RobeWeight", False, None, "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('paper="2108.02191"', "paper=PAPER", "must be given literals"),
        ('"robe", pillar="nn", contract="module"', 'pillar="nn", contract="module"', "must be given literals"),
        ('contract="module"', 'contract="thing"', "unknown contract or status"),
        ('status="stable"', 'status="new"', "unknown contract or status"),
        ('pillar="nn", contract="module"', 'contract="module"', "lacks .*pillar"),
    ],
)
def test_bad_decorators_are_named(tmp_path, old, new, message):
    with pytest.raises(QuernelError, match=message) as caught:
        entries(tmp_path, SOURCE.replace(old, new, 1))
    assert "robe.py" in str(caught.value)
    assert "Robe" in str(caught.value)


def test_the_decorator_leaves_the_class_alone():
    @register("toy", pillar="nn", contract="module", paper=None, status="stable", example=lambda: ("arguments", 3))
    class Toy:
        pass

    class Child(Toy):
        pass

    assert Toy.__name__ == "Toy"
    assert Toy._quernel_slug == "toy"
    assert example_of(Toy) == ("arguments", 3)
    with pytest.raises(QuernelError, match="Child is registered without example="):
        example_of(Child)  # an example is for the class it was given to


def test_the_catalogue_is_sorted_with_headlines_first():
    keys = [(entry.slug, not entry.headline, entry.name) for entry in catalogue()]
    assert keys == sorted(keys)
    assert keys


def test_find_gives_the_headline_or_the_class_or_the_known_names():
    first = next(entry for entry in catalogue() if entry.headline)
    assert find(first.slug) is first
    other = next(entry for entry in catalogue() if not entry.headline)
    assert find(other.name) is other
    with pytest.raises(QuernelError, match=f"no system or class is called 'nothing'; known systems: .*{first.slug}"):
        find("nothing")


def test_only_registered_classes_are_resolved():
    entry = catalogue()[0]
    assert resolve_class(entry.name, file="config.json", field="class").__name__ == entry.name
    for name in ("Popen", "os.system", None, 3, ["Linear"], {}):
        with pytest.raises(FormatError, match=r"config\.json: field 'class' names"):
            resolve_class(name, file="config.json", field="class")


@pytest.mark.slow
def test_listing_imports_no_system():
    script = (
        "import sys, quernel._registry as r; r.catalogue(); print(any(m in sys.modules for m in ('torch', 'numba')))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
