"""ROBE look-ups, bags and gradients number by number, from the formulas of the paper."""

from tests.reference.hashing import block_slot, fastrange, mix64, sign_at


def mixed_starts(seed, places):
    return lambda block: fastrange(mix64(seed, block), places)


def published_starts(a, b, c, prime, places, per_row):
    return lambda block: (a * (block // per_row) + b * (block % per_row) + c) % prime % places


def terms(row, dim, size, block, start_of, sign_of):
    """Return (slot, sign) of every number of a row."""
    pairs = []
    for column in range(dim):
        slot, position = block_slot(row, column, size, dim, block, start_of)
        pairs.append((slot, sign_of(position)))
    return pairs


def random_signs(seed):
    return lambda position: sign_at(seed, position)


def bags(array, keys, weights, bag_of, n_bags, of_row):
    """Return sums of weighted rows; ``of_row(key)`` gives the terms of a row, or None for padding."""
    out = [[0.0] * len(of_row(0) or of_row(1)) for _ in range(n_bags)]
    for key, weight, bag in zip(keys, weights, bag_of, strict=True):
        for column, (slot, sign) in enumerate(of_row(key) or ()):
            out[bag][column] += weight * sign * array[slot]
    return out


def gradient(size, keys, weights, bag_of, of_row, grads):
    """Return the gradient of the array, by adding and never overwriting."""
    out = [0.0] * size
    for key, weight, bag in zip(keys, weights, bag_of, strict=True):
        for column, (slot, sign) in enumerate(of_row(key) or ()):
            out[slot] += weight * sign * grads[bag][column]
    return out
