"""ShiftAdd on small transformers: what it finds, its two stages, packing after training, saving, refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Budget, CrossQuant, ShiftAdd, compress, search
from quernel.compress._menu import default_methods
from quernel.nn import (
    BinaryLinearAttention,
    BinaryMultiheadAttention,
    CrossQuantLinear,
    MultShiftMoE,
    PackedShiftLinear,
    ShiftLinear,
    collect_aux_loss,
)

DIM = 32
FAST: dict[str, Any] = {"latencies": (6.0, 4.0)}  # nothing is measured


class Attention(nn.Module):
    def __init__(self, bias_table: bool = False) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        if bias_table:
            self.table = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = attention or Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.head((x + self.mlp(x)).mean(1))


def _model(attention: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    return Net(attention).eval()


X = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(1))


class Finetune:
    """Take a few steps, and remember what kinds of layers each call saw."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def __call__(self, model: nn.Module) -> None:
        self.seen.append({type(m).__name__ for m in model.modules()})
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            (model(X).square().mean() + collect_aux_loss(model)).backward()
            optimizer.step()
        model.eval()


def _kinds(model: Net) -> dict[str, type]:
    names = ("attn", "attn.qkv", "attn.proj", "mlp.0", "mlp.2", "head")
    return {name: type(model.get_submodule(name)) for name in names}


def test_codes_alone_need_no_training() -> None:
    result = compress(_model(), ShiftAdd(None, "shift", "shift", bits=4), data=[X], exclude=("head",))
    assert _kinds(result.model) == {
        "attn": Attention,
        "attn.qkv": PackedShiftLinear,
        "attn.proj": PackedShiftLinear,
        "mlp.0": PackedShiftLinear,
        "mlp.2": PackedShiftLinear,
        "head": nn.Linear,
    }
    assert result.report.summary == {"attention modules": 0, "mixtures": 0, "shift layers": 4}


def test_projections_and_the_rest_are_told_apart() -> None:
    kinds = _kinds(compress(_model(), ShiftAdd(None, None, "shift")).model)
    assert kinds["attn.qkv"] is PackedShiftLinear and kinds["mlp.0"] is nn.Linear
    kinds = _kinds(compress(_model(), ShiftAdd(None, "shift")).model)
    assert kinds["attn.qkv"] is nn.Linear and kinds["mlp.0"] is PackedShiftLinear


def test_two_stages_and_packing_at_the_end() -> None:
    finetune = Finetune()
    method = ShiftAdd("binary", "mixture", "shift", **FAST)
    result = compress(_model(), method, data=[X], finetune=finetune, exclude=("head",))
    first, second = finetune.seen
    assert "BinaryLinearAttention" in first and not {"ShiftLinear", "MultShiftMoE"} & first
    assert {"BinaryLinearAttention", "ShiftLinear", "MultShiftMoE"} <= second
    kinds = _kinds(result.model)
    assert kinds["attn"] is BinaryLinearAttention and kinds["attn.qkv"] is PackedShiftLinear
    assert kinds["mlp.0"] is MultShiftMoE and type(result.model.mlp[0].shift) is PackedShiftLinear
    assert not any(isinstance(m, ShiftLinear) for m in result.model.modules())
    assert result.report.summary == {"attention modules": 1, "mixtures": 2, "shift layers": 2}
    assert bool(result.model(X).isfinite().all())


def test_attention_alone_is_trained_once() -> None:
    finetune = Finetune()
    compress(_model(), ShiftAdd("binary", None), finetune=finetune, data=[X])
    assert len(finetune.seen) == 1


