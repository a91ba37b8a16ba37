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
