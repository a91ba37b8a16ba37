"""The Nystrom product and Newton's inverse: identities, convergence, gradients, norms, masks and refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from torch import Tensor

from quernel._errors import QuernelError
from quernel.kernels import JitterWarning, gaussian_kernel
from quernel.nn.functional import newton_pinv, nystrom_apply
from tests.reference import soft_attention as reference

# Peaks, in MB, of the product beside what is there before, and of the exact matrix; in a process of its own.
PEAKS = """
import re
from pathlib import Path
import torch
from quernel.kernels import gaussian_kernel
from quernel.nn.functional import nystrom_apply

torch.set_num_threads(1)

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak(run):
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = status("VmRSS")
    with torch.no_grad():
        run()
    return status("VmHWM") - before

q, marks, v = torch.randn(16384, 32), torch.randn(64, 32), torch.randn(16384, 32)
nystrom_apply(q[:64], marks, v[:64], norm={norm!r})
print(peak(lambda: nystrom_apply(q, marks, v, norm={norm!r})), peak(lambda: gaussian_kernel(q, q) @ v))
"""
INVERSES = ("cholesky", "newton", "pinv")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def psd(condition: float, m: int = 12, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with eigenvalues from 1 / condition to 1, float64."""
    basis, _ = torch.linalg.qr(draw(m, m, seed=seed).double())
    return basis @ torch.diag(torch.logspace(0, -np.log10(condition), m, dtype=torch.float64)) @ basis.T


def patches(count: int) -> Tensor:
    """Return 4 x 4 patches of digits, centred, at a scale where the kernel is neither 0 nor 1."""
    images = torch.from_numpy(load_digits().images[:64]).double() / 16
    cut = images.unfold(1, 4, 2).unfold(2, 4, 2).reshape(-1, 16)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:count]]


@pytest.mark.parametrize("inverse", INVERSES)
def test_all_tokens_as_landmarks_give_the_exact_matrix(inverse: Any) -> None:
    q, v = 2 * draw(9, 3).double(), draw(9, 4, seed=1).double()
    options = {"eps": 1e-12, "norm": None, "inverse": inverse, "iters": 60}
    torch.testing.assert_close(nystrom_apply(q, q, v, **options), gaussian_kernel(q, q) @ v, rtol=1e-6, atol=1e-8)


def test_on_the_rows_of_landmarks_it_is_exact() -> None:
    q, marks = draw(20, 3).double(), 2 * draw(6, 3, seed=1).double()
    whole = torch.cat([marks, q])
    s = nystrom_apply(whole, marks, torch.eye(26, dtype=torch.float64), eps=1e-12, norm=None)
    torch.testing.assert_close(s[:6, :6], gaussian_kernel(marks, marks), rtol=1e-6, atol=1e-8)


def test_the_error_falls_with_more_landmarks() -> None:
    x = patches(160)
    exact = gaussian_kernel(x, x)
    errors = []
    for m in (4, 8, 16, 32, 64, 128):
        s = nystrom_apply(x, x[:m], torch.eye(len(x), dtype=torch.float64), eps=1e-10, norm=None)
        errors.append(float(torch.linalg.svdvals(exact - s).sum()))
    # Nested landmarks: the remainder is positive semi-definite and can only shrink.
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.1 * errors[0]


