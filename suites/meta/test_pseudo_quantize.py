"""Rounding to nearest: every weight within half a scale, whatever the weights, the bits and the groups.

The bound, exactly: half the stored scale, plus (2^bits - 1) times what rounding to the stored dtype moved the scale,
plus (2^bits - 1) times 2^-22 of the scale for float32's own arithmetic.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core.pseudo_quantize import (
    NARROWEST_RANGE,
    Quantized,
    Scheme,
    encode,
    pseudo_dequantize_tensor,
    pseudo_quantize_tensor,
)

SOME = settings(deadline=None, max_examples=150)
ALL_BITS = (2, 3, 4, 8)
HUGE = 2.0**120  # far beyond float16, with room for a range in float32
LARGEST_IN_HALF = 2.0**13  # of a 2-bit symmetric scheme the scale is the weight itself; fp16 ends at 65504

schemes = st.builds(
    Scheme,
    bits=st.sampled_from(ALL_BITS),
    group_size=st.sampled_from((-1, 1, 2, 3, 4, 6, 12)),
    zero_point=st.booleans(),
)
dtypes = st.sampled_from((torch.float32, torch.float16))


@st.composite
def weights(draw, largest=HUGE, columns=12):
    """A weight of 1 to 3 rows: each of its own magnitude, some of one sign, some constant, 0 or denormal."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        magnitude = draw(st.sampled_from((largest, 1.0, 1e-4, 1e-7, 1e-41, 0.0)))
        low, high = draw(st.sampled_from(((-1.0, 1.0), (0.5, 1.0), (-1.0, -0.5), (0.9990234375, 1.0), (0.75, 0.75))))
        unit = st.floats(low, high, width=32)
        rows.append([magnitude * x for x in draw(st.lists(unit, min_size=columns, max_size=columns))])
    return torch.tensor(rows, dtype=torch.float32)


def spread(per_group, scheme, columns):
    """[out, groups] float64 -> [out, in]: what each element's group says."""
    return np.repeat(per_group, columns if scheme.group_size == -1 else scheme.group_size, axis=1)


def array(tensor):
    """The tensor, in float64, outside the reach of torch's float32."""
    return tensor.to(torch.float64).numpy()


def exact_scales(weight, scheme):
    """The scales [out, groups] of the definition, in float64."""
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    groups = array(weight).reshape(rows, -1, size)
    if scheme.zero_point:
        reach = np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)
        return np.maximum(reach, NARROWEST_RANGE) / (2**scheme.bits - 1)
    return np.maximum(np.abs(groups).max(-1), NARROWEST_RANGE) / (2 ** (scheme.bits - 1) - 1)


def decoded(quantized, columns):
    """What the codes stand for, [out, in] in float64: (code - zero point) x scale."""
    scale, zero = (spread(array(t), quantized.scheme, columns) for t in (quantized.scales, quantized.zeros))
    return (array(quantized.codes) - zero) * scale


def bound(weight, quantized):
    """What theory allows each element to be off by, [out, in] in float64."""
    scheme, stored = quantized.scheme, array(quantized.scales)
    steps = 2**scheme.bits - 1
    moved = np.abs(exact_scales(weight, scheme) - stored)
    return spread(stored / 2 + steps * moved + steps * stored * 2.0**-22, scheme, weight.shape[1])


def assert_within_bound(weight, quantized):
    """Fail, naming the worst element, unless every one is within the bound."""
    error, allowed = np.abs(decoded(quantized, weight.shape[1]) - array(weight)), bound(weight, quantized)
    worst = np.unravel_index(np.argmax(error / allowed), error.shape)
    assert error[worst] <= allowed[worst], f"{float(weight[worst])} at {worst}: {error[worst]} > {allowed[worst]}"


def assert_nearest(weight, quantized):
    """Fail unless every weight has the nearest code of the stored grid, and the last one where it lies beyond that."""
    scheme, columns = quantized.scheme, weight.shape[1]
    zero, step = (spread(array(t), scheme, columns)[..., None] for t in (quantized.zeros, quantized.scales))
    grid = (np.arange(scheme.lowest, scheme.highest + 1) - zero) * step  # [out, in, codes]
    nearest = np.abs(grid - array(weight)[..., None]).min(-1)
    slack = np.maximum(step[..., 0] * 2.0**-14, np.abs(array(weight)) * 2.0**-22)
    assert (np.abs(decoded(quantized, columns) - array(weight)) <= nearest + slack).all()
    assert (quantized.codes[array(weight) > grid[..., -1]] == scheme.highest).all()
    assert (quantized.codes[array(weight) < grid[..., 0]] == scheme.lowest).all()


# Whatever the weight


@SOME
@given(data=st.data(), scheme=schemes, dtype=dtypes)
def test_error(data, scheme, dtype):
    """Every weight is within half a scale of its reference, plus what rounding moved the scale for every step."""
    weight = data.draw(weights(LARGEST_IN_HALF if dtype == torch.float16 else HUGE))

    assert_within_bound(weight, pseudo_quantize_tensor(weight, scheme, scale_dtype=dtype))


@SOME
@given(data=st.data(), scheme=schemes, dtype=dtypes)
def test_nearest(data, scheme, dtype):
    """Codes are chosen for the scale as stored: no other code of the grid is nearer."""
    weight = data.draw(weights(LARGEST_IN_HALF if dtype == torch.float16 else HUGE))

    assert_nearest(weight, pseudo_quantize_tensor(weight, scheme, scale_dtype=dtype))


