"""Lazy name tables: first use imports, unknown names, missing extras, modules beside names."""

import sys

import pytest

from quernel._errors import MissingExtraError
from quernel._lazy import attach


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a table over four modules, none of them imported yet."""
    folder = tmp_path / "lazy_toy"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from quernel._lazy import attach\n"
        "__getattr__, __dir__, __all__ = attach(__name__, {\n"
        "    'Thing': '.things', 'extra_thing': ('.needs_extra', 'hf'), 'things': '.things',\n"
        "    'own_bug': ('.broken', 'hf'), 'plain': '.missing_plainly', 'absent': '.things'})\n"
    )
    (folder / "things.py").write_text("class Thing: pass\n")
    (folder / "needs_extra.py").write_text("import no_such_optional_package\n")
    (folder / "broken.py").write_text("import quernel.no_such_module\n")
    (folder / "missing_plainly.py").write_text("import no_such_optional_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("lazy_toy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_toy"]:
        del sys.modules[name]


def test_first_use_imports(package):
    assert "lazy_toy.things" not in sys.modules
    assert package.Thing.__name__ == "Thing"
    assert "lazy_toy.things" in sys.modules
    assert package.things.Thing is package.Thing


def test_from_import(package):
    from lazy_toy import Thing

    assert Thing is package.Thing


def test_unknown_names_are_attribute_errors(package):
    with pytest.raises(AttributeError, match="module 'lazy_toy' has no attribute 'nothing'"):
        _ = package.nothing
    assert not hasattr(package, "_private")


def test_a_table_that_lies_is_found(package):
    with pytest.raises(AttributeError, match="absent"):
        _ = package.absent


def test_listing_imports_nothing(package):
    assert dir(package) == sorted(package.__all__)
    assert package.__all__ == sorted(package.__all__)
    assert "lazy_toy.things" not in sys.modules


def test_a_missing_extra_is_named(package):
    with pytest.raises(MissingExtraError, match=r'pip install "quernel\[hf\]"') as caught:
        _ = package.extra_thing
    assert caught.value.extra == "hf"
    assert isinstance(caught.value, ImportError)
    assert "no_such_optional_package" in str(caught.value.__cause__)


def test_a_bug_of_our_own_is_not_blamed_on_an_extra(package):
    with pytest.raises(ModuleNotFoundError, match=r"quernel\.no_such_module") as caught:
        _ = package.own_bug
    assert not isinstance(caught.value, MissingExtraError)


def test_without_an_extra_the_import_error_stays(package):
    with pytest.raises(ModuleNotFoundError, match="no_such_optional_package"):
        _ = package.plain


def test_tables_are_sorted_whatever_their_order():
    _, listed, names = attach("p", {"b": ".b", "a": ".a"})
    assert names == listed() == ["a", "b"]
