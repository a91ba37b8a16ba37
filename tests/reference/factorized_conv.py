"""One-way filters and waves by their definitions, slow and readable: loops over filters, positions and grid nodes."""

import itertools

import numpy as np


def dense_kernel(channel, spatial, shared=False):
    """Return K[o, i, *position] = sum over r of the products of one-way filters, element by element."""
    outputs, rank, inputs = channel.shape
    sizes = [s.shape[2] for s in spatial]
    kernel = np.zeros((outputs, inputs, *sizes))
    for o, i in itertools.product(range(outputs), range(inputs)):
        for place in itertools.product(*map(range, sizes)):
            for r in range(rank):
                product = channel[o, r, i]
                for filters, position in zip(spatial, place, strict=True):
                    product = product * filters[i if shared else o, r, position]
                kernel[(o, i, *place)] += product
    return kernel


def convolve(x, kernel, bias, stride, padding, dilation):
    """Return the cross-correlation of x (N, in, *size) with a dense kernel (out, in, *k), output by output.

    ``padding`` holds (before, after) of each direction.
    """
    dims = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    reach = [dilation[d] * (kernel.shape[2 + d] - 1) + 1 for d in range(dims)]
    size = [(x.shape[2 + d] - reach[d]) // stride[d] + 1 for d in range(dims)]
    y = np.zeros((len(x), len(kernel), *size))
    for place in itertools.product(*map(range, size)):
        window = tuple(slice(place[d] * stride[d], place[d] * stride[d] + reach[d], dilation[d]) for d in range(dims))
        patch = x[(slice(None), slice(None), *window)]
        for o in range(len(kernel)):
            y[(slice(None), o, *place)] = (patch * kernel[o]).reshape(len(x), -1).sum(1) + bias[o]
    return y


def best_product(tensor, sweeps=500):
    """Return the relative error of the best product of three vectors, by power iteration from many starts."""
    draw = np.random.default_rng(0)
    best = np.inf
    for _ in range(20):
        b, c = draw.standard_normal(tensor.shape[1]), draw.standard_normal(tensor.shape[2])
        for _ in range(sweeps):
            a = np.einsum("iyx,y,x->i", tensor, b, c)
            a /= np.linalg.norm(a)
            b = np.einsum("iyx,i,x->y", tensor, a, c)
            b /= np.linalg.norm(b)
            c = np.einsum("iyx,i,y->x", tensor, a, b)
        best = min(best, np.linalg.norm(tensor - np.einsum("i,y,x->iyx", a, b, c)))
    return best / np.linalg.norm(tensor)


def leapfrog(start, speed, dt, steps):
    """Return the field after so many steps of the 5-point scheme with one speed everywhere, node by node."""
    n = len(start)
    factor = (speed * dt * (n + 1)) ** 2

    def laplace(u):
        wide = np.pad(u, 1)
        out = np.zeros_like(u)
        for i, j in itertools.product(range(n), range(n)):
            around = wide[i, j + 1] + wide[i + 2, j + 1] + wide[i + 1, j] + wide[i + 1, j + 2]
            out[i, j] = around - 4 * u[i, j]
        return out

    before, now = start, start + factor / 2 * laplace(start)
    for _ in range(steps - 1):
        now, before = 2 * now - before + factor * laplace(now), now
    return now
