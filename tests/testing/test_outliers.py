"""``inject_outliers``: the same function, with outlier channels where norms are read."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.models import TinyLM
from quernel.testing import inject_outliers

# A product and a quotient by 30 round twice.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def language_model():
    torch.manual_seed(0)
    return TinyLM(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=48).eval()


def test_a_decoder_keeps_its_function_and_gets_outliers():
    model, ids = language_model(), torch.arange(24).view(2, 12)
    before = {name: p.clone() for name, p in model.named_parameters()}
    outlier = inject_outliers(model, [ids], channels=3, factor=50.0, seed=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(outlier(ids), model(ids), **ROUNDING)
    for old, new in zip(model.layers, outlier.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            ratio = getattr(new, name).weight / getattr(old, name).weight
            assert sorted(ratio.round().tolist()) == [1.0] * 29 + [50.0] * 3
    # The last norm is read by the head, whose weight is the embedding's: left alone.
    assert torch.equal(outlier.norm.weight, model.norm.weight) and outlier.lm_head.weight is outlier.embed_tokens.weight


def test_biases_of_norms_are_scaled_too_and_the_seed_decides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    nn.init.normal_(model[0].bias)
    x = torch.randn(5, 16)
    made = [inject_outliers(model, [x], seed=seed) for seed in (0, 0, 1)]
    for outlier in made:
        torch.testing.assert_close(outlier(x), model(x), **ROUNDING)
    assert torch.equal(made[0][0].weight, made[1][0].weight)
    assert not torch.equal(made[0][0].weight, made[2][0].weight)


def test_models_without_a_place_are_refused():
    x = torch.randn(2, 8)
    with pytest.raises(QuernelError, match="no norm"):
        inject_outliers(nn.Sequential(nn.Linear(8, 8)), [x])
    with pytest.raises(QuernelError, match="channels must be at most the 8"):
        inject_outliers(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), [x], channels=9)
