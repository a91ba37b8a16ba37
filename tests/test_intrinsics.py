"""Vector and portable intrinsics against NumPy: integers bit-equal, floats to rounding, awkward sizes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from quernel import _intrinsics
from quernel._intrinsics import make_axpy_f32, make_dot_u8s8, make_expand_f32

PATHS = [
    pytest.param(True, id="portable"),
    pytest.param(
        False,
        id="vector",
        marks=pytest.mark.skipif(
            not _intrinsics.target_features() >= _intrinsics.VECTOR_FEATURES, reason="no AVX-512 + VNNI here"
        ),
    ),
]
# One rounding (FMA) or two of a result of size 10.
FMA_ATOL = 2e-6


@pytest.fixture(scope="module", params=PATHS)
def dot(request):
    intrinsic = make_dot_u8s8(portable=request.param)

    @njit
    def call(a, b, n):
        return intrinsic(a.ctypes.data, b.ctypes.data, n)

    return call


@pytest.fixture(scope="module", params=PATHS)
def axpy(request):
    intrinsic = make_axpy_f32(portable=request.param)

    @njit
    def call(y, x, scale, n):
        intrinsic(y.ctypes.data, x.ctypes.data, scale, n)

    return call


@pytest.fixture(scope="module", params=PATHS)
def expand(request):
    intrinsic = make_expand_f32(portable=request.param)

    @njit
    def call(out, values, bitmap):
        return intrinsic(out.ctypes.data, values.ctypes.data, bitmap)

    return call


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 383, 1000])
def test_dot_is_exact(dot, n):
    rng = np.random.default_rng(n)
    a = rng.integers(0, 256, n + 3).astype(np.uint8)
    b = rng.integers(-128, 128, n + 3).astype(np.int8)
    assert dot(a, b, n) == int(a[:n].astype(np.int64) @ b[:n].astype(np.int64))
    # Off the alignment of a vector, and without the bytes behind the end.
    assert dot(a[3:], b[3:], n) == int(a[3:].astype(np.int64) @ b[3:].astype(np.int64))


def test_dot_does_not_saturate(dot):
    # 4 * 255 * 127 leaves int16, where vpmaddubsw would stop.
    a, b = np.full(256, 255, np.uint8), np.full(256, 127, np.int8)
    assert dot(a, b, 256) == 256 * 255 * 127
    assert dot(a, np.full(256, -128, np.int8), 256) == -256 * 255 * 128


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33, 100])
def test_axpy(axpy, n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n + 5)).astype(np.float32)
    expected = y.astype(np.float64)
    expected[:n] += 1.7 * x[:n].astype(np.float64)
    axpy(y, x, np.float32(1.7), n)
    np.testing.assert_allclose(y, expected, atol=FMA_ATOL)


@pytest.mark.parametrize(
    "bitmap", [0, 1, 1 << 63, (1 << 64) - 1, 0xAAAAAAAAAAAAAAAA, 0x00FF00000000F00F, 0x123456789ABCDEF1]
)
def test_expand(expand, bitmap):
    kept = [lane for lane in range(64) if bitmap >> lane & 1]
    values = np.arange(1, len(kept) + 1, dtype=np.float32)
    expected = np.zeros(64, np.float32)
    expected[kept] = values
    out = np.full(64, np.nan, np.float32)
    assert expand(out, values, np.uint64(bitmap)) == len(kept)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.skipif(_intrinsics.portable(), reason="the portable path has no such instructions")
def test_the_vector_instructions_are_there():
    dot_, expand_, axpy_ = make_dot_u8s8(), make_expand_f32(), make_axpy_f32()

    @njit
    def call(a, b, out, scale, bitmap):
        axpy_(out.ctypes.data, out.ctypes.data, scale, out.size)
        return dot_(a.ctypes.data, b.ctypes.data, a.size) + expand_(out.ctypes.data, a.ctypes.data, bitmap)

    call(np.zeros(64, np.uint8), np.zeros(64, np.int8), np.zeros(64, np.float32), np.float32(1), np.uint64(0))
    (assembly,) = call.inspect_asm().values()
    for instruction in ("vpdpbusd", "vexpandps", "vfmadd"):
        assert instruction in assembly


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import kernel_file, numpy as np
from quernel import _intrinsics
a = np.arange(200, dtype=np.uint8)
b = (np.arange(200) - 100).astype(np.int8)
print(_intrinsics.portable(), kernel_file.kernel(a, b), sum(kernel_file.kernel.stats.cache_hits.values()))
"""
KERNEL = """
from numba import njit
from quernel._intrinsics import keyed, make_dot_u8s8

_dot = make_dot_u8s8()


@njit(nogil=True, cache=True, fastmath=False)
@keyed
def kernel(a, b):
    return _dot(a.ctypes.data, b.ctypes.data, a.size)
"""


