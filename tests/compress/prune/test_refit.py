"""Least-squares refit: outputs come closer, exact merges stay exact, hooks and masks are honoured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quernel.compress import Context, FeatureMerging
from tests.compress.prune._nets import CLOSE, IMAGES, NETS, apply, change, duplicated, mlp, net_and_input, widths


@pytest.mark.parametrize("name", NETS)
def test_refit_brings_outputs_closer(name: str) -> None:
    net, _ = net_and_input(name)
    data = [torch.randn(24, *NETS[name][1][1:]) for _ in range(2)]
    context = Context(data=data)
    options = {"beta": 1.0, "max_ratio": 0.4}
    plain, refitted = (apply(net, FeatureMerging(refit=r, **options), context) for r in (False, True))
    assert widths(plain, data[0]) == widths(refitted, data[0])
    fresh = torch.randn(64, *NETS[name][1][1:])
    errors = [float((m(fresh) - net(fresh)).square().mean().detach()) for m in (plain, refitted)]
    assert errors[1] < 0.7 * errors[0]


def test_refit_of_duplicates_changes_nothing() -> None:
    net, _ = net_and_input("batch norms and residuals")
    data = [torch.randn(64, *IMAGES[1:])]
    wide = duplicated(net, data[0])
    small = apply(wide, FeatureMerging(beta=0.0, refit=True), Context(data=data))
    assert change(small, net, data[0]) < CLOSE


def test_in_place_activations_do_not_spoil_the_targets() -> None:
    plain = mlp(6, 16, 12, 4)
    in_place = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in plain))
    method, context = FeatureMerging(beta=1.0, max_ratio=0.5, refit=True), Context(data=[torch.randn(64, 6)])
    one, other = apply(plain, method, context), apply(in_place, method, context)
    assert change(one, other, torch.randn(8, 6)) < CLOSE


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(6, 16, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.net(x) * attention_mask[..., None]

    model, method = Tokens(), FeatureMerging(beta=1.0, max_ratio=0.5, refit=True)
    x, mask = torch.randn(20, 5, 6), torch.arange(5) < torch.randint(1, 6, (20, 1))
    results = []
    for garbage in (0.0, 1e3):
        batch = {"x": torch.where(mask[..., None], x, garbage), "attention_mask": mask.long()}
        results.append(apply(model, method, Context(data=[batch])))
    for name, tensor in results[0].state_dict().items():
        torch.testing.assert_close(results[1].state_dict()[name], tensor)


def test_data_is_asked_for() -> None:
    assert FeatureMerging(refit=True).needs == {"graph", "data"}
    assert FeatureMerging().needs == {"graph"}
