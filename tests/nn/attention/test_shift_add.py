"""``BinaryLinearAttention``: against the definition, batch independence, running thresholds, masks, nested layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quernel._errors import QuernelError
from quernel.nn import BinaryLinearAttention, PackedShiftLinear
from quernel.nn.attention.shift_add import MOMENTUM
from tests.reference import shiftaddvit as reference

# float32 sums of some hundred terms.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Softmax(nn.Module):
    """Attention as most vision transformers write it."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


def _wanted(mixer: BinaryLinearAttention, x: Tensor, limits: Any, **options: Any) -> Tensor:
    """Compute the layer head by head; x: (B, N, C), limits: a pair of (H,) or None."""
    q, k, v = mixer.qkv(x).unflatten(-1, (3, mixer.num_heads, -1)).permute(2, 0, 3, 1, 4).detach()
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            pair = (None, None) if limits is None else (float(limits[0][h]), float(limits[1][h]))
            conv = mixer.conv.detach()[h]
            out[b, h] = reference.binary_attention(q[b, h], k[b, h], v[b, h], conv, *pair, **options)
    return mixer.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("constant", ["self", "sum"])
def test_eval_uses_the_running_means(constant: str) -> None:
    mixer = BinaryLinearAttention(16, 2, constant=constant, conv_kernel=3).eval()
    mixer.tau_means.copy_(torch.tensor([[0.1, -0.1], [0.05, 0.0]]))
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(mixer(x), _wanted(mixer, x, mixer.tau_means, constant=constant), **CLOSE)


def test_training_uses_and_averages_the_means_of_the_batch() -> None:
    mixer = BinaryLinearAttention(16, 2, conv_kernel=3)
    x = torch.randn(3, 7, 16)
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).detach()
    means = torch.stack([nn.functional.normalize(y, dim=-1).mean((0, 2, 3)) for y in (q, k)])
    torch.testing.assert_close(mixer(x), _wanted(mixer, x, means), **CLOSE)
    torch.testing.assert_close(mixer.tau_means, MOMENTUM * means, **CLOSE)
    before = mixer.tau_means.clone()
    mixer.eval()(x)
    assert torch.equal(mixer.tau_means, before)


def test_row_means_are_those_of_each_row_in_both_modes() -> None:
    mixer = BinaryLinearAttention(16, 2, tau="row", conv_kernel=3)
    x = torch.randn(2, 5, 16)
    wanted = _wanted(mixer, x, None)
    torch.testing.assert_close(mixer(x), wanted, **CLOSE)
    torch.testing.assert_close(mixer.eval()(x), wanted, **CLOSE)


@pytest.mark.parametrize(("tau", "independent"), [("running", True), ("row", True), ("batch", False)])
def test_a_sample_alone_gives_the_same_but_for_the_whole_batch_mean(tau: Any, independent: bool) -> None:
    mixer = BinaryLinearAttention(32, 4, tau=tau).eval()
    x = torch.randn(6, 20, 32) + torch.linspace(-3, 3, 6).view(-1, 1, 1)
    alone = torch.cat([mixer(row) for row in x.split(1)])
    assert torch.allclose(alone, mixer(x), **CLOSE) is independent


def test_whole_batch_mean_is_one_number() -> None:
    mixer = BinaryLinearAttention(16, 2, tau="batch", conv_kernel=3).eval()
    x = torch.randn(2, 5, 16)
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).detach()
    means = [nn.functional.normalize(y, dim=-1).mean().expand(2) for y in (q, k)]
    torch.testing.assert_close(mixer(x), _wanted(mixer, x, means), **CLOSE)


def test_tokens_of_images_count_row_by_row() -> None:
    mixer = BinaryLinearAttention(16, 2).eval()
    x = torch.randn(2, 3, 4, 16)
    assert torch.equal(mixer(x), mixer(x.flatten(1, 2)).view_as(x))