def test_trained_codes_are_those_that_are_packed() -> None:
    kept: list[Tensor] = []

    def finetune(model: nn.Module) -> None:
        Finetune()(model)
        kept.append(model.get_submodule("mlp.0").shifted_weight().detach())  # type: ignore[operator]

    model = compress(_model(), ShiftAdd(None, "shift"), data=[X], finetune=finetune).model
    torch.testing.assert_close(model.mlp[0].weight.dense(), kept[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("projections", [None, "shift", "mixture"])
def test_torch_attention_is_replaced_with_its_projections(projections: Any) -> None:
    method = ShiftAdd("binary", None, projections, **FAST)
    model = compress(_model(TorchAttention()), method, data=[X], finetune=Finetune()).model
    inner = model.attn.inner
    assert type(inner) is BinaryMultiheadAttention
    wanted = {None: nn.Linear, "shift": PackedShiftLinear, "mixture": MultShiftMoE}[projections]
    assert type(inner.qkv) is wanted and type(inner.proj) is wanted


def test_attention_that_has_more_than_projections_is_left_alone() -> None:
    report = compress(_model(Attention(bias_table=True)), ShiftAdd("binary", "shift"), finetune=Finetune()).report
    layer = next(layer for layer in report.layers if layer.name == "attn")
    assert layer.action == "skip" and "tensors of its own: table" in layer.reason


def test_causal_attention_is_left_alone() -> None:
    attention = Attention()
    attention.is_causal = True  # type: ignore[assignment]
    report = compress(_model(attention), ShiftAdd("binary", "shift"), finetune=Finetune()).report
    assert next(layer.reason for layer in report.layers if layer.name == "attn") == "it is causal"


def test_fused_blocks_of_torch_are_left_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(DIM, 4, DIM, batch_first=True), nn.Linear(DIM, DIM)).eval()
    result = compress(model, ShiftAdd("binary", "shift"), data=[X], finetune=lambda m: None)
    assert type(result.model[0].self_attn) is nn.MultiheadAttention
    assert type(result.model[1]) is PackedShiftLinear


def test_layers_already_quantised_or_tied_or_tiny_are_left_alone() -> None:
    quantised = compress(_model(), CrossQuant(activations="keep"), data=[X]).model
    with pytest.raises(QuernelError, match="nothing to compress"):
        compress(quantised, ShiftAdd(None, "shift", "shift"))
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    report = compress(model, ShiftAdd(None, "shift"), include=("1", "2")).report
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "tied to 0.weight" in reasons["1"] and "would not be smaller" in reasons["2"]


def test_both_orders_quantise_each_layer_once() -> None:
    methods = [CrossQuant(activations="keep"), ShiftAdd(None, "shift", "shift")]
    for order in (methods, methods[::-1]):
        model = compress(_model(), order, data=[X]).model
        kinds = {type(m) for m in model.modules()} & {CrossQuantLinear, PackedShiftLinear, nn.Linear}
        assert kinds == {CrossQuantLinear if order is methods else PackedShiftLinear}


def test_results_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    method = ShiftAdd("binary", "mixture", "shift", bits=4, **FAST)
    result = compress(_model(), method, data=[X], finetune=Finetune())
    result.save(tmp_path / "model")
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import sys, torch, quernel; sys.path.insert(0, sys.argv[1])\n"
        "from tests.compress.test_shift_add import Net\n"
        "model = quernel.load(sys.argv[2] + '/model', model=Net)\n"
        "torch.save(model(torch.load(sys.argv[2] + '/x.pt')), sys.argv[2] + '/y.pt')"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, root, str(tmp_path)], check=True)
    # Another process may take sums in another order: its memory is aligned otherwise.
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), result.model(X), rtol=1e-5, atol=1e-6)


def test_result_compiles_and_exports() -> None:
    model = compress(_model(), ShiftAdd("binary", "shift", "shift"), data=[X], finetune=Finetune()).model
    with torch.no_grad():
        wanted = model(X)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), wanted)
        assert torch.equal(torch.export.export(model, (X,), strict=False).module()(X), wanted)


def test_routers_follow_the_seed_and_nothing_else() -> None:
    def routers(seed: int) -> Tensor:
        method = ShiftAdd(None, "mixture", seed=seed, **FAST)
        model = compress(_model(), method, data=[X], finetune=lambda m: None).model
        return torch.cat([m.router.detach().flatten() for m in model.modules() if isinstance(m, MultShiftMoE)])

    assert torch.equal(routers(0), routers(0)) and not torch.equal(routers(0), routers(1))


def test_dry_run_trains_nothing() -> None:
    finetune = Finetune()
    report = compress(_model(), ShiftAdd(**FAST), data=[X], finetune=finetune, dry_run=True).report
    assert not finetune.seen
    assert {layer.name: layer.action for layer in report.layers}["attn"] == "binary attention"


def test_menu_follows_what_the_caller_gives() -> None:
    without = [m for m in default_methods(frozenset({"data"})) if isinstance(m, ShiftAdd)]
    assert {(m.attention, m.mlp, m.bits) for m in without} == {(None, "shift", 4), (None, "shift", 5)}
    trained = [m for m in default_methods(frozenset({"data", "finetune"})) if isinstance(m, ShiftAdd)]
    assert {m.mlp for m in trained if m.attention} == {"shift", "mixture"}


def test_a_search_finishes_its_candidates() -> None:
    model = _model()
    reference = model(X)

    def near(candidate: nn.Module) -> float:
        return -float((candidate(X) - reference).norm().detach())

    codes = ShiftAdd(None, "shift", "shift", bits=4)
    result = search(model, Budget(bytes=0.9), [codes], data=[X], evaluate=near, finetune=Finetune())
    assert result.satisfied
    assert any(isinstance(m, PackedShiftLinear) for m in result.model.modules())


def test_description_survives_json() -> None:
    method = ShiftAdd(latencies=(6.0, 4.0), bits=4)
    assert ShiftAdd.from_config(json.loads(json.dumps(method.config()))) == method
    assert copy.deepcopy(method) == method


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="ask for at least one replacement"):
        ShiftAdd(None, None, None)
    for bits in (2, 7):
        with pytest.raises(QuernelError, match=rf"bits must be an integer in \[3, 6\]; got {bits}"):
            ShiftAdd(bits=bits)
    for latencies in ((0.0, 1.0), (1.0,), (-1.0, 2.0), "now"):
        with pytest.raises(QuernelError, match="latencies must be"):
            ShiftAdd(latencies=latencies)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="conv_kernel must be odd"):
        ShiftAdd(conv_kernel=8)
    with pytest.raises(QuernelError, match="mlp must be one of"):
        ShiftAdd(mlp="dense")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="needs finetune; pass finetune="):
        compress(_model(), ShiftAdd(**FAST), data=[X])


def test_it_is_public() -> None:
    assert quernel.compress.ShiftAdd is ShiftAdd