def test_it_is_the_nystrom_method_of_scikit_learn() -> None:
    x = patches(60).numpy()
    gamma = 1 / (2 * np.sqrt(16))
    theirs = Nystroem(gamma=gamma, n_components=12, random_state=0).fit(x)
    features = theirs.transform(x)
    scaled = torch.from_numpy(x) * 16**-0.25
    marks = torch.from_numpy(theirs.components_) * 16**-0.25
    s = nystrom_apply(scaled, marks, torch.eye(60, dtype=torch.float64), eps=1e-12, norm=None, inverse="pinv")
    torch.testing.assert_close(s, torch.from_numpy(features @ features.T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [None, "bottleneck", "token"])
@pytest.mark.parametrize("inverse", ["cholesky", "newton"])
def test_norms_are_their_formulas(norm: Any, inverse: Any) -> None:
    q, marks, v = draw(15, 3).double(), draw(5, 3, seed=1).double(), draw(15, 2, seed=2).double()
    got = nystrom_apply(q, marks, v, norm=norm, inverse=inverse, iters=40)
    torch.testing.assert_close(got, reference.implied(q, marks, 1e-2, norm) @ v)


@pytest.mark.parametrize("far", [0.0, 1 / 3])
def test_the_token_norm_bounds_the_matrix_for_any_length(far: float) -> None:
    for n in (64, 256, 1024):
        q, marks = draw(n, 8, seed=n), draw(16, 8, seed=n + 1)
        q[: int(far * n)] += 10.0
        s = nystrom_apply(q, marks, torch.eye(n), norm="token")
        assert float(torch.linalg.matrix_norm(s, 2)) <= 1.05


def test_without_a_norm_the_matrix_grows_with_the_length() -> None:
    sizes = []
    for n in (64, 1024):
        q = draw(n, 2, seed=n)
        sizes.append(float(torch.linalg.matrix_norm(nystrom_apply(q, q[::8], torch.eye(n), norm=None), 2)))
    assert sizes[1] > 8 * sizes[0]


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_newton_converges_monotonically_and_then_squares_its_error(condition: float) -> None:
    a, eye = psd(condition), torch.eye(12, dtype=torch.float64)
    residuals = [float(torch.linalg.matrix_norm(eye - a @ newton_pinv(a, iters, 0.0), 2)) for iters in range(1, 45)]
    above = [r for r in residuals if r > 1e-10]
    assert all(b < a for a, b in itertools.pairwise(above))
    # I - M X is squared by a step exactly, and symmetric matrices make that the square of its norm.
    for before, after in itertools.pairwise(above):
        assert abs(after - before**2) < 1e-6 * max(before**2, 1e-4)
    assert residuals[-1] < 1e-8


def test_twenty_steps_are_enough_for_a_condition_of_a_hundred() -> None:
    a = gaussian_kernel(draw(3, 24, 6), draw(3, 24, 6))
    wanted = torch.linalg.inv(a + 0.02 * torch.eye(24))
    assert float(torch.linalg.cond(a + 0.02 * torch.eye(24)).max()) < 150
    torch.testing.assert_close(newton_pinv(a, eps=0.02), wanted, rtol=1e-4, atol=1e-4)
    small = psd(100.0).float()
    torch.testing.assert_close(newton_pinv(small, eps=0.0), torch.linalg.inv(small), rtol=1e-4, atol=1e-4)


def test_without_eps_it_is_the_pseudo_inverse() -> None:
    # Rounding in the null space doubles with every step: no more of them than the condition asks for.
    root = draw(6, 3).double()
    a = root @ root.T
    torch.testing.assert_close(newton_pinv(a, 24, 0.0), torch.linalg.pinv(a, hermitian=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [0.05, 0.06, 0.5, 5.0])
def test_large_eps_beside_the_identity_does_not_diverge(eps: float) -> None:
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(newton_pinv(eye, 60, eps), eye / (1 + eps))


def test_a_divergence_falls_back_and_warns() -> None:
    a = psd(10.0).float()
    with pytest.warns(UserWarning, match="diverged"):
        x = newton_pinv(a, 60, 0.0, alpha=50.0)
    torch.testing.assert_close(x, torch.linalg.inv(a), rtol=1e-3, atol=1e-3)


def test_too_few_steps_for_close_landmarks_are_said() -> None:
    marks = 0.1 * draw(200, 32)
    q, v = 0.1 * draw(50, 32, seed=1), draw(50, 2, seed=2)
    exact = nystrom_apply(q, marks, v)
    with pytest.warns(UserWarning, match="has not converged"):
        nystrom_apply(q, marks, v, inverse="newton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Float32 at a condition of 1e4.
        torch.testing.assert_close(nystrom_apply(q, marks, v, inverse="newton", iters=32), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("inverse", INVERSES)
def test_landmarks_that_are_no_numbers_are_named(inverse: Any) -> None:
    marks = draw(3, 2)
    marks[1] = torch.nan
    with pytest.raises(QuernelError, match="l holds NaN or infinity"):
        nystrom_apply(draw(4, 2), marks, draw(4, 2), inverse=inverse)


def test_a_matrix_that_holds_no_numbers_is_named() -> None:
    with pytest.raises(QuernelError, match="a holds NaN or infinity"):
        newton_pinv(torch.full((3, 3), torch.nan))


def test_landmarks_that_repeat_raise_the_diagonal_and_warn() -> None:
    q, v = draw(8, 3), draw(8, 2, seed=1)
    marks = q[:3].repeat(2, 1)
    with pytest.warns(JitterWarning):
        twice = nystrom_apply(q, marks, v, eps=1e-12, norm=None)
    torch.testing.assert_close(twice, nystrom_apply(q, q[:3], v, eps=1e-12, norm=None), rtol=1e-3, atol=1e-3)


def test_the_factor_is_a_sound_custom_operation() -> None:
    a = psd(10.0).requires_grad_()
    torch.library.opcheck(torch.ops.quernel.cholesky_factor.default, (a,))
    weights = draw(12, 12).double()
    (got,) = torch.autograd.grad((torch.ops.quernel.cholesky_factor(a) * weights).sum(), a)
    (wanted,) = torch.autograd.grad((torch.linalg.cholesky(a) * weights).sum(), a)
    torch.testing.assert_close(got, wanted)


def test_the_dtype_is_that_of_the_inputs() -> None:
    q, marks, v = draw(6, 3), draw(3, 3, seed=1), draw(6, 2, seed=2)
    for norm in (None, "token"):
        wide = nystrom_apply(q, marks, v, norm=norm)
        half = nystrom_apply(q.bfloat16(), marks.bfloat16(), v.bfloat16(), norm=norm)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), wide, rtol=0.05, atol=0.05)
        assert nystrom_apply(q.double(), marks.double(), v.double(), norm=norm).dtype == torch.float64


def test_it_may_stop_early() -> None:
    a = psd(10.0)
    loose, tight = newton_pinv(a, 40, 0.0, tol=0.5), newton_pinv(a, 40, 0.0, tol=1e-9)
    eye = torch.eye(12, dtype=torch.float64)
    assert 1e-4 < float(torch.linalg.matrix_norm(eye - a @ loose)) < 0.5
    assert float(torch.linalg.matrix_norm(eye - a @ tight)) < 1e-9


def test_each_matrix_has_a_start_of_its_own() -> None:
    # An alpha from the whole batch would change the inverse of a matrix that stands beside a larger one.
    small = psd(50.0)
    both = torch.stack([small, 100 * small])
    assert torch.equal(newton_pinv(both, 12, 0.0)[0], newton_pinv(small[None], 12, 0.0)[0])


def test_the_gradient_is_that_of_an_inverse() -> None:
    a = psd(20.0).requires_grad_()
    (grad,) = torch.autograd.grad(newton_pinv(a, 40, 0.1).square().sum(), a)
    (wanted,) = torch.autograd.grad(torch.linalg.inv(a + 0.1 * torch.eye(12, dtype=a.dtype)).square().sum(), a)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_the_backward_keeps_one_matrix_whatever_the_steps() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        newton_pinv(psd(10.0).requires_grad_(), 500, 0.1)
    assert kept == [144]


@pytest.mark.parametrize("norm", [None, "bottleneck", "token"])
@pytest.mark.parametrize("inverse", ["cholesky", "newton"])
def test_gradients_of_the_product(norm: Any, inverse: Any) -> None:
    tensors = [t.double().requires_grad_() for t in (draw(2, 5, 2), draw(2, 3, 2, seed=1), draw(2, 5, 2, seed=2))]
    assert torch.autograd.gradcheck(
        lambda q, marks, v: nystrom_apply(q, marks, v, norm=norm, inverse=inverse, eps=0.1, iters=40), tensors
    )


def test_newton_is_a_sound_custom_operation() -> None:
    torch.library.opcheck(torch.ops.quernel.newton_inverse.default, (psd(10.0).requires_grad_(), 30, 0.1, 0.0, 0.0))


@pytest.mark.parametrize("norm", [None, "bottleneck", "token"])
def test_what_does_not_count_changes_nothing(norm: Any) -> None:
    q, marks, v = draw(8, 3), draw(4, 3, seed=1), draw(8, 2, seed=2)
    mask, landmark_mask = torch.arange(8) < 6, torch.arange(4) < 3
    got = nystrom_apply(q, marks, v, norm=norm, mask=mask, landmark_mask=landmark_mask)
    torch.testing.assert_close(got[:6], nystrom_apply(q[:6], marks[:3], v[:6], norm=norm), rtol=1e-4, atol=1e-5)


def test_no_tensor_of_all_pairs_is_made() -> None:
    """The largest is the n x m kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.size = max(self.size, out.untyped_storage().nbytes())
            return out

    with Largest() as seen:
        nystrom_apply(draw(1024, 4), draw(16, 4), draw(1024, 4))
    assert seen.size == 4 * 1024 * 16


def printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("norm", ["bottleneck", "token"])
def test_memory_is_that_of_tokens_times_landmarks(norm: Any) -> None:
    """At N = 16384, m = 64 at most a twentieth of the scores of all pairs, which the same process also measures."""
    ours, pairs = printed(PEAKS.format(norm=norm))
    scores = 4 * 16384**2 / 2**20
    assert pairs >= scores  # what is measured would be seen
    assert 0 < ours <= 0.05 * scores


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), inverse="qr"), "inverse"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), norm="row"), "norm"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), eps=0.0), "eps must be"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), eps=-1.0), "eps must be"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(3, 2)), "v must have a row"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 3), draw(4, 2)), "q and l must be"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), inverse="newton", iters=-1), "iters"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), iters=-1), "iters"),
        (lambda: nystrom_apply(draw(4, 2).int(), draw(2, 2), draw(4, 2)), "q must hold real floating-point"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2).int(), draw(4, 2)), "l must hold real floating-point"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2).cfloat()), "v must hold real floating-point"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), mask=torch.ones(4)), "mask must be boolean"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), mask=torch.ones(3) > 0), r"mask .* shape \(4,\)"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), landmark_mask=torch.ones(4) > 0), "landmark_mask"),
        (lambda: nystrom_apply(draw(4, 2), draw(2, 2), draw(4, 2), landmark_mask=torch.ones(2)), "landmark_mask"),
        (lambda: newton_pinv(draw(3, 4)), "a must be square"),
        (lambda: newton_pinv(draw(3, 3), 0), "iters"),
        (lambda: newton_pinv(draw(3, 3), eps=-1.0), "eps"),
        (lambda: newton_pinv(draw(3, 3), alpha=0.0), "alpha"),
        (lambda: newton_pinv(draw(3, 3), tol=0.0), "tol"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
