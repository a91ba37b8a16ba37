"""The page of a surrogate: one file with all its pictures, escaped, well-formed, numbers as measured."""

import re
from html.parser import HTMLParser

import pytest
import torch

from quernel._errors import QuernelError
from quernel.apps.wave_surrogate import WaveSurrogate, rollout_errors, save_page, wave_data

EVIL = "<script>alert(1)</script>"
VOID = {"img", "input", "link", "meta", "wbr"}


class Outline(HTMLParser):
    """Checks that tags nest and collects them."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def data():
    return wave_data(4, size=12, frames=12)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {"dense": WaveSurrogate(channels=4, layers=2), EVIL: WaveSurrogate(channels=3, layers=2)}


@pytest.fixture(scope="module")
def page(data, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return save_page(folder / "waves.html", models, data, steps=4, trajectories=2).read_text(encoding="utf-8")


def test_is_well_formed_and_escaped(page):
    outline = Outline(page)
    assert outline.open == []
    assert EVIL not in page
    ids = [a["id"] for _, a in outline.seen if "id" in a]
    assert len(ids) == len(set(ids))


def test_is_one_file_that_asks_for_nothing(page):
    outline = Outline(page)
    addresses = [a[key] for _, a in outline.seen for key in ("src", "href") if key in a]
    assert all(address.startswith("data:") for address in addresses)
    policy = next(a["content"] for tag, a in outline.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    assert not re.search(r"https?://", page)


def test_shows_the_truth_each_model_and_each_difference(page):
    pictures = [a for tag, a in Outline(page).seen if tag == "img"]
    # Two trajectories, four steps, the solver and two rows a model.
    assert len(pictures) == 2 * 4 * 5
    assert all(a["alt"] and a["width"] == "12" for a in pictures)
    assert len({a["src"] for a in pictures}) > 20


def test_numbers_are_the_measured_ones(page, data, models):
    errors = rollout_errors(models["dense"], data, steps=4)
    assert f"{errors[0]:.2%}" in page
    assert f"{errors[-1]:.2%}" in page
    assert f"{sum(p.numel() for p in models['dense'].parameters()):,}" in page


def test_bad_input_is_named(data, models, tmp_path):
    with pytest.raises(QuernelError, match="models must name one to 6"):
        save_page(tmp_path / "x.html", {}, data)
    with pytest.raises(QuernelError, match="first=4 needs 4 frames before it and 10 after it"):
        save_page(tmp_path / "x.html", models, data, steps=10)
    assert not list(tmp_path.iterdir())