@SOME
@given(data=st.data(), scheme=schemes, dtype=dtypes)
def test_parts(data, scheme, dtype):
    """Codes and zero points are whole numbers in range, scales positive, finite and of the dtype asked for."""
    weight = data.draw(weights(LARGEST_IN_HALF if dtype == torch.float16 else HUGE))
    steps = 2**scheme.bits - 1
    lowest, highest = (0, steps) if scheme.zero_point else (-(steps // 2), steps // 2)
    groups = 1 if scheme.group_size == -1 else 12 // scheme.group_size

    quantized = pseudo_quantize_tensor(weight, scheme, scale_dtype=dtype)

    assert quantized.codes.shape == weight.shape
    assert quantized.scales.shape == quantized.zeros.shape == (len(weight), groups)
    assert (quantized.codes.dtype, quantized.scales.dtype, quantized.zeros.dtype) == (torch.int16, dtype, torch.int16)
    assert lowest <= quantized.codes.min() <= quantized.codes.max() <= highest
    assert lowest <= quantized.zeros.min() <= quantized.zeros.max() <= highest
    assert scheme.zero_point or not quantized.zeros.any()
    assert (quantized.scales > 0).all()
    assert quantized.scales.isfinite().all()
    assert torch.equal(quantized.weight, pseudo_dequantize_tensor(quantized.codes, quantized.scales, quantized.zeros))


@SOME
@given(data=st.data(), scheme=schemes, dtype=dtypes)
def test_idempotent(data, scheme, dtype):
    """A dequantized weight has the codes that it came from."""
    weight = data.draw(weights(LARGEST_IN_HALF if dtype == torch.float16 else HUGE))
    quantized = pseudo_quantize_tensor(weight, scheme, scale_dtype=dtype)

    again = encode(quantized.weight, quantized.scales, quantized.zeros, scheme)

    assert torch.equal(again, quantized.codes)


@SOME
@given(data=st.data(), scheme=schemes, dtype=dtypes)
def test_representable(data, scheme, dtype):
    """A weight on a grid that it uses from end to end is kept exactly: codes, scales and zero points."""
    size = 12 if scheme.group_size == -1 else scheme.group_size
    if size == 1:  # one weight has one end
        size, scheme = 2, Scheme(scheme.bits, 2, scheme.zero_point)
    steps = 2**scheme.bits - 1
    lowest, highest = (0, steps) if scheme.zero_point else (-(steps // 2), steps // 2)
    codes, scales, zeros = [], [], []
    for _ in range(12 // size):
        inner = st.lists(st.integers(lowest, highest), min_size=size - 2, max_size=size - 2)
        codes += data.draw(st.permutations([lowest, highest, *data.draw(inner)]))
        # Scales of fp16's 11 significant bits, whose multiples float32 holds.
        scales.append(data.draw(st.integers(1, 2047)) * 2.0 ** data.draw(st.integers(-12, 0)))
        zeros.append(data.draw(st.integers(0, steps)) if scheme.zero_point else 0)
    expected = Quantized(
        codes=torch.tensor([codes], dtype=torch.int16),
        scales=torch.tensor([scales]).to(dtype),
        zeros=torch.tensor([zeros], dtype=torch.int16),
        scheme=scheme,
    )
    weight = torch.from_numpy(decoded(expected, 12)).float()

    found = pseudo_quantize_tensor(weight, scheme, scale_dtype=dtype)

    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.weight, weight)


@SOME
@given(data=st.data(), scheme=schemes)
def test_zero_is_kept(data, scheme):
    """Zero is on every group's grid: a weight of 0 stays 0."""
    weight = data.draw(weights())
    weight[:, :: data.draw(st.integers(1, 12))] = 0

    kept = pseudo_quantize_tensor(weight, scheme).weight

    assert (kept[weight == 0] == 0).all()


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_all_zero(bits, zero_point, dtype):
    """A group of zeros stays zero, with a scale that even fp16 holds: no division by 0."""
    quantized = pseudo_quantize_tensor(torch.zeros(2, 8), Scheme(bits, 4, zero_point), scale_dtype=dtype)

    assert torch.equal(quantized.weight, torch.zeros(2, 8))
    assert (quantized.scales > 0).all()
    assert not quantized.zeros.any()


@SOME
@given(data=st.data(), group_size=st.sampled_from((-1, 3, 12)), zero_point=st.booleans(), dtype=dtypes)
def test_more_bits(data, group_size, zero_point, dtype):
    """More bits never have a coarser scale, so never a larger bound on the error."""
    weight = data.draw(weights(LARGEST_IN_HALF if dtype == torch.float16 else HUGE))

    scales = [
        pseudo_quantize_tensor(weight, Scheme(bits, group_size, zero_point), scale_dtype=dtype).scales
        for bits in ALL_BITS
    ]

    assert all((fine <= coarse).all() for coarse, fine in pairwise(scales))


@SOME
@given(data=st.data(), scheme=schemes, share=st.floats(0.05, 1.0))
def test_limit(data, scheme, share):
    """With a limit every weight gets the nearest code of the limit's grid, the last one if it lies beyond that."""
    weight = data.draw(weights())
    size = 12 if scheme.group_size == -1 else scheme.group_size
    limit = weight.reshape(len(weight), -1, size).abs().amax(-1) * share

    quantized = pseudo_quantize_tensor(weight, scheme, limit=limit)

    everywhere = limit.repeat_interleave(size, 1)
    clipped = weight.clamp(-everywhere, everywhere)
    scale = exact_scales(clipped, scheme)
    assert np.allclose(array(quantized.scales), scale, rtol=1e-6, atol=0)
    assert_nearest(weight, quantized)