@pytest.mark.parametrize("tau", ["running", "row", "batch"])
def test_masked_tokens_are_as_if_absent(tau: Any) -> None:
    x, mask = torch.randn(1, 9, 16), torch.arange(9)[None] < 6
    for mode in (True, False):
        mixers = [BinaryLinearAttention(16, 2, tau=tau, constant="sum").train(mode) for _ in range(2)]
        mixers[1].load_state_dict(mixers[0].state_dict())
        wanted = mixers[1](x[:, :6])
        torch.testing.assert_close(mixers[0](x, mask=mask)[:, :6], wanted, **CLOSE)
        for got, kept in zip(mixers[0].buffers(), mixers[1].buffers(), strict=True):
            torch.testing.assert_close(got, kept, **CLOSE)


def test_sparse_branch_is_for_training_only() -> None:
    mixer = BinaryLinearAttention(16, 2, tau="row", sparse=0.1)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(mixer(x), _wanted(mixer, x, None, sparse=0.1), **CLOSE)
    torch.testing.assert_close(mixer.eval()(x), _wanted(mixer, x, None), **CLOSE)


def test_projections_of_a_trained_attention_are_taken_over() -> None:
    attention = Softmax()
    mixer = BinaryLinearAttention.from_attention(attention, tau="row")
    assert mixer.qkv is attention.qkv and mixer.proj is attention.proj
    assert not mixer.conv.any()
    torch_own = nn.MultiheadAttention(16, 2, bias=False)
    mixer = BinaryLinearAttention.from_attention(torch_own)
    assert mixer.qkv.weight is torch_own.in_proj_weight and mixer.qkv.bias is None


def test_layers_that_other_methods_put_inside_are_written_down() -> None:
    mixer = BinaryLinearAttention(16, 2).eval()
    mixer.qkv = PackedShiftLinear.from_linear(mixer.qkv, bits=5)
    twin = BinaryLinearAttention.from_config(mixer.config()).eval()
    twin.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(twin(x), mixer(x))
    mixer.proj = nn.Sequential(mixer.proj)
    with pytest.raises(QuernelError, match="neither a registered module nor a plain layer"):
        mixer.config()


def test_autocast_and_half_precision_weights() -> None:
    mixer, x = BinaryLinearAttention(32, 4), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    assert mixer.eval().bfloat16()(x.bfloat16()).dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_linear_in_tokens(training: bool) -> None:
    mixer, sizes = BinaryLinearAttention(64, 4).train(training), []
    for tokens in (512, 2048):
        with Largest() as largest:
            mixer(torch.randn(1, tokens, 64)).sum().backward()
        sizes.append(largest.size)
    assert sizes[1] == 4 * sizes[0]


def test_cost_is_linear_in_tokens() -> None:
    mixer = BinaryLinearAttention(64, 4)
    assert mixer.flops((1, 2048, 64)) == 2 * mixer.flops((1, 1024, 64))
    assert mixer.flops((1, 8, 8, 64)) == 2 * 64 * 64 * (4 * 64 + 2 * 16 + 9)


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="num_heads must divide dim=16; got 3"):
        BinaryLinearAttention(16, 3)
    with pytest.raises(QuernelError, match="conv_kernel must be odd"):
        BinaryLinearAttention(16, 2, conv_kernel=4)
    with pytest.raises(QuernelError, match="tau must be one of"):
        BinaryLinearAttention(16, 2, tau="mean")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="codes must be one of 'sign'"):
        BinaryLinearAttention(16, 2, codes="hash")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match=r"x must have shape \(batch, \.\.\., 16\)"):
        BinaryLinearAttention(16, 2)(torch.zeros(5, 16))
    with pytest.raises(QuernelError, match="mask must have shape"):
        BinaryLinearAttention(16, 2)(torch.zeros(2, 5, 16), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(QuernelError, match="attention must be nn"):
        BinaryLinearAttention.from_attention(nn.Linear(4, 4))
    with pytest.raises(QuernelError, match="qkv must be a linear layer"):
        BinaryLinearAttention.over(nn.Linear(8, 16), nn.Linear(8, 8), 2)
    with pytest.raises(QuernelError, match="one size"):
        BinaryLinearAttention.from_attention(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
