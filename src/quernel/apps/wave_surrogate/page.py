"""``save_page``: one offline HTML file with true and predicted waves side by side, error curves and a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._timing import latency_ms
from quernel._validate import check_int
from quernel.apps.wave_surrogate.dataset import WaveData
from quernel.apps.wave_surrogate.pictures import data_uri, field_png
from quernel.apps.wave_surrogate.surrogate import WaveSurrogate, rollout
from quernel.apps.wave_surrogate.training import rollout_errors
from quernel.nn._running import evaluating
from quernel.nn.weights import unique_bytes
from quernel.report import _units as units
from quernel.report._axis import from_zero
from quernel.report._html import whole_page
from quernel.report._html_table import Cell, Column, html_row, html_table
from quernel.report._markup import Markup, join, tag

# Differences are small: they are drawn this many times stronger.
STRONGER = 5
PANELS = 6
STROKES = ("size", "warm", "time", "good", "bad", "soft")
STYLE = """
.waves { display: grid; gap: 0.35rem; align-items: center; margin: 0 0 1.75rem; }
.waves img { display: block; width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
.waves span { color: var(--soft); font-size: 0.875rem; }
.waves .head { text-align: center; }
.curve { fill: none; stroke-width: 2; }
"""
STYLE += "".join(f".curve.{s} {{ stroke: var(--{s}); }}\n.swatch.{s} {{ background: var(--{s}); }}\n" for s in STROKES)
STYLE += "".join(f".columns-{n} {{ grid-template-columns: 6.5rem repeat({n}, 1fr); }}\n" for n in range(1, PANELS + 1))


def save_page(
    path: str | os.PathLike[str],
    models: Mapping[str, WaveSurrogate],
    data: WaveData,
    *,
    steps: int = 10,
    trajectories: int = 3,
    first: int = 4,
    title: str = "Wave surrogate",
) -> Path:
    """Write a page that shows what surrogates predict, beside the solver's fields.

    Parameters
    ----------
    path : path
        HTML file to write.
    models : mapping of str to WaveSurrogate
        Trained surrogates by the name they get; up to six.
    data : WaveData
        Trajectories that no model has seen.
    steps : int, default=10
        Frames predicted in a row.
    trajectories : int, default=3
        How many are drawn, from the first.
    first : int, default=4
        Frame from which predictions start; each model sees the frames before it.
    title : str, default="Wave surrogate"

    Returns
    -------
    path : Path

    Raises
    ------
    QuernelError
        If there is no model, or the trajectories are too short.

    Examples
    --------
    >>> from quernel.apps.wave_surrogate import WaveSurrogate, wave_data
    >>> save_page("waves.html", {"untrained": WaveSurrogate(channels=4, layers=2)}, wave_data(2, size=16)).name
    'waves.html'
    """
    check_int("steps", steps, low=1)
    check_int("trajectories", trajectories, low=1)
    if not 1 <= len(models) <= len(STROKES):
        raise QuernelError(f"models must name one to {len(STROKES)} surrogates; got {len(models)}")
    history = max(model.history for model in models.values())
    if not history <= first <= data.frames.shape[1] - steps:
        raise QuernelError(
            f"first={first} needs {history} frames before it and {steps} after it; "
            f"trajectories have {data.frames.shape[1]} frames"
        )
    errors = {name: rollout_errors(model, data, steps=steps) for name, model in models.items()}
    body = join(
        tag(
            "header",
            tag("p", "Quernel application", class_="eyebrow"),
            tag("button", "Dark", id="theme", type="button", class_="script-only"),
            tag("h1", title),
        ),
        tag(
            "main",
            _table(models, errors, data),
            _curves(errors),
            _waves(models, data.part(0, trajectories), steps, first),
        ),
        tag("footer", tag("p", f"{len(data)} trajectories that no model was trained on; one file, no network.")),
    )
    target = Path(path)
    target.write_text(whole_page(f"{title} · Quernel", body, style=STYLE), encoding="utf-8")
    return target


def _table(models: Mapping[str, WaveSurrogate], errors: Mapping[str, Sequence[float]], data: WaveData) -> Markup:
    steps = len(next(iter(errors.values())))
    columns = [
        Column("model"),
        Column("parameters", numeric=True),
        Column("stored", numeric=True),
        Column("time a frame", numeric=True),
        Column("one-step error", numeric=True),
        Column(f"error after {steps} steps", numeric=True),
    ]
    rows = []
    for name, model in models.items():
        count, size = sum(p.numel() for p in model.parameters()), unique_bytes(model)
        one, last = errors[name][0], errors[name][-1]
        time = latency_ms(partial(rollout, model, data.frames[:1, : model.history], data.speed[:1], 1)).median_ms
        cells = [
            Cell(name, name),
            Cell(f"{count:,}", float(count)),
            Cell(units.format_bytes(size), float(size)),
            Cell(units.format_ms(time), time),
            Cell(f"{one:.2%}", one),
            Cell(f"{last:.2%}", last),
        ]
        rows.append(html_row(columns, cells))
    return tag(
        "section",
        tag("h2", "Errors", id="errors"),
        tag("p", "Relative L2 error of the predicted field, over all windows of the trajectories.", class_="lead"),
        html_table("Size and errors of each model", columns, rows, slug="models"),
        aria_labelledby="errors",
    )


def _curves(errors: Mapping[str, Sequence[float]]) -> Markup:
    """Draw the error against the number of steps predicted in a row."""
    width, height, left, right, top, bottom = 960, 360, 62, 946, 34, 312
    steps = len(next(iter(errors.values())))
    x_axis = from_zero([float(steps)], left, right)
    y_axis = from_zero([100 * e for curve in errors.values() for e in curve if e < float("inf")], bottom, top)
    ticks = [
        join(
            tag("line", x1=left, x2=right, y1=y_axis.at(value), y2=y_axis.at(value), class_="grid"),
            tag("text", text, x=left - 8, y=y_axis.at(value) + 4, class_="tick", text_anchor="end"),
        )
        for value, text in y_axis.ticks(5)
    ]
    ticks += [
        tag("text", text, x=x_axis.at(value), y=bottom + 19, class_="tick", text_anchor="middle")
        for value, text in x_axis.ticks(min(steps, 10))
    ]
    lines = [
        tag("path", tag("title", name), d=_path(curve, x_axis.at, y_axis.at), class_=f"curve {stroke}")
        for (name, curve), stroke in zip(errors.items(), STROKES, strict=False)
    ]
    legend = [
        tag("span", tag("span", class_=f"swatch {stroke}"), name) for name, stroke in zip(errors, STROKES, strict=False)
    ]
    return tag(
        "section",
        tag("h2", "Predictions fed back", id="curves"),
        tag(
            "svg",
            tag("title", "Relative error against steps: " + "; ".join(f"{n} {c[-1]:.1%}" for n, c in errors.items())),
            *ticks,
            tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"),
            tag("text", "steps predicted in a row", x=right, y=bottom + 40, class_="axis-title", text_anchor="end"),
            tag("text", "relative error (%)", x=8, y=16, class_="axis-title"),
            *lines,
            viewBox=f"0 0 {width} {height}",
            class_="plot",
            role="img",
        ),
        tag("div", *legend, class_="legend"),
        aria_labelledby="curves",
    )


def _path(curve: Sequence[float], x_at: Callable[[float], float], y_at: Callable[[float], float]) -> str:
    places = [(x_at(i + 1), y_at(100 * e)) for i, e in enumerate(curve) if e < float("inf")]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def _waves(models: Mapping[str, WaveSurrogate], data: WaveData, steps: int, first: int) -> Markup:
    shown = torch.linspace(1, steps, min(PANELS, steps)).round().int().tolist()
    true = data.frames[:, first : first + steps]
    made: dict[str, Tensor] = {}
    for name, model in models.items():
        with evaluating(model):
            made[name] = rollout(model, data.frames[:, first - model.history : first], data.speed, steps)
    parts = [
        _trajectory(i, true[i], {name: fields[i] for name, fields in made.items()}, shown) for i in range(len(data))
    ]
    return tag(
        "section",
        tag("h2", "Waves", id="waves"),
        tag(
            "p",
            f"Fields of the solver, what each model predicts from the frames before, and the difference, {STRONGER} "
            "times stronger. White is zero; one scale a trajectory.",
            class_="lead",
        ),
        *parts,
        aria_labelledby="waves",
    )


def _trajectory(number: int, true: Tensor, made: Mapping[str, Tensor], shown: Sequence[int]) -> Markup:
    scale = max(float(true.abs().max()), torch.finfo(torch.float32).tiny)
    rows: list[tuple[str, Tensor, float]] = [("solver", true, scale)]
    for name, fields in made.items():
        rows += [(name, fields, scale), (f"{name}, difference", fields - true, scale / STRONGER)]
    cells = [tag("span"), *(tag("span", f"step {step}", class_="head") for step in shown)]
    for name, fields, limit in rows:
        cells.append(tag("span", name))
        cells += [
            tag(
                "img",
                src=data_uri(field_png(fields[step - 1], limit)),
                alt=f"trajectory {number + 1}, {name}, step {step}",
                width=fields.shape[-1],
                height=fields.shape[-2],
            )
            for step in shown
        ]
    columns = f"columns-{len(shown)}"
    return join(tag("h3", f"Trajectory {number + 1}"), tag("div", *cells, class_=f"waves {columns}"))
