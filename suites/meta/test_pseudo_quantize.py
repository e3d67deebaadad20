"""Rounding to nearest: every weight within half a scale, whatever the weights, the bits and the groups.

The bound, exactly: half the stored scale, plus (2^bits - 1) times what rounding to the stored dtype moved the scale,
plus (2^bits - 1) times 2^-22 of the scale for float32's own arithmetic.
"""

from __future__ import annotations

import math
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


# Known by hand


@pytest.mark.parametrize(
    ("bits", "zero_point", "weight", "scale", "zero", "codes"),
    [
        pytest.param(2, True, [-1.0, 0.0, 1.0, 2.0], 1.0, 1, [0, 1, 2, 3], id="2 bits, exact"),
        pytest.param(2, True, [-0.4, 0.0, 0.6, 2.6], 1.0, 0, [0, 0, 1, 3], id="2 bits, zero point rounded"),
        pytest.param(3, True, [0.0, 0.9, 3.4, 7.0], 1.0, 0, [0, 1, 3, 7], id="3 bits"),
        pytest.param(4, True, [-1.0, -0.3, 0.4, 2.75], 0.25, 4, [0, 3, 6, 15], id="4 bits"),
        pytest.param(4, True, [1.0, 1.5, 1.75, 3.75], 0.25, 0, [4, 6, 7, 15], id="4 bits, all positive"),
        pytest.param(4, True, [-3.75, -1.75, -1.5, -1.0], 0.25, 15, [0, 8, 9, 11], id="4 bits, all negative"),
        pytest.param(8, True, [-1.0, 0.0, 0.3, 254.0], 1.0, 1, [0, 1, 1, 255], id="8 bits"),
        pytest.param(2, False, [-2.0, -0.9, 1.1, 2.0], 2.0, 0, [-1, 0, 1, 1], id="2 bits, symmetric"),
        pytest.param(3, False, [-1.5, 0.6, 0.2, 1.0], 0.5, 0, [-3, 1, 0, 2], id="3 bits, symmetric"),
        pytest.param(4, False, [-1.75, -1.0, 0.3, 1.2], 0.25, 0, [-7, -4, 1, 5], id="4 bits, symmetric"),
        pytest.param(8, False, [12.7, -6.35, 0.04, 0.06], 0.1, 0, [127, -64, 0, 1], id="8 bits, symmetric"),
    ],
)
def test_by_hand(bits, zero_point, weight, scale, zero, codes):
    """Scales, zero points and codes are those of the definition."""
    quantized = pseudo_quantize_tensor(torch.tensor([weight]), Scheme(bits, -1, zero_point))

    assert quantized.scales.tolist() == [[pytest.approx(scale, rel=1e-7)]]
    assert quantized.zeros.tolist() == [[zero]]
    assert quantized.codes.tolist() == [codes]
    assert quantized.weight.tolist() == [[pytest.approx((code - zero) * scale, rel=1e-6) for code in codes]]


def test_groups_by_hand():
    """A group is so many consecutive inputs of one output, and nothing else moves its scale."""
    weight = torch.tensor([[0.0, 15.0, -30.0, 0.0], [7.5, 0.0, 0.0, 1500.0]])

    quantized = pseudo_quantize_tensor(weight, Scheme(4, 2))

    assert quantized.scales.tolist() == [[1.0, 2.0], [0.5, 100.0]]
    assert quantized.zeros.tolist() == [[0, 15], [0, 0]]
    assert quantized.codes.tolist() == [[0, 15, 0, 15], [15, 0, 0, 15]]
    assert torch.equal(quantized.weight, weight)


def test_dequantize_by_hand():
    """A code stands for (code - zero point) x scale of its own group."""
    codes = torch.tensor([[0, 15, 3, 4]], dtype=torch.int16)

    weight = pseudo_dequantize_tensor(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[5, 0]]))

    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-2.5, 5.0, 6.0, 8.0]]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sign(sign):
    """Weights in [1, 2] are within half a scale, where the widely copied formula is off by up to 1."""
    weight = sign * torch.linspace(1, 2, 128)[None]
    widely_copied_scale = 1 / 15
    zero = min(max(round(-float(weight.min()) / widely_copied_scale), 0), 15)
    codes = (torch.round(weight / widely_copied_scale) + zero).clamp(0, 15)
    widely_copied = ((codes - zero) * widely_copied_scale - weight).abs().max()

    quantized = pseudo_quantize_tensor(weight, Scheme(4, 128))

    assert widely_copied == pytest.approx(1.0, abs=0.01)
    assert quantized.scales.tolist() == [[pytest.approx(2 / 15)]]
    assert (quantized.weight - weight).abs().max() <= 1 / 15 + 1e-6


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_all_zero(bits, zero_point, dtype):
    """A group of zeros stays zero, with a scale that even fp16 holds: no division by 0."""
    quantized = pseudo_quantize_tensor(torch.zeros(2, 8), Scheme(bits, 4, zero_point), scale_dtype=dtype)

    assert torch.equal(quantized.weight, torch.zeros(2, 8))
    assert (quantized.scales > 0).all()
    assert not quantized.zeros.any()


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("value", [0.3, -0.3, 1e30, -65000.0, 1e-3])
def test_constant(value, zero_point):
    """A group of one value keeps it: it is the end of its own range."""
    quantized = pseudo_quantize_tensor(torch.full((1, 8), value), Scheme(4, 8, zero_point))

    assert quantized.weight.tolist() == [[pytest.approx(value, rel=1e-6)] * 8]


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("value", [1e-41, -1e-41, 1.4e-45])
def test_denormals(value, zero_point):
    """Denormal weights become 0, never NaN."""
    quantized = pseudo_quantize_tensor(torch.full((1, 8), value), Scheme(4, 8, zero_point))

    assert torch.equal(quantized.weight, torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("weight", "limit", "codes", "scale"),
    [
        # Range [-2, 1.75] at +-2: 15 steps of 0.25; 8 above gets code 15, -9 below code 0.
        pytest.param([-9.0, 1.75, 0.5, -2.0], 2.0, [0, 15, 10, 0], 0.25, id="below"),
        pytest.param([-1.75, 8.0, 0.5, 0.0], 2.0, [0, 15, 9, 7], 0.25, id="above"),
        pytest.param([-9.0, 8.0, 0.0, 1.0], 1.875, [0, 15, 8, 12], 0.25, id="both"),
        pytest.param([-1.0, 2.75, 0.0, 1.0], 1e9, [0, 15, 4, 8], 0.25, id="limit beyond every weight"),
    ],
)
def test_limit_by_hand(weight, limit, codes, scale):
    """A limit cuts the range, and what lies beyond it gets the last code."""
    quantized = pseudo_quantize_tensor(torch.tensor([weight]), Scheme(4, 4), limit=torch.tensor([[limit]]))

    assert quantized.scales.tolist() == [[scale]]
    assert quantized.codes.tolist() == [codes]


