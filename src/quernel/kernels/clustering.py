"""``kmeans``: many small clusterings at once, without chance: rows of a batch, each with its own mask and number.

Lloyd's iterations from seeds that follow from the points alone.  A cluster that runs empty takes the point farthest
from the mean of its own cluster, which lowers the inertia too; with fewer distinct points than clusters some stay
empty and are counted so, never filled with zeros.  The result is a partition: ``cluster_means`` gives its means as
part of a graph, with the gradient g_c / |c| for every member of cluster c and none through the partition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_int

STARTS = ("spaced", "farthest")
# Distances looked at together: 16 MB in float32.
_BLOCK = 2**22
# Two points count as one if their squared distance is below this share of the largest squared length: means of equal
# points are off by a rounding.
_SAME = 1e-12


class Clusters(NamedTuple):
    """A partition of the points of every row."""

    assignment: Tensor  # (B, L) int64, -1 where masked
    counts: Tensor  # (B, K) int64, K the largest number of clusters; 0 where a cluster stayed empty


def kmeans(
    x: Tensor, k: int | Tensor, *, mask: Tensor | None = None, iterations: int = 10, start: str = "spaced"
) -> Clusters:
    """Partition the points of each row into at most k clusters of small inertia.

    Parameters
    ----------
    x : Tensor, shape (B, L, d)
        Points; half precision is clustered in float32.  No gradient flows.
    k : int or Tensor of int64, shape (B,)
        Clusters, at least 1, of all rows or of each.
    mask : Tensor of bool, shape (B, L), optional
        True for the points that count; default all.
    iterations : int, default=10
        Steps of Lloyd's algorithm at most; it stops where nothing changes.
    start : {"spaced", "farthest"}, default="spaced"
        Seeds: points at even distances in their order, or the point farthest from the mean and then again and again
        the one farthest from all seeds, which does not depend on the order of the points (apart from exact ties).

    Returns
    -------
    Clusters
        The partition that belongs to the last means.

    Raises
    ------
    QuernelError
        If shapes do not fit, a number of clusters is below 1, or a point that counts is not finite.

    Notes
    -----
    O(iterations L K d) time a row; the distances are formed 16 MB at a time.

    Examples
    --------
    >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
    >>> kmeans(points, 2).assignment.tolist()
    [[0, 0, 1, 1]]
    """
    check_int("iterations", iterations, low=1)
    check_choice("start", start, STARTS)
    points, real, numbers = _checked(x.detach(), k, mask)
    if not points.numel() or not bool(real.any()):
        empty = torch.full(real.shape, -1, dtype=torch.int64, device=x.device)
        return Clusters(empty, empty.new_zeros(len(points), int(numbers.max()) if len(numbers) else 0))
    size = int(numbers.max())
    centers, used = (_spaced if start == "spaced" else _farthest)(points, real, numbers)
    assignment = torch.full(real.shape, -1, dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        found = nearest(points, centers, used).masked_fill_(~real, -1)
        counts = _counts(found, size)
        for row in ((counts == 0) & (torch.arange(size, device=x.device) < numbers[:, None])).any(1).nonzero()[:, 0]:
            _fill(points[row], found[row], int(numbers[row]))
        if torch.equal(found, assignment):
            break
        assignment = found
        centers = cluster_means(points, assignment, size)
        used = _counts(assignment, size) > 0
    return Clusters(assignment, _counts(assignment, size))


def nearest(x: Tensor, centers: Tensor, used: Tensor | None = None) -> Tensor:
    """Return the index of each point's nearest center; the first of several.

    Parameters
    ----------
    x : Tensor, shape (B, L, d)
    centers : Tensor, shape (B, K, d)
    used : Tensor of bool, shape (B, K), optional
        False for centers that are not there.

    Returns
    -------
    Tensor of int64, shape (B, L)
    """
    lengths = 0.5 * centers.square().sum(-1)[:, None]  # (B, 1, K)
    if used is not None:
        lengths = lengths.masked_fill(~used[:, None], torch.inf)
    step = max(1, _BLOCK // max(1, len(x) * centers.shape[1]))
    parts = [_argmin(torch.baddbmm(lengths, part, centers.mT, alpha=-1)) for part in x.split(step, dim=1)]
    return torch.cat(parts, dim=1)


def _argmin(distances: Tensor) -> Tensor:
    """Return the place of the least number of each row, the first of several."""
    if distances.device.type == "cpu" and distances.dtype in (torch.float32, torch.float64):
        # NumPy's is vectorised, torch's is not: 120 against 720 us for half a million numbers.
        return torch.from_numpy(distances.detach().numpy().argmin(-1))
    return distances.argmin(-1)


def cluster_means(x: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Return the mean of each cluster's points, in the graph of ``x``; zeros for an empty cluster.

    Parameters
    ----------
    x : Tensor, shape (B, L, d)
    assignment : Tensor of int64, shape (B, L)
        Cluster of each point, below k; negative for points that do not count.
    k : int

    Returns
    -------
    Tensor, shape (B, k, d)
        In the dtype of ``x``, summed in at least float32.
    """
    rows, _, dim = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # One more cluster takes what does not count.
    place = torch.where(assignment < 0, k, assignment) + (k + 1) * torch.arange(rows, device=x.device)[:, None]
    sums = wide.new_zeros(rows * (k + 1), dim).index_add(0, place.flatten(), _counted(wide, assignment).flatten(0, 1))
    counts = _counts(assignment, k).clamp(min=1)
    return (sums.view(rows, k + 1, dim)[:, :k] / counts[..., None]).to(x.dtype)


