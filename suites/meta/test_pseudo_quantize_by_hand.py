"""Rounding to nearest by hand: the definition's numbers, the corners that formulas miss, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from fixtures.core.pseudo_quantize import Scheme, pseudo_dequantize_tensor, pseudo_quantize_tensor

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
