"""A text index: what is found, what is replaced and removed, what a save holds, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import quernel
from quernel._errors import DataError, FormatError, QuernelError
from quernel.apps.text_index import KINDS, TextIndex
from quernel.testing._modules_shared import FORGED_FIELDS, damages
from tests.apps.text_index.conftest import DIM, TEXTS, WordCounter, write


def built(kind: str, texts: Path, encoder: WordCounter) -> TextIndex:
    index = TextIndex(kind, DIM, encoder)
    assert index.add_path(texts) == []
    return index


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"flinng"}))
def test_the_passage_that_says_it_comes_first(kind: str, texts: Path, encoder: WordCounter) -> None:
    index = built(kind, texts, encoder)
    assert index.files == sorted(TEXTS)
    hits = index.search("Do dogs bark at strangers?", k=2)
    assert hits[0].file == "animals/dogs.md" and hits[0].line == 1 and "guard the house" in hits[0].text
    assert hits[0].score >= hits[-1].score
    assert index.search("Snow falls when it is cold", k=1)[0].file == "weather.txt"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_passage_finds_itself(kind: str, texts: Path, encoder: WordCounter) -> None:
    index = built(kind, texts, encoder)
    for passage in index._passages.values():
        assert index.search(passage.text, k=1)[0].text == passage.text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_saved_and_loaded_it_answers_alike(kind: str, texts: Path, encoder: WordCounter, tmp_path: Path) -> None:
    index = built(kind, texts, encoder)
    index.remove("weather.txt")
    path = index.save(tmp_path / "index")
    for twin in (TextIndex.load(path), TextIndex.load(path, mmap=True), quernel.load(path)):
        twin.encoder = encoder
        assert twin.files == index.files and len(twin) == len(index)
        for query in ("dogs", "cats sleep", "nothing of this"):
            assert twin.search(query) == index.search(query)
        twin.add("new.txt", "Whales sing under water.")
        assert twin.search("Whales sing under water.", k=1)[0].file == "new.txt"


def test_only_what_changed_is_encoded_again(texts: Path, encoder: WordCounter) -> None:
    index = built("flat", texts, encoder)
    before = encoder.calls
    assert index.add_path(texts) == [] and encoder.calls == before
    write(texts, {"weather.txt": "Storms blow from the west.", "empty.txt": " \n"})
    index.add_path(texts)
    index.add_path(texts)
    assert encoder.calls == before + 1, "a file without passages is known too"
    assert index.search("storms from the west", k=1)[0].text == "Storms blow from the west."
    assert all("Snow" not in hit.text for hit in index.search("snow falls", k=10))


def test_removed_files_are_not_found_and_not_saved(texts: Path, encoder: WordCounter, tmp_path: Path) -> None:
    index = built("flat", texts, encoder)
    assert index.remove("animals/cats.txt") >= 1
    assert all(hit.file != "animals/cats.txt" for hit in index.search("cat hunts mice", k=10))
    with pytest.raises(QuernelError, match=r"no file 'animals/cats\.txt'"):
        index.remove("animals/cats.txt")
    path = index.save(tmp_path / "index")
    assert b"purrs" not in b"".join(file.read_bytes() for file in path.iterdir())


def test_what_cannot_be_read_is_named_and_the_rest_is_in(texts: Path, encoder: WordCounter) -> None:
    # Between the others and behind them: what was waiting when it came is not forgotten.
    for name in ("bad.txt", "zbad.txt"):
        (texts / name).write_bytes(b"\xff\xfe")
    index = TextIndex("flat", DIM, encoder)
    assert ["bad.txt" in reason for reason in index.add_path(texts)] == [True, True]
    assert index.files == sorted(TEXTS)
    with pytest.raises(DataError, match=r"bad\.txt"):
        index.add_path(texts / "bad.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such names")
def test_a_name_that_is_not_utf8_is_named_and_the_rest_is_in(texts: Path, encoder: WordCounter, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(texts) + b"/caf\xe9.txt"))
    odd.write_text("Tea and cake.", encoding="utf-8")
    index = TextIndex("flat", DIM, encoder)
    (reason,) = index.add_path(texts, save_to=tmp_path / "index")
    assert "not UTF-8" in reason and r"caf\udce9.txt" in reason and reason.isprintable()
    assert TextIndex.load(tmp_path / "index").files == sorted(TEXTS)
    with pytest.raises(DataError, match="not UTF-8"):
        index.add_path(odd)
    # Below a folder of such a name there is nothing odd, as names are those below it.
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write(folder, {"fine.txt": "Coffee is roasted."})
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    (reason,) = index.add_path(folder, save_to=tmp_path / "index")
    assert "bad.txt" in reason and reason.isprintable()
    assert "fine.txt" in TextIndex.load(tmp_path / "index").files
    with pytest.raises(DataError, match=r"no such file") as error:
        index.add_path(folder / "none")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (3, "x", "name must be a text that is not empty; got 3"),
        ("", "x", "name must be a text that is not empty; got ''"),
        ("caf\udce9", "x", r"name must be Unicode; it has half a character, '\\udce9', at 3"),
        ("n", "\udce9", "text must be Unicode"),
        ("n", 3, "text must be a text"),
        ("n", None, "text must be a text"),
        ("n", b"x", "text must be a text"),
        ("n", 0, "text must be a text"),
    ],
)
def test_a_name_or_text_that_could_not_be_saved_is_refused(
    name: object, text: object, reason: str, texts: Path, encoder: WordCounter
) -> None:
    index = built("flat", texts, encoder)
    before = encoder.calls
    with pytest.raises(QuernelError, match=reason):
        index.add(name, text)  # type: ignore[arg-type]
    assert index.files == sorted(TEXTS) and encoder.calls == before


def _no_memory(vectors: Tensor) -> Tensor:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"multi-vector"}))
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_no_memory, "no memory"),
        (lambda vectors: vectors[:, 1:], "shape"),
        (lambda vectors: vectors * float("nan"), "NaN"),
        (lambda vectors: vectors[1:], "ids"),
    ],
    ids=["encoder fails", "other width", "NaN", "a vector too few"],
)
def test_a_refused_batch_changes_nothing(
    kind: str, broken: Callable[[Tensor], Tensor], reason: str, texts: Path, encoder: WordCounter, tmp_path: Path
) -> None:
    index = built(kind, texts, encoder)

    class Broken(WordCounter):
        def encode(self, sentences: Sequence[str]) -> Tensor:
            return broken(super().encode(sentences))

    held, arrays = index.search("dogs bark"), {k: v.copy() for k, v in index._all_arrays().items()}
    index.encoder = Broken()
    changed = "Wolves howl.\n\n" + "They hunt in packs of many. " * 10
    write(texts, {"animals/dogs.md": changed})
    for attempt in (
        lambda: index.add("animals/dogs.md", "Foxes dig.\n\n" + "They live in holes of their own. " * 10),
        lambda: index.add_path(texts, save_to=tmp_path / "index"),
    ):
        with pytest.raises((RuntimeError, QuernelError), match=reason):
            attempt()
    index.encoder = encoder
    assert index.search("dogs bark") == held and index.files == sorted(TEXTS)
    for name, array in index._all_arrays().items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert not (tmp_path / "index").exists()
    index.add_path(texts)
    assert index.search(changed.strip(), k=1)[0].text == changed.strip()


def test_errors_name_the_argument(texts: Path, encoder: WordCounter) -> None:
    with pytest.raises(QuernelError, match="kind"):
        TextIndex("other")
    index = TextIndex("flat", DIM, encoder)
    assert index.search("anything") == []
    for query in ("", "  ", 3, "caf\udce9"):
        with pytest.raises(QuernelError, match="query"):
            index.search(query)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="k must be"):
        index.search("x", 0)
    with pytest.raises(QuernelError, match="batch"):
        index.add_path(texts, batch=0)


def test_damaged_files_are_refused(texts: Path, encoder: WordCounter, tmp_path: Path) -> None:
    index = built("flat", texts, encoder)
    path = index.save(tmp_path / "index")
    wanted = index.search("dogs bark")
    for change in damages(path, FORGED_FIELDS):
        twin, reason = _loaded(path)
        if twin is None:
            assert str(path) in reason, change
            continue
        twin.encoder = encoder
        assert twin.search("dogs bark") == wanted, change


def _loaded(path: Path) -> tuple[TextIndex | None, str]:
    try:
        return quernel.load(path), ""
    except FormatError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"flinng"}))
def test_spread_over_shards_it_answers_alike(kind: str, texts: Path, encoder: WordCounter) -> None:
    index = built(kind, texts, encoder)
    index.remove("weather.txt")
    spread = index.spread(2, workers="threads")
    for query in ("dogs bark", "cats"):
        found, wanted = spread.search(query, 3), index.search(query, 3)
        assert [hit.text for hit in found] == [hit.text for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], rtol=1e-5)
    spread.close()


SCRIPT = """
import sys
from pathlib import Path
from quernel.apps.text_index import TextIndex
from tests.apps.text_index.conftest import DIM, WordCounter