def test_beyond_is_never_one_step_inwards():
    """A weight beyond the range has the last code, also where the limit itself would round to the one before."""
    # Steps of 1 and, 0.5 rounding to even, zero point 0: the limit itself is 14.5 steps and rounds to 14.
    quantized = pseudo_quantize_tensor(torch.tensor([[-0.5, 100.0]]), Scheme(4, 2), limit=torch.tensor([[14.5]]))

    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes.tolist() == [[0, 15]]


# Refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    """NaN and infinity are refused, naming the layer and how many there are."""
    weight = torch.ones(2, 4)
    weight[1, 2] = weight[0, 0] = bad

    with pytest.raises(ValueError, match=r"layers\.3\.q_proj: 2 of 8 weights are NaN or infinite"):
        pseudo_quantize_tensor(weight, Scheme(4, 4), layer="layers.3.q_proj")


@pytest.mark.parametrize(("columns", "group_size"), [(3420, 128), (6, 4), (4, 8)])
def test_indivisible(columns, group_size):
    """A row that does not split into whole groups is refused, naming the layer, its inputs and the group size."""
    with pytest.raises(ValueError, match=rf"visual\.down_proj: {columns} input .* groups of {group_size}"):
        pseudo_quantize_tensor(torch.ones(1, columns), Scheme(4, group_size), layer="visual.down_proj")


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8,), (2, 2, 8), ()], ids=str)
def test_no_matrix(shape):
    """What is empty or no matrix is refused, naming the layer."""
    with pytest.raises(ValueError, match=r"lm_head: a weight of shape"):
        pseudo_quantize_tensor(torch.ones(shape), Scheme(4, -1), layer="lm_head")


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        pytest.param([[2e6, 0.0]], torch.float16, id="a scale beyond fp16"),
        pytest.param([[3e38, -3e38]], torch.float32, id="a range beyond float32"),
    ],
)
def test_scale_overflow(weight, dtype):
    """A scale that its dtype cannot hold is refused, naming the layer: never Inf on disk."""
    with pytest.raises(ValueError, match=r"blocks\.31: a scale overflows torch\.float"):
        pseudo_quantize_tensor(torch.tensor(weight), Scheme(4, 2), scale_dtype=dtype, layer="blocks.31")


# The scheme


@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 6, 7, 16, 32])
def test_no_such_bits(bits):
    """Only widths that exist are accepted."""
    with pytest.raises(ValueError, match=rf"^{bits} bits: must be one of 2, 3, 4, 8$"):
        Scheme(bits)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_no_such_group(group_size):
    """Only positive group sizes, and -1 for the whole row, are accepted."""
    with pytest.raises(ValueError, match=rf"group size {group_size}: must be positive, or -1"):
        Scheme(4, group_size)


@pytest.mark.parametrize(
    ("bits", "zero_point", "lowest", "highest"),
    [
        (2, True, 0, 3),
        (3, True, 0, 7),
        (4, True, 0, 15),
        (8, True, 0, 255),
        (2, False, -1, 1),
        (3, False, -3, 3),
        (4, False, -7, 7),
        (8, False, -127, 127),
    ],
)
def test_codes_of_a_scheme(bits, zero_point, lowest, highest):
    """Codes run from 0 to 2^b - 1 around a zero point, or evenly around 0 without one."""
    scheme = Scheme(bits, 128, zero_point)

    assert (scheme.lowest, scheme.highest) == (lowest, highest)


def test_scheme_divides():
    """Only whole groups divide a row; the whole row always does."""
    assert Scheme(4, 128).divides(3584)
    assert not Scheme(4, 128).divides(3420)
    assert Scheme(4, -1).divides(3420)


def test_scheme_speaks():
    """A scheme says its bits, groups and symmetry."""
    assert str(Scheme(4, 128)) == "4-bit g128"
    assert str(Scheme(8, -1, zero_point=False)) == "8-bit per row symmetric"
