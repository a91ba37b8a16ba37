"""``WaveSolver``: the 2-D wave equation u_tt = div(c^2 grad u) on the unit square by leapfrog finite differences.

    u+ = 2 u - u- + dt^2 D u,   (D u)_p = sum over the four neighbours q of  c^2_pq (u_q - u_p) / h^2

with u = 0 on the walls and c^2_pq the harmonic mean of both sides, as a flux through an interface wants it; where c is
constant this is the 5-point scheme.  D is symmetric, so a discrete energy is conserved exactly but for rounding.
Stable for c dt / h <= 1 / sqrt(2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int

#: Largest stable Courant number c dt / h of the scheme.
STABLE = 1 / math.sqrt(2)


class WaveSolver:
    """Solve the wave equation for a batch of speed maps, from fields at rest.

    Parameters
    ----------
    speed : Tensor, shape (N, n, n) or (n, n)
        Wave speed c > 0 at the inner nodes of the unit square, whose spacing is h = 1 / (n + 1).
    dt : float, optional
        Time step; default is the Courant number ``courant`` at the largest speed.
    courant : float, default=0.5
        c dt / h where ``dt`` is not given.

    Raises
    ------
    QuernelError
        If the speed is not positive and square, or the step is unstable.

    Examples
    --------
    >>> import torch
    >>> solver = WaveSolver(torch.ones(16, 16))
    >>> frames = solver.solve(torch.eye(16), frames=5, every=2)
    >>> tuple(frames.shape), round(solver.courant, 3)
    ((5, 16, 16), 0.5)
    """

    def __init__(self, speed: Tensor, *, dt: float | None = None, courant: float = 0.5) -> None:
        if speed.ndim not in (2, 3) or speed.shape[-1] != speed.shape[-2] or 0 in speed.shape:
            raise QuernelError(f"speed must be of shape (n, n) or (N, n, n); got {tuple(speed.shape)}")
        check_finite("speed", speed)
        if not bool((speed > 0).all()):
            raise QuernelError(f"speed must be positive everywhere; got {float(speed.min())}")
        check_float("courant", courant, low=0.0, open_low=True)
        # A difference of nearly equal numbers every step: float32 would lose the energy's last digits.
        self.speed = speed.to(torch.float64)
        self.h = 1 / (speed.shape[-1] + 1)
        top = float(self.speed.max())
        self.dt = courant * self.h / top if dt is None else check_float("dt", dt, low=0.0, open_low=True)
        self.courant = top * self.dt / self.h
        if self.courant > STABLE:
            raise QuernelError(
                f"the scheme is unstable: the Courant number c dt / h is {self.courant:.3f}, above 1 / sqrt(2). "
                f"Take dt <= {STABLE * self.h / top:.3g}"
            )
        square = self.speed**2
        inner = (
            2 * square[..., 1:, :] * square[..., :-1, :] / (square[..., 1:, :] + square[..., :-1, :]),
            2 * square[..., :, 1:] * square[..., :, :-1] / (square[..., :, 1:] + square[..., :, :-1]),
        )
        # A face on a wall has the speed of the node inside.
        self._vertical = torch.cat([square[..., :1, :], inner[0], square[..., -1:, :]], dim=-2)  # (..., n + 1, n)
        self._horizontal = torch.cat([square[..., :, :1], inner[1], square[..., :, -1:]], dim=-1)  # (..., n, n + 1)

    def operator(self, u: Tensor) -> Tensor:
        """Return D u, the discrete div(c^2 grad u)."""
        down = self._vertical * F.pad(u, (0, 0, 1, 1)).diff(dim=-2)
        right = self._horizontal * F.pad(u, (1, 1)).diff(dim=-1)
        return (down.diff(dim=-2) + right.diff(dim=-1)) / self.h**2

    def first_step(self, start: Tensor) -> Tensor:
        """Return the field one step after a start at rest, to second order."""
        return start + self.dt**2 / 2 * self.operator(start)

    def step(self, now: Tensor, before: Tensor) -> Tensor:
        """Return the next field."""
        return 2 * now - before + self.dt**2 * self.operator(now)

    def energy(self, now: Tensor, before: Tensor) -> Tensor:
        """Return the energy that the scheme conserves, between two fields in a row; one number a batch entry."""
        kinetic = ((now - before) / self.dt).square()
        return self.h**2 / 2 * (kinetic - now * self.operator(before)).sum((-2, -1))

    def solve(self, start: Tensor, *, frames: int, every: int = 4) -> Tensor:
        """Return ``frames`` fields, the start and then every ``every``-th step.

        Parameters
        ----------
        start : Tensor, shape of the speed
            Field at rest.
        frames, every : int
            At least 1.

        Returns
        -------
        fields : Tensor, shape (N, frames, n, n) or (frames, n, n), float64
        """
        check_int("frames", frames, low=1)
        check_int("every", every, low=1)
        if start.shape != self.speed.shape:
            raise QuernelError(f"start must have the speed's shape {tuple(self.speed.shape)}; got {tuple(start.shape)}")
        before = start.to(torch.float64)
        now = self.first_step(before)
        kept = [before]
        for step in range(1, (frames - 1) * every + 1):
            if step % every == 0:
                kept.append(now)
            now, before = self.step(now, before), now
        return torch.stack(kept, dim=-3)
