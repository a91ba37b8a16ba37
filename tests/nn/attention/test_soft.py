"""Softmax-free attention: the exact form against loops, the approximation against it, landmarks, grids, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn import GaussianAttention, MetaBlock, SoftmaxFreeAttention, make_mixer
from tests.reference import soft_attention as reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*args: Any, **options: Any) -> SoftmaxFreeAttention:
    torch.manual_seed(0)
    return SoftmaxFreeAttention(*args, **options)


def test_the_exact_form_is_a_loop() -> None:
    torch.manual_seed(0)
    layer, x = GaussianAttention(6, 2).double(), draw(7, 6).double()
    torch.testing.assert_close(layer(x[None])[0], reference.exact(x, layer))


@pytest.mark.parametrize("norm", ["token", None])
def test_with_all_tokens_as_landmarks_it_is_the_exact_form(norm: Any) -> None:
    mixer = made(6, 2, landmarks=12, conv_size=None, norm=norm, eps=1e-9).double()
    exact = GaussianAttention(6, 2).double()
    exact.load_state_dict(mixer.state_dict())
    x = draw(2, 3, 4, 6).double()
    if norm is None:
        torch.testing.assert_close(mixer(x), exact(x), rtol=1e-5, atol=1e-6)
    else:
        q, _v = exact._heads(x.flatten(1, 2))
        for b, h in ((0, 0), (1, 1)):
            s = reference.implied(q[b, h], q[b, h], 1e-9, "token")
            got = mixer(x).flatten(1, 2)[b]
            assert got.shape == (12, 6)
            assert float(torch.linalg.matrix_norm(s, 2)) < 1 + 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"landmarks": "pool"}, {"landmarks": 5}, {"inverse": "newton", "norm": "token"}]
)
def test_gradients(options: dict[str, Any]) -> None:
    mixer = made(4, 2, 2, conv_size=3, eps=0.1, **options).double()
    with torch.no_grad():
        mixer.query.weight.mul_(0.3)
    assert torch.autograd.gradcheck(mixer, (draw(1, 3, 4, 4).double().requires_grad_(),))


def test_landmarks_are_a_strided_convolution_norm_and_gelu() -> None:
    mixer, x = made(8, 2, ratio=2), draw(1, 4, 6, 8)
    q, _ = mixer._heads(x.flatten(1, 2))
    got, _ = mixer._landmarks(q, None, (4, 6))
    assert got.shape == (1, 2, 6, 4)
    for h in range(2):
        grid = q[0, h].T.reshape(4, 4, 6)
        for m, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
            cell = grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            mark = (mixer.reduce.weight * cell).sum((1, 2, 3))
            wanted = torch.nn.functional.gelu(mixer.reduce_norm(mark))
            torch.testing.assert_close(got[0, h, m], wanted, **CLOSE)


def test_pooled_landmarks_are_means_of_the_tokens_that_count() -> None:
    mixer, x = made(4, 1, ratio=2, landmarks="pool"), draw(1, 3, 3, 4)
    q, _ = mixer._heads(x.flatten(1, 2))
    marks, _ = mixer._landmarks(q, None, (3, 3))
    grid = q[0, 0].reshape(3, 3, 4)
    cells = [grid[a, b].reshape(-1, 4).mean(0) for a in (slice(0, 2), slice(2, 3)) for b in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(marks[0, 0], torch.stack(cells), **CLOSE)


def test_random_landmarks_are_queries_drawn_anew_in_training_alone() -> None:
    mixer, x = made(8, 2, 2, landmarks="random"), draw(3, 5, 4, 8)
    q, _v = mixer._heads(x.flatten(1, 2))
    torch.manual_seed(1)
    first, second = (mixer._landmarks(q, None, (5, 4))[0] for _ in range(2))
    assert first.shape == (3, 2, 6, 4) and not torch.equal(first, second)
    # Each is a query, none twice, at the same place in every sample and head.
    same = (q[:, :, :, None] == first[:, :, None]).all(-1)
    assert (same.sum(2) == 1).all() and torch.equal(same, same[:1, :1].expand_as(same))
    torch.manual_seed(1)
    assert torch.equal(mixer._landmarks(q, None, (5, 4))[0], first)
    evenly = made(8, 2, 2, landmarks=6).eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(mixer.eval()(x), evenly(x), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    # Masked tokens are drawn too and do not count.
    mask = torch.arange(20).view(1, 5, 4).expand(3, 5, 4) < 9
    masked, hidden = mixer.train(), x.masked_fill(~mask[..., None], 7.0)
    torch.manual_seed(2)
    got = masked(x, mask=mask)
    torch.manual_seed(2)
    torch.testing.assert_close(masked(hidden, mask=mask)[mask], got[mask])
    assert mixer.config()["landmarks"] == "random"


def test_heads_share_their_landmarks_convolution_and_have_a_skip_kernel_each() -> None:
    mixer = made(12, 3, ratio=4, conv_size=5)
    assert mixer.reduce.weight.shape == (4, 4, 4, 4) and mixer.reduce.bias is None
    assert mixer.skip.shape == (3, 1, 5, 5)
    with torch.no_grad():
        mixer.query.weight.fill_(0.0)
        mixer.query.bias.fill_(0.0)
    delta = torch.zeros_like(mixer.skip)
    delta[:, 0, 2, 2] = torch.tensor([1.0, 2.0, 3.0])
    x = draw(1, 8, 8, 12)
    with torch.no_grad():
        mixer.skip.zero_()
        without = mixer(x)
        mixer.skip.copy_(delta)
        values = mixer.value(x).unflatten(-1, (3, 4)) * torch.tensor([1.0, 2.0, 3.0])[:, None]
        torch.testing.assert_close(mixer(x) - without, values.flatten(-2) @ mixer.proj.weight.T, **CLOSE)


def test_at_initialisation_the_convolution_carries_the_signal() -> None:
    mixer, x = made(64, 2, ratio=4), draw(1, 16, 16, 64)
    with torch.no_grad():
        mixer.query.weight.copy_(torch.eye(64))  # queries of unit variance in 32 dimensions
        whole = mixer(x) - mixer.proj.bias
        mixer.skip.zero_()
        kernel = mixer(x) - mixer.proj.bias
    assert float(kernel.norm()) < 0.1 * float(whole.norm())


def test_tokens_can_be_reordered_given_their_landmarks() -> None:
    from quernel.nn.functional import nystrom_apply

    q, marks, v, order = draw(9, 3), draw(4, 3, seed=1), draw(9, 2, seed=2), torch.randperm(9)
    got = nystrom_apply(q[order], marks, v[order], norm="token")
    torch.testing.assert_close(got, nystrom_apply(q, marks, v, norm="token")[order], **CLOSE)


@pytest.mark.filterwarnings("ignore:Newton's iteration has not converged")
def test_samples_do_not_depend_on_each_other_by_newton() -> None:
    mixer = made(8, 2, inverse="newton", iters=6)
    x = draw(3, 6, 6, 8)
    x[2] *= 50
    torch.testing.assert_close(mixer(x)[:1], mixer(x[:1]), **CLOSE)


def test_one_axis() -> None:
    mixer = make_mixer("soft-attention", 8, num_heads=2, ratio=3, ndim=1)
    assert mixer(draw(2, 10, 8)).shape == (2, 10, 8)
    with pytest.raises(QuernelError, match="1 axes"):
        mixer(draw(2, 3, 4, 8))


def test_flops_count_the_products() -> None:
    # 16 tokens of 8 channels, 2 heads, 4 landmarks: projections, reduction, kernels and solves, skip.
    wanted = 6 * 16 * 64 + 2 * (6 * 16 * 4 * 4 + 2 * 16 * 4 + 64 // 3 + 2 * 16 * 4) + 2 * 16 * 8 * 4 + 2 * 16 * 8 * 9
    assert made(8, 2).flops((1, 4, 4, 8)) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(8, 3), "num_heads must divide"),
        (lambda: made(8, 2, 0), "ratio"),
        (lambda: made(8, 2, landmarks="sampled"), "landmarks"),
        (lambda: made(8, 2, landmarks=0), "landmarks"),
        (lambda: made(8, 2, conv_size=4), "conv_size must be odd"),
        (lambda: made(8, 2, eps=0.0), "eps"),
        (lambda: made(8, 2, norm="rows"), "norm"),
        (lambda: made(8, 2, inverse="lu"), "inverse"),
        (lambda: made(8, 2, causal=True), "causal=True is not possible"),
        (lambda: made(8, 2, ndim=3), "ndim"),
        (lambda: made(8, 2, landmarks=50)(draw(1, 3, 3, 8)), "at most the number of tokens"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianAttention(8, 2),
        *(lambda inverse=inverse: made(8, 2, inverse=inverse) for inverse in ("cholesky", "newton", "pinv")),
        lambda: MetaBlock(made(8, 2)),
    ],
    ids=["exact", "cholesky", "newton", "pinv", "block"],
)
def test_it_compiles_whole_with_gradients(make: Any) -> None:
    torch.manual_seed(0)
    layer, x = make(), draw(2, 5, 6, 8).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got, wanted = (torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (compiled, layer))
    torch.testing.assert_close(got, wanted, **CLOSE)
    torch.compiler.reset()