index = TextIndex("flat", DIM, WordCounter())
index.add_path(Path(sys.argv[1]), save_to=Path(sys.argv[2]), batch=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_kill_leaves_whole_batches(moment: float, tmp_path: Path, encoder: WordCounter) -> None:
    names = [f"{i:04}.txt" for i in range(600)]
    texts = write(tmp_path / "texts", {n: f"Text number {n} about topic{n}.\n\n" + "more words " * 200 for n in names})
    folder = tmp_path / "index"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(texts), str(folder)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while not (folder / "config.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had finished before it was killed"
    index = TextIndex.load(folder)
    index.encoder = encoder
    whole = TextIndex("flat", DIM, encoder)
    whole.add_path(texts)
    # A prefix of the files, each with all its passages.
    assert 0 < len(index.files) < len(names) and index.files == names[: len(index.files)]
    counts = [sum(1 for i in index._passages if index._file_of[i] == name) for name in index.files]
    assert counts == [sum(1 for i in whole._passages if whole._file_of[i] == name) for name in index.files]
    index.add_path(texts, save_to=folder)
    assert index.files == names
    query = f"topic{names[-1]}"
    again = TextIndex.load(folder)
    again.encoder = encoder
    assert np.isclose(again.search(query, 1)[0].score, whole.search(query, 1)[0].score)


# Sends itself the signal before the n-th step of that kind: encoding a batch, putting the new tensors in place,
# putting the config in place that names them, deleting the old tensors.
ADD = """
import os, pathlib, signal, sys
from quernel.apps.text_index import TextIndex
from tests.apps.text_index.conftest import WordCounter

texts, folder, moment, number = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
owner, name, pattern = {
    "encoding": (WordCounter, "encode", None),
    "tensors": (pathlib.Path, "replace", "model*.safetensors"),
    "commit": (pathlib.Path, "replace", "config.json"),
    "cleaning": (pathlib.Path, "unlink", "model*.safetensors"),
}[moment]
real, met = getattr(owner, name), 0

def watched(self, *arguments, **options):
    global met
    path = arguments[0] if name == "replace" else self
    met += pattern is None or pathlib.Path(path).match(pattern)
    if met == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments, **options)

index = TextIndex.load(folder)
index.encoder = WordCounter()
setattr(owner, name, watched)
index.add_path(texts, save_to=folder, batch=3)
"""


def contents(index: TextIndex) -> dict[str, list[str]]:
    """Return the passages of every file."""
    return {name: [index._passages[i].text for i in index._sources[name].ids] for name in index.files}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "saved"), [("encoding", 2), ("tensors", 2), ("commit", 2), ("cleaning", 3)])
