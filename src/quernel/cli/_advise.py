"""``quernel advise``: what the theory of deep networks says of a model, or of a shape, before anything is trained."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.cli._index_report import check_page_name
from quernel.cli._output import Json, console, emit, note, progress_bar, table

if TYPE_CHECKING:
    from torch import nn

    from quernel.nn.init import Advice

# Layers whose learning rates the screen shows; --json and --report give all.
SHOWN_LAYERS = 8


def advise(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A bundled model, a folder (Quernel, transformers, sentence-transformers), or package.module:factory."
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Neurons of a hidden layer.")] = None,
    depth: Annotated[int | None, typer.Option(help="Layers with weights.")] = None,
    activation: Annotated[str | None, typer.Option(help="relu, tanh, gelu, silu, ...; of a model it is found.")] = None,
    inputs: Annotated[int | None, typer.Option(help="Inputs; default: as many as the width.")] = None,
    outputs: Annotated[int | None, typer.Option(help="Outputs.")] = None,
    params: Annotated[int | None, typer.Option(help="Budget of weights: choose depth and width within it.")] = None,
    residual: Annotated[float, typer.Option(help="c of skip connections c z + W s(z).")] = 0.0,
    report: Annotated[Path | None, typer.Option(help="Where to write the page: FILE.html.")] = None,
    json: Json = False,
) -> None:
    """Say which initialisation, depth, width and learning rates suit a network."""
    check_page_name(report)
    shape = {"width": width, "depth": depth, "params": params}
    if source is not None:
        sizes = {**shape, "inputs": inputs, "outputs": outputs}
        given = [f"--{name}" for name, value in sizes.items() if value is not None]
        if given:
            raise QuernelError(f"{', '.join(given)}: a model has its shape; leave it out, or leave {source!r} out")
        with progress_bar() as progress:
            advice = _of_model(source, activation, residual, progress)
        title = source
    else:
        advice = _of_shape(shape, activation, inputs, outputs, residual)
        title = f"{advice.critical.activation} network of {advice.depth} layers, width {advice.width}"
    if report is not None:
        report.write_text(_page(title, advice), encoding="utf-8")
        note(f"report: {report}")
    if json:
        emit({"title": title, **advice.to_dict()})
        return
    console().print(title, markup=False, style="bold")
    table(("what", "found"), [(name, _text(value)) for name, value in _facts(advice).items()])
    _print_rates(advice)
    for warning in advice.warnings:
        note(f"warning: {warning}")


def _of_model(source: str, activation: str | None, residual: float, progress: Any) -> Advice:
    from quernel import models
    from quernel.nn import ArchitectureAdvisor

    model = models.resolve(source, progress=progress)
    return ArchitectureAdvisor.diagnose(model, activation, example_inputs=lambda: _example(model), residual=residual)


def _example(model: nn.Module) -> Any:
    """Return inputs that the model runs on, to see which functions it calls; None where nobody knows any."""
    from quernel import models

    if hasattr(model, "dummy_inputs"):  # transformers
        return model.dummy_inputs
    try:
        return models.task(model).example_inputs
    except QuernelError as error:
        note(f"no example for {type(model).__name__}: {error}")
        return None


def _of_shape(
    shape: dict[str, int | None], activation: str | None, inputs: int | None, outputs: int | None, residual: float
) -> Advice:
    from quernel.kernels.theory import as_activation
    from quernel.nn import ArchitectureAdvisor

    sizes = {**shape, "inputs": inputs, "outputs": outputs}
    for name, value in sizes.items():
        if value is not None:
            check_int(f"--{name}", value, low=1)
    check_float("--residual", residual, low=0.0, high=1.0, open_high=True)
    if activation is not None:
        as_activation(activation)
    lacking = [
        *(["--activation"] if activation is None else []),
        *(["--outputs"] if outputs is None else []),
        *(["--width, --depth or --params"] if all(value is None for value in shape.values()) else []),
        *(["--inputs (where --width is not given)"] if inputs is None and shape["width"] is None else []),
    ]
    if lacking:
        raise QuernelError(
            f"name a model, or a shape, which lacks {' and '.join(lacking)}, "
            "e.g. quernel advise --width 512 --depth 20 --activation relu --outputs 10"
        )
    if shape["params"] is not None and (shape["width"] is not None or shape["depth"] is not None):
        raise QuernelError("--params is a budget for which depth and width are chosen; leave --width and --depth out")
    inputs = shape["width"] if inputs is None else inputs
    return ArchitectureAdvisor(inputs, outputs, activation, residual=residual, **shape).suggest()


def _facts(advice: Advice) -> dict[str, Any]:
    point = advice.critical
    span = advice.r_range
    nu = advice.nu
    return {
        "activation": point.activation,
        "class": str(point.cls),
        "C_W": point.C_W,
        "C_b": point.C_b,
        "C_W at present": advice.present_C_W,
        "K*": point.K_star if point.K_star is not None else "any" if point.C_W is not None else None,
        "depth": advice.depth,
        "width": advice.width,
        "parameters": advice.parameters,
        "r = depth / width": advice.r,
        "r*": None if span is None else f"{advice.r_star:.3g} ({span[0]:.2g} to {span[1]:.2g})",
        "depth at r*": None if advice.r_star is None else max(1, round(advice.r_star * advice.width)),
        "nu": nu,
        "chaos from depth": None if nu is None else max(1, round(advice.width / nu)),
        "seeds differ by": None if advice.fluctuation is None else f"{100 * advice.fluctuation**0.5:.0f} % of K",
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _print_rates(advice: Advice) -> None:
    if not advice.rates:
        return
    shown = list(advice.rates)
    if len(shown) > SHOWN_LAYERS:
        half = SHOWN_LAYERS // 2
        shown = shown[:half] + shown[-half:]
    console().print("\nlearning rates for gradient descent, times eta (Adam: 1 / depth)", style="bold")
    rows = [(rate.layer, f"{rate.bias:.4g}", f"{rate.weight:.4g} / fan-in") for rate in shown]
    table(("layer", "biases", "weights"), rows)


def _page(title: str, advice: Advice) -> str:
    from quernel import __version__
    from quernel.report._advice_page import advice_page

    name = advice.critical.activation
    layers = range(1, len(advice.kernels) + 1)
    leading = [(float(layer), (advice.nu or 0.0) * layer / advice.width) for layer in layers]
    return advice_page(
        title,
        {key: _text(value) for key, value in _facts(advice).items() if value is not None},
        {name: [(float(layer), k) for layer, k in zip(layers, advice.kernels, strict=True)]},
        {
            "V / (n K²)": [(float(layer), v) for layer, v in zip(layers, advice.fluctuations, strict=True)],
            "nu l / n": leading,
        },
        [(rate.layer, rate.bias, rate.weight) for rate in advice.rates],
        advice.warnings,
        {"quernel": __version__, "python": platform.python_version()},
    )
