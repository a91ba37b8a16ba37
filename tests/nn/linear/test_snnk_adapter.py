"""Adapters: nothing changes at step 0, little trains, everything is saved, and it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.models import SentenceEncoder
from quernel.nn import AdaptedLinear, CrossQuantLinear, SNNKAdapter, add_snnk_adapters

TINY = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TINY |= {"num_hidden_layers": 2, "vocab_size": 64}


def encoder() -> SentenceEncoder:
    return SentenceEncoder(TINY).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", [{}, {"down": 4}, {"down": 4, "ln_before": True}, {"projection": "hadamard"}], ids=str
)
def test_nothing_changes_at_step_0_bit_for_bit(options: dict[str, Any]) -> None:
    model = encoder()
    with torch.no_grad():
        before = model(tokens())
        trained = add_snnk_adapters(model, n_features=8, **options)
        assert torch.equal(model(tokens()), before)
    names = {n.rpartition("adapter.")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == ({"snnk.weight", "scale"} if "down" not in options else {"snnk.weight", "up.weight", "up.bias"})
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    size = 8 * 16 + 16 if "down" not in options else 8 * 4 + 4 * 16 + 16
    assert sum(p.numel() for p in trained) == 4 * size  # two places a layer, two layers


def test_directions_are_buffers_that_are_saved_and_follow() -> None:
    adapter = SNNKAdapter(6, 8, generator=torch.Generator().manual_seed(1))
    same = SNNKAdapter(6, 8, generator=torch.Generator().manual_seed(1))
    assert "snnk.phi.directions" in adapter.state_dict()
    assert torch.equal(adapter.snnk.phi.directions, same.snnk.phi.directions)
    assert adapter.double().snnk.phi.directions.dtype is torch.float64
    assert not adapter.snnk.phi.directions.requires_grad


def test_training_moves_only_the_adapters() -> None:
    model = encoder()
    trained = add_snnk_adapters(model, n_features=8, down=4, ln_before=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(tokens()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


def test_an_adapted_model_loads_from_its_folder_alone(tmp_path: Any) -> None:
    model = encoder()
    for parameter in add_snnk_adapters(model, n_features=8, down=4):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    twin = quernel.load(save_model(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(twin(tokens()), model(tokens()))


def test_adapters_stand_on_compressed_layers_too(tmp_path: Any) -> None:
    model = nn.Sequential(CrossQuantLinear.from_linear(nn.Linear(8, 8), absmax=torch.ones(8)), nn.Linear(8, 4))
    x = torch.randn(3, 8)
    before = model(x).detach()
    add_snnk_adapters(model, ("0",), n_features=4)
    assert torch.equal(model(x), before)
    twin = quernel.load(save_model(model, tmp_path), model=lambda: nn.Sequential(nn.Identity(), nn.Linear(8, 4)))
    assert torch.equal(twin(x), before)
    assert type(twin[0]) is AdaptedLinear and type(twin[0].linear) is CrossQuantLinear


def test_a_shared_layer_gets_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(add_snnk_adapters(model, ("0",), n_features=4)) == 2
    assert model[0] is model[2]


def test_refusals_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.TransformerEncoderLayer(4, 1, 8, batch_first=True))
    for targets, message in (
        (("missing",), "no module of Sequential has a name that ends in missing"),
        (("1",), "'1' is a ReLU; targets must name linear layers"),
        (("linear1",), "fused attention"),
        ("0", "wrap it"),
        (("near1",), "no module"),  # whole parts of names only
    ):
        with pytest.raises(QuernelError, match=message):
            add_snnk_adapters(model, targets)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(QuernelError, match="dim must be"):
        SNNKAdapter(0)
    with pytest.raises(QuernelError, match="down must be"):
        SNNKAdapter(4, down=0)
    with pytest.raises(QuernelError, match="ln_before must be bool"):
        SNNKAdapter(4, ln_before=1)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="adapter has size 3"):
        AdaptedLinear(nn.Linear(4, 4), SNNKAdapter(3, 4))
    with pytest.raises(QuernelError, match=r"linear must be nn\.Linear"):
        AdaptedLinear(nn.ReLU(), SNNKAdapter(3, 4))
