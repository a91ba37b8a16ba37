"""The wave solver: against the scheme node by node, a standing wave, its energy, its limits."""

import math

import pytest
import torch

from quernel._errors import QuernelError
from quernel.apps.wave_surrogate import WaveSolver
from quernel.apps.wave_surrogate.solver import STABLE
from tests.reference import factorized_conv as oracle

# float64 over some hundred steps.
EXACT = 1e-12


def medium(n, seed=0):
    """Return piecewise constant speeds between 0.5 and 1.5."""
    g = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(2, n // 4, n // 4, generator=g)).repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_is_the_five_point_scheme_where_the_speed_is_constant():
    start = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = WaveSolver(torch.full((9, 9), 1.3))
    frames = solver.solve(start, frames=4, every=3)
    assert torch.equal(frames[0], start)
    for i in (1, 2, 3):
        wanted = oracle.leapfrog(start.numpy(), 1.3, solver.dt, 3 * i)
        torch.testing.assert_close(frames[i], torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)  # 1.3 came as float32


def standing_error(n):
    """Return the error of the fundamental mode after a bit more than half a period."""
    axis = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    mode = torch.sin(math.pi * axis)[:, None] * torch.sin(math.pi * axis)
    solver = WaveSolver(torch.full((n, n), 2.0))
    steps = round(0.3 / solver.dt)
    end = solver.solve(mode, frames=2, every=steps)[1]
    wanted = mode * math.cos(math.sqrt(2) * math.pi * 2.0 * steps * solver.dt)
    return float((end - wanted).norm() / mode.norm())


def test_a_standing_wave_is_followed_to_second_order():
    coarse, fine = standing_error(15), standing_error(31)
    assert fine < 0.01
    # Half the spacing, a quarter of the error.
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_energy_is_conserved_over_any_medium():
    speed = medium(24)
    solver = WaveSolver(speed, courant=0.7)
    g = torch.Generator().manual_seed(1)
    before = torch.randn(2, 24, 24, generator=g, dtype=torch.float64)
    now = solver.first_step(before)
    start = solver.energy(now, before)
    assert bool((start > 0).all())
    for _ in range(300):
        now, before = solver.step(now, before), now
        assert float((solver.energy(now, before) / start - 1).abs().max()) < EXACT


def test_the_operator_is_symmetric_and_negative():
    solver = WaveSolver(medium(12))
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(2, 12, 12, generator=g, dtype=torch.float64) for _ in range(2))
    left, right = ((a * solver.operator(b)).sum((1, 2)) for a, b in ((u, v), (v, u)))
    torch.testing.assert_close(left, right)
    assert bool(((u * solver.operator(u)).sum((1, 2)) < 0).all())


def test_waves_travel_at_their_speed_and_no_faster():
    n, speed = 63, 1.0
    start = torch.zeros(n, n)
    start[n // 2, n // 2] = 1.0
    solver = WaveSolver(torch.full((n, n), speed))
    frames = solver.solve(start, frames=2, every=20)
    far = (torch.arange(n) - n // 2).abs()
    beyond = far[:, None] + far > 20  # a step reaches one neighbour
    assert float(frames[1][beyond].abs().max()) == 0.0


def test_steps_above_the_stability_limit_are_refused():
    speed = torch.full((8, 8), 2.0)
    assert WaveSolver(speed).courant == pytest.approx(0.5)
    WaveSolver(speed, courant=STABLE)
    with pytest.raises(QuernelError, match=r"unstable: the Courant number c dt / h is 0\.720.*Take dt <= 0\.0393"):
        WaveSolver(speed, dt=0.04)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WaveSolver(torch.ones(3, 4)), "speed must be of shape"),
        (lambda: WaveSolver(torch.zeros(3, 3)), "speed must be positive"),
        (lambda: WaveSolver(torch.full((3, 3), torch.nan)), "speed holds NaN"),
        (lambda: WaveSolver(torch.ones(3, 3), courant=0.0), "courant must be"),
        (lambda: WaveSolver(torch.ones(3, 3)).solve(torch.ones(4, 4), frames=2), "start must have the speed's shape"),
        (lambda: WaveSolver(torch.ones(3, 3)).solve(torch.ones(3, 3), frames=0), "frames must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