def test_a_kill_while_adding_leaves_the_old_index_and_whole_batches(
    moment: str, saved: int, tmp_path: Path, encoder: WordCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path / "texts", {f"{i:02}.txt": f"About old{i}. " + "more words " * 200 for i in range(12)})
    folder = built("flat", texts, encoder).save(tmp_path / "index")
    write(texts, {f"{i:02}.txt": f"About new{i}. " + "other words " * 200 for i in range(4, 16)})

    # What there should be after each batch, without a folder.
    steps: list[dict[str, list[str]]] = []
    with monkeypatch.context() as patch:
        patch.setattr(TextIndex, "save", lambda self, path: steps.append(contents(self)))
        whole = TextIndex.load(folder)
        whole.encoder = encoder
        whole.add_path(texts, save_to=folder, batch=3)
    assert len(steps) > 4 and any("old" in text for found in steps[2].values() for text in found)

    process = subprocess.run(
        [sys.executable, "-c", ADD, str(texts), str(folder), moment, "3"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL, "it had finished before it was killed"
    index = TextIndex.load(folder)
    assert contents(index) == steps[saved - 1]

    index.encoder = encoder
    before = encoder.calls
    index.add_path(texts, save_to=folder)
    left = sum(len(found) for name, found in steps[-1].items() if steps[saved - 1].get(name) != found)
    assert encoder.calls == before + left, "what was saved is not encoded again"
    again = TextIndex.load(folder)
    again.encoder = encoder
    assert contents(again) == contents(whole) == steps[-1]
    for i in (0, 5, 15):
        found, wanted = again.search(f"About new{i}.", 3), whole.search(f"About new{i}.", 3)
        assert [(hit.file, hit.text) for hit in found] == [(hit.file, hit.text) for hit in wanted]
    assert len(list(folder.glob("model*.safetensors"))) == 1, "tensors that a killed save left are gone"
