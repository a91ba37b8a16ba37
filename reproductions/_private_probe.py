"""A linear probe trained by DP-SGD (Opacus, in an environment of its own), and the rows that it and its rivals see.

Rows are MiniLM vectors of SST-2's phrases and sentences; tuning holds out the last 5,000 training rows. ``dp_sgd`` runs
in the peer's interpreter; what it measured is kept in the cache.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPACUS = "opacus==1.5.4"
HELD_OUT = 5000
DELTA = 1e-5
EPOCHS = 20
# Learning rates, lots and clipping that are tried; gradients of unit rows are at most sqrt(2) long.
GRID = tuple((rate, lot, 1.0) for rate in (0.5, 2.0, 8.0) for lot in (1024, 4096))


@functools.cache
def rows() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return vectors and labels of SST-2 train (67,349) and dev (872)."""
    import _sentence_vectors as vectors

    from quernel import data

    train, dev = (data.load("sst2", split=split) for split in ("train", "dev"))
    place = {text: i for i, text in enumerate(vectors._corpus_sentences())}
    x = vectors.corpus()[[place[text] for text in train.text]]
    return x, np.asarray(train.y), vectors.encoded(dev.text), np.asarray(dev.y)


class _Lots:
    """Rows and labels that are fetched a lot at a time."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]

    def __getitems__(self, chosen: list[int]) -> Any:
        return self.x[chosen], self.y[chosen]


def _as_it_is(lot: Any) -> Any:
    return lot


def dp_sgd(folder: str, settings: dict[str, Any]) -> dict[str, float]:
    """Train in this process, which must have Opacus; ``folder`` holds the four arrays of ``files``."""
    import torch
    from opacus import PrivacyEngine
    from torch import nn

    warnings.simplefilter("ignore")
    torch.manual_seed(settings["seed"])
    x, y, xt, yt = (torch.from_numpy(np.load(Path(folder) / f"{name}.npy")) for name in ("x", "y", "xt", "yt"))
    model = nn.Linear(x.shape[1], int(y.max()) + 1)
    # Whole lots at a time; row by row, as a TensorDataset is read, takes some twenty times longer.
    loader = torch.utils.data.DataLoader(_Lots(x, y), batch_size=settings["lot"], collate_fn=_as_it_is)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    start = time.perf_counter()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, target_epsilon=settings["epsilon"],
        target_delta=settings["delta"], epochs=settings["epochs"], max_grad_norm=settings["clip"],
    )  # fmt: skip
    for _ in range(settings["epochs"]):
        for a, b in loader:
            optimizer.zero_grad()
            if len(a):
                nn.functional.cross_entropy(model(a), b).backward()
                optimizer.step()
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        accuracy = float((model(xt).argmax(1) == yt).float().mean())
    return {"accuracy": 100 * accuracy, "seconds": seconds, "epsilon": engine.get_epsilon(settings["delta"])}


def files(tuning: bool) -> Path:
    """Write the arrays that the peer reads, once, and return their folder."""
    from quernel.models._cached import folder_of

    folder = folder_of("reproduction-private-probe-rows", {"held_out": HELD_OUT if tuning else 0, "version": 1})
    x, y, xt, yt = rows()
    if tuning:
        x, y, xt, yt = x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in (("x", x), ("y", y), ("xt", xt), ("yt", yt)):
            np.save(folder / f"{name}.npy", array)
        (folder / "ready").touch()
    return folder


def trained_probe(epsilon: float, seed: int, *, tuning: bool, rate: float, lot: int, clip: float) -> dict[str, float]:
    """Return accuracy (%), seconds and epsilon of one DP-SGD probe, from the cache or now."""
    from benchmarks._peers import peer_python
    from benchmarks._process import in_fresh_process
    from quernel.models._cached import folder_of

    settings = {"epsilon": epsilon, "delta": DELTA, "epochs": EPOCHS, "seed": seed}
    settings |= {"rate": rate, "lot": lot, "clip": clip}
    recipe = settings | {"peer": OPACUS, "tuning": tuning}
    file = folder_of("reproduction-private-probe", recipe).with_suffix(".json")
    if not file.exists():
        found = in_fresh_process(
            __file__, "dp_sgd", str(files(tuning)), settings, threads=2, python=peer_python(OPACUS)
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
    held: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return held


@functools.cache
def best_probe(epsilon: float) -> tuple[float, int, float]:
    """Return the rate, lot and clipping that are best on held-out training rows."""

    def score(choice: tuple[float, int, float]) -> float:
        rate, lot, clip = choice
        return trained_probe(epsilon, 100, tuning=True, rate=rate, lot=lot, clip=clip)["accuracy"]

    return max(GRID, key=score)
