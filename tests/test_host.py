"""The host build of csrc/common/{numerics,philox}.h, which the kernels compile: over all codes and all ties."""

from __future__ import annotations

import numpy as np
import nvfp4_oracle as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import _philox

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

MAGNITUDES, E4M3 = oracle.MAGNITUDES, oracle.E4M3[:127]


def all_16_bit_floats() -> np.ndarray:
    """Every bfloat16 and every float16 but NaN, infinities and subnormals included, as float32."""
    bits = np.arange(2**16, dtype=np.uint32)
    values = np.concatenate([(bits << 16).view(np.float32), bits.astype(np.uint16).view(np.float16).astype(np.float32)])
    return values[~np.isnan(values)]


def ties(values: np.ndarray) -> np.ndarray:
    """The midpoints of neighbours and, in float32, the two numbers next to each, in both signs."""
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    around = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
    return np.concatenate([around, -around])


def random_floats() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32)
    values = bits.view(np.float32)
    return values[~np.isnan(values)]


INPUTS = [all_16_bit_floats, lambda: ties(MAGNITUDES), lambda: ties(E4M3), random_floats]


def test_every_e2m1_code():
    codes = np.arange(16, dtype=np.uint8)
    values = _host.e2m1_to_float(codes)
    np.testing.assert_array_equal(values, oracle.E2M1)
    np.testing.assert_array_equal(np.signbit(values), codes >= 8)  # code 8 is -0
    np.testing.assert_array_equal(_host.e2m1_from_float(values), codes)


@pytest.mark.parametrize("inputs", INPUTS)
def test_e2m1_rounds_to_nearest_even(inputs):
    v = inputs()
    want = oracle.nearest(MAGNITUDES, np.abs(v)) + 8 * np.signbit(v)
    np.testing.assert_array_equal(_host.e2m1_from_float(v), want)


def test_every_e4m3_code():
    codes = np.arange(256, dtype=np.uint8)
    values = _host.e4m3_to_float(codes)
    np.testing.assert_array_equal(values, oracle.E4M3)
    np.testing.assert_array_equal(np.signbit(values), codes >= 128)
    np.testing.assert_array_equal(_host.e4m3_from_float(values), codes)  # NaN keeps its sign too


@pytest.mark.parametrize("inputs", INPUTS)
def test_e4m3_rounds_to_nearest_even_and_saturates(inputs):
    v = inputs()
    want = oracle.nearest(E4M3, np.abs(v)) + 128 * np.signbit(v)
    np.testing.assert_array_equal(_host.e4m3_from_float(v), want)


@pytest.mark.parametrize("rows, cols", [(128, 4), (256, 12), (130, 5), (1, 1), (384, 168)])
def test_scale_128x4_is_the_published_permutation(rows, cols):
    padded_rows, padded_cols = -(-rows // 128) * 128, -(-cols // 4) * 4
    r, c = np.meshgrid(np.arange(padded_rows), np.arange(padded_cols), indexing="ij")
    place = _host.scale_128x4(r, c, cols)
    np.testing.assert_array_equal(np.sort(place, axis=None), np.arange(place.size))
    tiles = np.arange(place.size).reshape(padded_rows // 128, padded_cols // 4, 32, 4, 4)
    np.testing.assert_array_equal(place, tiles.transpose(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols))


def test_scale_128x4_passes_32_bits():
    rows, cols = 2**22, 1024
    assert _host.scale_128x4(rows - 1, cols - 1, cols) == rows * cols - 1


@given(*[st.integers(0, 2**64 - 1)] * 3)
def test_philox_is_its_python_twin(key, low, high):
    halves = [half for word in (key, low, high) for half in (word & 0xFFFFFFFF, word >> 32)]
    assert _host.philox4x32(key, low, high) == _philox.philox4x32(*halves)


def test_facts_of_the_build():
    info = _host.build_info()
    assert set(info) >= {"archs", "revision", "torch"} and all(isinstance(value, str) for value in info.values())
    assert _host.cpu_isa() in ("generic", "avx2", "avx512", "amx")
