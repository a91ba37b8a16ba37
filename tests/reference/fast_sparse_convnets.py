"""The sparse 1x1 convolution as the authors store and run it: a stream of weights and of moves between channels.

Per row (or block of rows): biases, then the weights of each nonzero column.  Beside them one signed number a nonzero,
in bytes: how far the pointer moves, after the activations were loaded, to the channel of the next nonzero of the whole
stream; the last move returns to the first channel.  And the number of nonzeros of each row.  Left-over rows of blocks
are stored singly.  Strips of 64 pixels, then of 32, ..., 1, all rows of a strip before the next one.
"""

import numpy as np

STRIPS = (64, 32, 16, 8, 4, 2, 1)


def pack(weight, bias, pixels, block=1):
    """Return (stream, moves, counts, first channel, rows of each stored row) of a matrix (out, in)."""
    out = len(weight)
    whole = out // block * block
    starts = [*range(0, whole, block), *range(whole, out)]
    rows = [range(o, o + (block if o < whole else 1)) for o in starts]
    stream, channels, counts = [], [], []
    for mine in rows:
        columns = [k for k in range(weight.shape[1]) if any(weight[o, k] != 0 for o in mine)]
        stream += [bias[o] for o in mine]
        stream += [weight[o, k] for k in columns for o in mine]
        channels += columns
        counts.append(len(columns))
    following = [*channels[1:], *channels[:1]]
    moves = [(b - a) * pixels * 4 for a, b in zip(channels, following, strict=True)]
    return stream, moves, counts, channels[0] if channels else 0, rows


def convolve(activations, packed, low=-np.inf, high=np.inf):
    """Return (out, pixels) in float64; ``activations``: (in, pixels) in float32, read through byte addresses."""
    stream, moves, counts, first, rows = packed
    pixels = activations.shape[1]
    flat = np.ascontiguousarray(activations, np.float32).ravel()
    result = np.zeros((sum(map(len, rows)), pixels))
    begin = 0
    while begin < pixels:
        width = next(strip for strip in STRIPS if strip <= pixels - begin)
        address, weights, jumps = 4 * (first * pixels + begin), iter(stream), iter(moves)
        for mine, count in zip(rows, counts, strict=True):
            sums = [np.full(width, next(weights), np.float64) for _ in mine]
            for _ in range(count):
                strip = flat[address // 4 : address // 4 + width].astype(np.float64)
                address += next(jumps)
                for i in range(len(mine)):
                    sums[i] += next(weights) * strip
            for o, total in zip(mine, sums, strict=True):
                result[o, begin : begin + width] = np.maximum(np.minimum(total, high), low)
        if address != 4 * (first * pixels + begin):
            raise ValueError("the moves of a stream must return to where it starts")
        begin += width
    return result


def depthwise(x, weight, bias, stride, low=-np.inf, high=np.inf):
    """Return (C, H', W') in float64 of x: (C, H, W) and weight: (C, k, k), padded by k // 2 zeros."""
    channels, height, width = x.shape
    size = weight.shape[1]
    half = size // 2
    result = np.zeros((channels, -(-height // stride), -(-width // stride)))
    for c, i, j in np.ndindex(result.shape):
        total = float(bias[c])
        for dy, dx in np.ndindex(size, size):
            row, column = stride * i + dy - half, stride * j + dx - half
            if 0 <= row < height and 0 <= column < width:
                total += float(weight[c, dy, dx]) * float(x[c, row, column])
        result[c, i, j] = max(min(total, high), low)
    return result


def schedule(step, initial, final, begin, every, prunings):
    """Return the sparsity after a step of gradual magnitude pruning, from its definition."""
    sparsity = 0.0
    for k in range(prunings + 1):
        time = begin + k * every
        if time <= step:
            sparsity = final + (initial - final) * (1 - (time - begin) / (prunings * every)) ** 3
    return sparsity