@pytest.mark.slow
def test_paths_have_their_own_cache_entries(tmp_path):
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    expected = sum(a * (a - 100) for a in range(200))

    def run(**settings):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
        script = SCRIPT.format(folder=str(tmp_path))
        return subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
        ).stdout.split()

    here = str(_intrinsics.portable())
    assert run() == [here, str(expected), "0"]
    assert run() == [here, str(expected), "1"]
    # Forced portable on a capable machine must not run the vector code that lies in the cache.
    forced = run(QUERNEL_PORTABLE="1")
    assert forced[:2] == ["True", str(expected)]
    assert forced[2] == ("1" if _intrinsics.portable() else "0")
    # Compiled for a processor without AVX, as NUMBA_ENABLE_AVX=0 makes believe.
    assert run(NUMBA_ENABLE_AVX="0") == ["True", str(expected), "0"]


@pytest.mark.parametrize("portable", PATHS)
@pytest.mark.parametrize("mask", [0, 1, 0x8000, 0xFFFF, 0b1011011101111011])
def test_some_lanes_are_loaded_clamped_and_stored(portable, mask):
    row = ir.VectorType(_intrinsics.F32, _intrinsics.LANES)

    @intrinsic
    def some(typing, source, target, bits):
        def emit(context, builder, signature, args):
            e = _intrinsics.Emitter(builder, portable)
            bits = builder.trunc(args[2], _intrinsics.I16)
            e.prefetch(args[0])
            value = e.load_some(args[0], row, bits)
            turned = e.shuffle(value, value, [*range(1, 16), 16])
            limits = (e.splat(_intrinsics.F32(limit)) for limit in (2.0, 8.0))
            e.store_some(e.clamp(turned, *limits), args[1], bits)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @njit
    def call(source, target, bits):
        some(source.ctypes.data, target.ctypes.data, bits)

    source, target = np.arange(16, dtype=np.float32), np.full(16, -1, np.float32)
    source[5] = np.nan
    lanes = np.array([mask >> lane & 1 for lane in range(16)], dtype=bool)
    call(source, target, mask)
    turned = np.roll(np.where(lanes, source, np.float32(0)), -1)
    # NaN passes both limits.
    expected = np.where(lanes, np.where(np.isnan(turned), turned, np.clip(turned, 2, 8)), np.float32(-1))
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("portable", PATHS)
@pytest.mark.parametrize("mask", [0, 1, 0x80000000, 0xFFFFFFFF, 0b10110111011110110001000011101101])
def test_half_words_are_expanded_32_at_a_time(portable, mask):
    @intrinsic
    def expand(typing, source, target, bits):
        def emit(context, builder, signature, args):
            e = _intrinsics.Emitter(builder, portable)
            e.store(e.expand_load(args[0], builder.trunc(args[2], _intrinsics.I32), _intrinsics.I16), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @njit
    def call(source, target, bits):
        expand(source.ctypes.data, target.ctypes.data, bits)

    kept = [lane for lane in range(32) if mask >> lane & 1]
    source, target = np.arange(1, len(kept) + 1, dtype=np.int16), np.full(32, -1, np.int16)
    call(source, target, mask)
    expected = np.zeros(32, np.int16)
    expected[kept] = source
    np.testing.assert_array_equal(target, expected)


def test_intrinsics_of_other_files_are_in_the_key(tmp_path):
    names = []
    for text in ("one", "two"):
        (tmp_path / "other.py").write_text(text)
        _intrinsics._digest.cache_clear()

        @_intrinsics.keyed_with(str(tmp_path / "other.py"))
        def kernel():
            pass

        names.append(kernel.__qualname__)
    _intrinsics._digest.cache_clear()
    assert names[0] != names[1]
    assert names[0].rpartition("_")[0] == names[1].rpartition("_")[0]