def inertia(x: Tensor, clusters: Clusters) -> Tensor:
    """Return the sum of squared distances to the means of the own cluster, shape (B,), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    means = cluster_means(wide, clusters.assignment, clusters.counts.shape[1])
    own = means.gather(1, clusters.assignment.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return _counted(wide - own, clusters.assignment).square().sum((1, 2))


def _checked(x: Tensor, k: int | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred points, zero where they do not count, the mask, and the clusters of every row."""
    if x.ndim != 3 or not x.is_floating_point():
        raise QuernelError(f"x must be (B, L, d) of floats; got {x.dtype} of shape {tuple(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise QuernelError(f"mask must be bool of shape {tuple(x.shape[:2])}; got {mask.dtype}, {tuple(mask.shape)}")
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    if isinstance(k, Tensor):
        if k.shape != x.shape[:1] or k.is_floating_point() or (len(k) and int(k.min()) < 1):
            raise QuernelError(f"k must hold an integer of at least 1 for each of {len(x)} rows; got {k!r}")
        numbers = k.to(torch.int64)
    else:
        numbers = torch.full(x.shape[:1], check_int("k", k, low=1), dtype=torch.int64, device=x.device)
    points = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~real[..., None], 0.0)
    check_finite("x", points)
    # Distances do not change and lose fewer digits to a mean that all points share.
    points = points - points.sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]
    return points.masked_fill(~real[..., None], 0.0), real, numbers


def _counted(x: Tensor, assignment: Tensor) -> Tensor:
    """Return x with zeros where a point does not count, whatever stands there."""
    return x.masked_fill((assignment < 0)[..., None], 0.0) if bool((assignment < 0).any()) else x


def _counts(assignment: Tensor, size: int) -> Tensor:
    counts = assignment.new_zeros(len(assignment), size + 1)
    place = torch.where(assignment < 0, size, assignment)
    return counts.scatter_add_(1, place, torch.ones_like(place))[:, :size]


def _spaced(points: Tensor, real: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points numbered floor(j n / k) of the n that count."""
    there = real.sum(1, keepdim=True)
    j = torch.arange(int(numbers.max()), device=points.device)
    used = j < torch.minimum(numbers[:, None], there)
    rank = j * there // torch.minimum(numbers[:, None], there).clamp(min=1)
    # Points that count come first, in their order.
    order = (~real).to(torch.int8).argsort(stable=True, dim=1)
    chosen = order.gather(1, rank.clamp(max=points.shape[1] - 1))
    return points.gather(1, chosen[..., None].expand(-1, -1, points.shape[-1])), used


def _farthest(points: Tensor, real: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return points that are far from each other, the first one far from the mean."""
    rows, size = torch.arange(len(points), device=points.device), int(numbers.max())
    distance = points.square().sum(-1).masked_fill(~real, -1.0)  # from the mean, which is the origin
    least = _SAME * distance.amax(1)
    centers = points.new_zeros(len(points), size, points.shape[-1])
    used = torch.zeros(len(points), size, dtype=torch.bool, device=points.device)
    for j in range(size):
        best, chosen = distance.max(1)
        centers[:, j] = points[rows, chosen]
        # The first seed is always one, be it the only point there is.
        used[:, j] = (j < numbers) & ((best > least) if j else (best >= 0))
        apart = (points - centers[:, j, None]).square().sum(-1).masked_fill(~real, -1.0)
        distance = apart if j == 0 else torch.minimum(distance, apart)
    return centers, used


def _fill(points: Tensor, assignment: Tensor, number: int) -> None:
    """Give each empty cluster of one row, in place, the point farthest from the mean of its own."""
    least = _SAME * points.square().sum(-1).amax()
    for cluster in range(number):
        if bool((assignment == cluster).any()):
            continue
        means = cluster_means(points[None], assignment[None], number)[0]
        distance = (points - means[assignment.clamp(min=0)]).square().sum(-1).masked_fill(assignment < 0, -1.0)
        best, chosen = distance.max(0)
        if not bool(best > least):
            return
        assignment[chosen] = cluster
