"""Hash functions in plain Python integers, written from their definitions."""

MASK32, MASK64 = 2**32 - 1, 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64_finalise(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def mix64(seed, *keys):
    state = 0
    for key in (seed, *keys):
        state = splitmix64_finalise((state + key + GOLDEN) & MASK64)
    return state


def fastrange(h, n):
    return h * n >> 64


def mod_prime(a, b, prime, n, keys):
    return (sum(x * y for x, y in zip(a, keys, strict=True)) + b) % prime % n


def rotate(x, r, bits):
    return ((x << r) | (x >> (bits - r))) & (2**bits - 1)


def murmur3_32(data, seed=0):
    h = seed
    whole = len(data) // 4 * 4
    for start in range(0, len(data), 4):
        k = int.from_bytes(data[start : start + 4], "little")
        h ^= rotate(k * 0xCC9E2D51 & MASK32, 15, 32) * 0x1B873593 & MASK32
        if start < whole:
            h = (rotate(h, 13, 32) * 5 + 0xE6546B64) & MASK32
    h ^= len(data)
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK32
    return h ^ (h >> 16)


SIGNS = 0x5167


def sign_at(seed, position):
    word = mix64(seed, position // 64, SIGNS)
    return 1 - 2 * (word >> (position % 64) & 1)


def block_slot(row, column, size, dim, block, start_of):
    """Return slot and position of one number of a table; ``start_of(block number)`` is where a block begins."""
    if block <= dim:
        position = row * -(-dim // block) * block + column
    else:
        position = row * dim + column
    return (start_of(position // block) + position % block) % size, position


def tile_slot(n, k, shape, tile, order, start_of):
    """Return slot and position of one weight; ``start_of(tile row, tile column)`` is where a tile begins."""
    a, i = divmod(n, tile[0])
    b, j = divmod(k, tile[1])
    place = i * tile[1] + j if order == "n-major" else j * tile[0] + i
    tiles_in_a_row = -(-shape[1] // tile[1])
    return start_of(a, b) + place, (a * tiles_in_a_row + b) * tile[0] * tile[1] + place


def cell(seed, table, values, n_cells):
    return fastrange(mix64(seed, table, *(value % 2**64 for value in values)), n_cells)


def min_hashes(items, bins, seed):
    own = {}
    for item in items:
        h = mix64(seed, item)
        place, value = fastrange(h, bins), h & MASK32
        own[place] = min(value, own.get(place, value))
    row = []
    for place in range(bins):
        source, attempt, at = place, 0, mix64(seed, 0xB0, place)
        if source not in own:
            source = fastrange(at, bins)
        while source not in own:
            attempt += 1
            source = fastrange(splitmix64_finalise((at + attempt + GOLDEN) & MASK64), bins)
        row.append(own[source])
    return row


def winner(x, places):
    best = 0
    for j, place in enumerate(places):
        if x[place] > x[places[best]]:
            best = j
    return best


def buckets(codes, values=None):
    """Return {(table, code): sorted items}, or sorted distinct values."""
    held = {}
    for i, row in enumerate(codes):
        for table, code in enumerate(row):
            held.setdefault((table, int(code)), []).extend([i] if values is None else map(int, values[i]))
    return {key: sorted(items) if values is None else sorted(set(items)) for key, items in held.items()}
