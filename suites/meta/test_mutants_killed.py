"""What mutation testing found unsaid of metrics and rounding: each test kills mutants that the others let live.

Numbers are by hand.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fixtures.core import codebook, metrics
from fixtures.core.codebook import CodebookQuantized, CodebookScheme
from fixtures.core.pseudo_quantize import (
    NARROWEST_RANGE,
    Quantized,
    Scheme,
    encode,
    pseudo_dequantize_tensor,
    pseudo_quantize_tensor,
)
from fixtures.core.rounding import side
from fixtures.formats import bnb_4bit

NAN, INF = math.nan, math.inf
LN3 = math.log(3)


def tensor(rows):
    """float64, so that hand-computed numbers hold to many digits."""
    return torch.tensor(rows, dtype=torch.float64)


# Metrics

HALF, QUARTER = [0.0, 0.0], [0.0, LN3]  # logits of (1/2, 1/2) and (1/4, 3/4)


def test_last_dimension_is_the_vocabulary():
    """Whatever stands before it, prompts and tokens, say, the last dimension is the vocabulary."""
    kl = metrics.token_kl(tensor([[HALF, QUARTER, HALF], [HALF] * 3]), tensor([[QUARTER, HALF, HALF], [HALF] * 3]))

    assert kl.shape == (2, 3)
    assert kl[0].tolist() == pytest.approx([0.14384103622589045, 0.13081203594113697, 0.0])
    assert kl[1].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="a vocabulary of no tokens"):
        metrics.token_kl(torch.zeros(2, 3, 0), torch.zeros(2, 3, 0))


def test_top1_of_many_prompts():
    """So it is for the first choice, and one broken token breaks no other."""
    reference = tensor([[[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]], [[1.0, 3.0]] * 3])
    quantized = tensor([[[9.0, 8.0], [9.0, 8.0], [9.0, 8.0]], [[1.0, 3.0]] * 3])
    broken = quantized.clone()
    broken[0, 1, 0] = NAN

    assert metrics.top1_agreement(reference, quantized).tolist() == [[1, 0, 1], [1, 1, 1]]
    for found in (metrics.top1_agreement(reference, broken), metrics.top1_agreement(broken, broken)):
        assert found.isnan().tolist() == [[False, True, False], [False] * 3]


def test_nll_of_many_prompts():
    """So it is for the likelihood, whichever integers the tokens are."""
    nll = metrics.token_nll(tensor([[QUARTER, HALF, QUARTER], [HALF] * 3]), torch.tensor([[0, 1, 1], [0] * 3]).int())

    assert nll[0].tolist() == pytest.approx([math.log(4), math.log(2), math.log(4 / 3)])
    assert nll[1].tolist() == pytest.approx([math.log(2)] * 3)
    assert metrics.token_nll(tensor([QUARTER]), torch.tensor([0]).byte()).tolist() == [pytest.approx(math.log(4))]
    with pytest.raises(ValueError, match="tokens"):
        metrics.token_nll(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))


def test_metrics_are_in_double_precision():
    """16-bit logits are compared in float64, and so are values summed up."""
    logits = torch.tensor([[0.0, 10.0]], dtype=torch.float16)
    values = torch.tensor([2048.0, 2050.0], dtype=torch.float16)

    assert metrics.token_nll(logits, torch.tensor([1])).tolist() == [pytest.approx(4.5398899216864647e-05, rel=1e-9)]
    assert metrics.top1_agreement(logits, logits).dtype == torch.float64
    assert metrics.quantile(values, 0.25) == 2048.5
    assert metrics.perplexity(torch.tensor([1.0, 1.0, 1 + 2.0**-10]).half()) == pytest.approx(
        math.exp(1 + 2.0**-10 / 3), rel=1e-12
    )
    assert metrics.largest(tensor([1.0, 1 + 2.0**-40])) == 1 + 2.0**-40
    assert metrics.relative_error(tensor([0.1]), tensor([0.2])) == pytest.approx(1, rel=1e-12)


def test_no_error_relative_to_nothing():
    """Over a reference of 0 even a difference has no relative error, not an infinite one."""
    assert math.isnan(metrics.relative_error(tensor([0.0, 0.0]), tensor([1.0, 0.0])))


# Values


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Scheme(), "bits"),
        (CodebookScheme("nf4"), "block_size"),
        (bnb_4bit.State("nf4", (1, 2), 64), "shape"),
        (pseudo_quantize_tensor(torch.ones(1, 4), Scheme(4, 4)), "codes"),
        (codebook.pseudo_quantize_blocks(torch.ones(1, 4), CodebookScheme("nf4")), "absmax"),
        (pseudo_quantize_tensor(torch.ones(1, 4), Scheme(4, 4)).rounding(torch.ones(1, 4)), "error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_are_frozen(value, field):
    """What was measured or read cannot be changed afterwards."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


@pytest.mark.parametrize(
    ("scheme", "said"), [(Scheme(), "4-bit g128"), (Scheme(3, -1, zero_point=False), "3-bit per row symmetric")]
)
def test_scheme_says_itself(scheme, said):
    """The usual scheme is 4 bits in groups of 128 with zero points; others say what they are."""
    assert str(scheme) == said
    assert (Scheme().zero_point, Scheme(4, 3).divides(9), Scheme(4, 3).divides(8), Scheme(4, -1).divides(7)) == (
        True, True, False, True,
    )  # fmt: skip


# Rounding of a weight


def test_narrowest_scale():
    """A group of zeros has the scale of a range of 1e-5, as AutoAWQ gives it."""
    zeros = torch.zeros(1, 4)

    assert float(pseudo_quantize_tensor(zeros, Scheme(4, 4)).scales) == pytest.approx(1e-5 / 15, rel=1e-6)
    assert float(pseudo_quantize_tensor(zeros, Scheme(3, 4, zero_point=False)).scales) == pytest.approx(1e-5 / 3)
    assert NARROWEST_RANGE == 1e-5


def test_zero_point_is_a_code():
    """Among the smallest numbers fp16 rounds a scale down so far that 0 would lie a code past the last."""
    unit = 2.0**-24  # fp16's smallest number: the scale, 11.49 of it, becomes 11, and -15 x 11.49 / 11 rounds to -16
    weight = torch.tensor([[-15 * 11.49 * unit, 0.0]])
    quantized = pseudo_quantize_tensor(weight, Scheme(4, 2), scale_dtype=torch.float16)

    assert float(quantized.scales) == 11 * unit
    assert quantized.zeros.tolist() == [[15]]
    assert quantized.codes.tolist() == [[0, 15]]
    assert quantized.weight.tolist() == [[-15 * 11 * unit, 0.0]]


def test_zero_points_of_any_size():
    """Zero points are whole numbers of 16 bits; what is read is judged as it is, 2049 as well, which fp16 lacks."""
    codes, zeros = torch.tensor([[2050, 0]], dtype=torch.int16), torch.tensor([[2049]], dtype=torch.int16)

    assert pseudo_dequantize_tensor(codes, torch.tensor([[0.5]]), zeros).tolist() == [[0.5, -1024.5]]


@pytest.mark.parametrize("zero_point", [True, False])
def test_16_bit_weights_are_rounded_as_numbers(zero_point):
    """A 16-bit weight is quantized as the same numbers in 32 bits are: the arithmetic is not its own."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).half()
    scheme = Scheme(8, 32, zero_point=zero_point)
    ours, plain = (pseudo_quantize_tensor(w, scheme, scale_dtype=torch.float32) for w in (weight, weight.float()))

    assert torch.equal(ours.scales, plain.scales)
    assert torch.equal(ours.codes, plain.codes)
    scales = plain.scales.half()
    assert torch.equal(
        encode(weight, scales, plain.zeros, scheme), encode(weight.float(), scales.float(), plain.zeros, scheme)
    )


def test_a_weight_that_cannot_be_quantized_is_named():
    """Without a name it is "weight"; and one scale of many that overflows is enough."""
    with pytest.raises(ValueError, match=r"^weight: 1 of 4 weights"):
        pseudo_quantize_tensor(torch.tensor([[1.0, NAN, 0.0, 0.0]]), Scheme(4, 4))
    with pytest.raises(ValueError, match=r"^weight: a scale overflows"):
        pseudo_quantize_tensor(torch.tensor([[1.0, 1.0, 1e9, 1.0]]), Scheme(4, 2), scale_dtype=torch.float16)


# Judging rounded weights


def judged(weights, codes, scale, zero, scheme, dtype=torch.float32):
    """One group: codes beside the weights that they should be near."""
    scales, zeros = torch.tensor([[scale]], dtype=dtype), torch.tensor([[zero]], dtype=torch.int16)
    quantized = Quantized(torch.tensor([codes], dtype=torch.int16), scales, zeros, scheme)
    return quantized.rounding(torch.tensor([weights]))


# Codes 0..3 around a zero point of 1 in steps of 1/2 stand for -0.5, 0, 0.5 and 1; a cell's half width is 1/4.
TWO_BITS = [
    # weight, code, error in half widths, error at an end in steps, clipped
    pytest.param(0.1, 1, 0.4, 0, False, id="inside"),
    pytest.param(-0.1, 1, 0.4, 0, False, id="inside, below 0"),
    pytest.param(0.4, 1, 1.6, 0, False, id="the neighbour's code, from below"),
    pytest.param(0.1, 2, 1.6, 0, False, id="the neighbour's code, from above"),
    pytest.param(0.7, 2, 0.8, 0, False, id="the last inside"),
    pytest.param(-0.2, 1, 0.8, 0, False, id="the first inside"),
    pytest.param(0.75, 2, 0, 1, False, id="where the last cell begins"),
    pytest.param(-0.25, 1, 0, 1, False, id="where the first cell ends"),
    pytest.param(0.9, 3, 0, 0, False, id="the last cell"),
    pytest.param(-0.4, 0, 0, 0, False, id="the first cell"),
    pytest.param(-0.7, 1, 0, 1, False, id="beyond, less than half a step"),
    pytest.param(1.2, 1, 0, 2, False, id="beyond, two steps off"),
    pytest.param(1.25, 3, 0, 0, False, id="beyond, just half a step"),
    pytest.param(1.2504, 3, 0, 0, True, id="beyond, hardly more than half a step"),
    pytest.param(1.2502, 3, 0, 0, False, id="beyond, less than rounding can tell"),
    pytest.param(1.5, 3, 0, 0, True, id="clipped above"),
    pytest.param(-1.0, 0, 0, 0, True, id="clipped below"),
]


@pytest.mark.parametrize(("weight", "code", "error", "end_error", "clipped"), TWO_BITS)
def test_one_weight(weight, code, error, end_error, clipped):
    """An element is held against its cell, or against the end of the range where clipping may have been at work."""
    found = judged([weight], [code], 0.5, 1, Scheme(2, 1))

    assert float(found.error) == pytest.approx(error, abs=1e-6)
    assert float(found.end_error) == pytest.approx(end_error, abs=1e-6)
    assert bool(found.clipped) is clipped


def test_a_group_by_hand():
    """What theory expects, and the scale beside plain rounding's, of a group."""
    found = judged([0.1, -0.7, 1.5, -1.0], [1, 0, 3, 0], 0.5, 1, Scheme(2, 4))

    # 4 uniform errors of (1/2)^2 / 12; beyond the range by 0.2, 1/2 and 1/2; plain rounding's scale is 2.5 / 3
    assert float(found.expected) == pytest.approx(1 / 12 + 0.04 + 0.25 + 0.25)
    assert float(found.scale_ratio) == pytest.approx(0.5 / (2.5 / 3))
    assert found.expected.dtype == torch.float64
    assert (found.recoded, found.broken_scales, found.error.shape, found.scale_ratio.shape) == (0, 0, (1, 1, 4), (1, 1))


@pytest.mark.parametrize(
    ("weights", "scheme", "plain"),
    [
        ([0.5, 1.5], Scheme(2, 2), 1.5 / 3),
        ([-1.5, -0.5], Scheme(2, 2), 1.5 / 3),
        ([-0.5, 0.25], Scheme(2, 2), 0.75 / 3),
        ([-0.9, 0.6], Scheme(3, 2, zero_point=False), 0.9 / 3),
        ([0.3, 0.6], Scheme(3, 2, zero_point=False), 0.6 / 3),
        ([0.0, 2e-5], Scheme(2, 2), 2e-5 / 3),
        ([0.0, 1e-5], Scheme(2, 2), 0.1),  # no wider than the narrowest range: its own is as good as any
        ([0.0, 0.9e-5], Scheme(3, 2, zero_point=False), 0.1),
    ],
)
def test_scale_ratio(weights, scheme, plain):
    """A stored scale is held against that of the range, which contains 0; a group of zeros may have any."""
    found = judged(weights, [0, 0], 0.1, 0, scheme)

    assert float(found.scale_ratio) == pytest.approx(0.1 / plain, rel=1e-6)


def test_broken_scales():
    """A scale that is NaN, infinite, 0 or negative is broken."""
    scales = torch.tensor([[NAN, INF, -INF, 0.0, -1.0, 1e-30, 1.0]])
    codes = torch.zeros(1, 7, dtype=torch.int16)
    quantized = Quantized(codes, scales, codes, Scheme(2, 1))

    assert quantized.rounding(torch.ones(1, 7)).broken_scales == 5


def test_groups_are_judged_apart():
    """Every group of every row has its own scale, zero point and range."""
    scales = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.125]])
    zeros = torch.tensor([[0, 1, 2], [3, 0, 1]], dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (2, 12), generator=generator, dtype=torch.int16)
    wanted = torch.randn(2, 12, generator=generator)
    together = Quantized(codes, scales, zeros, Scheme(2, 4)).rounding(wanted)

    parts = []
    for row in range(2):
        for group in range(3):
            place = slice(4 * group, 4 * group + 4)
            part = judged(
                wanted[row, place].tolist(),
                codes[row, place].tolist(),
                float(scales[row, group]),
                int(zeros[row, group]),
                Scheme(2, 4),
            )
            for field in ("error", "end_error", "clipped", "scale_ratio"):
                assert torch.equal(getattr(together, field)[row, group], getattr(part, field)[0, 0]), field
            parts.append(part)
    assert float(together.expected) == pytest.approx(sum(float(part.expected) for part in parts), rel=1e-12)


@pytest.mark.parametrize(
    "weights", [[0.0, 0.0, 0.0], [0.001, 0.5, 1.0], [-0.001, -0.5, -1.0], [0.0, 0.5, 1.0]], ids=str
)
@pytest.mark.parametrize("zero_point", [True, False])
def test_zero_at_an_end(weights, zero_point):
    """In a group of one sign, or of zeros, 0 is an end of the range: weights near it are rounded, not a range off."""
    weight = torch.tensor([weights])
    found = pseudo_quantize_tensor(weight, Scheme(4, 3, zero_point=zero_point)).rounding(weight)

    assert float(found.end_error.max()) == pytest.approx(0, abs=1e-5)
    assert float(found.error.max()) <= 1.001
    assert (int(found.clipped.sum()), found.recoded, found.broken_scales) == (0, 0, 0)


def test_16_bit_scales_are_judged_in_32_bits():
    """The scale of an artifact is 16 bits wide; what is reckoned with it is not."""
    scale = float(torch.tensor(0.001, dtype=torch.float16))
    found = judged([0.0005, 0.003], [1, 3], scale, 0, Scheme(2, 2), torch.float16)
    seven = judged([0.0] * 7, [0] * 7, 1.0, 0, Scheme(2, 7))

    assert float(found.expected) == pytest.approx(2 * scale**2 / 12, rel=1e-6)
    assert float(found.scale_ratio) == pytest.approx(scale / 0.001, rel=1e-6)
    assert found.scale_ratio.dtype == torch.float32
    assert float(seven.expected) == 7 * float(torch.tensor(1 / 12))  # summed in float64


def test_cell_by_side():
    """An error is over the half width of the cell on its side; none at all is none over any width, 0 too."""
    found = side(torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 0.0]), torch.tensor([4.0, 4.0, 0.0]))

    assert found.tolist() == [0.5, 0.25, 0.0]


# Judging weights with a code book


def in_a_block(kind, weights, absmax, codes):
    """One row, one block: codes beside the weights that they should be near."""
    row = torch.tensor([codes], dtype=torch.int16)
    quantized = CodebookQuantized(row, torch.tensor([absmax]), CodebookScheme(kind))
    return quantized.rounding(torch.tensor([weights]))


# NF4 ends in -1, -0.6962, -0.5251 and in 0.5626, 0.7230, 1: its last gaps are 0.3038 and 0.2770. Absmax is 2.
NF4_ENDS = [
    # weight, code, error at an end in steps, clipped
    pytest.param(-2.0, 0, 0, False, id="the first value"),
    pytest.param(-2.0, 1, 1, False, id="the second for the first"),
    pytest.param(-2.0, 2, (1 - 0.5250730514526367) / 0.3038071990013123, False, id="the third for the first"),
    pytest.param(2.0, 15, 0, False, id="the last value"),
    pytest.param(2.0, 14, 1, False, id="the last but one for the last"),
    pytest.param(2.0, 13, (1 - 0.5626170039176941) / 0.2770431637763977, False, id="the last but two for the last"),
    pytest.param(1.4459137, 13, 0, False, id="not the last"),
    pytest.param(-2.3035, 0, 0, False, id="beyond the first, less than half a step"),
    pytest.param(-2.3040, 0, 0, False, id="beyond the first, less than rounding can tell"),
    pytest.param(-2.3043, 0, 0, True, id="clipped below"),
    pytest.param(2.2768, 15, 0, False, id="beyond the last, less than half a step"),
    pytest.param(2.2772, 15, 0, False, id="beyond the last, less than rounding can tell"),
    pytest.param(2.2775, 15, 0, True, id="clipped above"),
]


@pytest.mark.parametrize(("weight", "code", "end_error", "clipped"), NF4_ENDS)
def test_ends_of_a_code_book(weight, code, end_error, clipped):
    """At either end of the table an error is said in that end's steps, and half of one beyond it is clipped."""
    found = in_a_block("nf4", [weight], 2.0, [code])

    assert float(found.end_error) == pytest.approx(end_error, abs=1e-5)
    assert bool(found.clipped) is clipped


def test_a_block_by_hand():
    """Errors over the cell's half width on their side, and what theory expects, of FP4: 0, 1/6, 1/4, 1/3 of 12."""
    found = in_a_block("fp4", [2.1, 2.9, 12.0, 5.5], 12.0, [6, 6, 3, 4])

    # 2 lies between 0.0625 and 3; 4 between 3 and 6. The nearest of 2.9 is 3, of 5.5 it is 6.
    assert found.error.tolist() == pytest.approx([0.1 / 0.5, 0.9 / 0.5, 0.0, 1.5 / 1.0], abs=1e-5)
    assert float(found.expected) == pytest.approx(0.01 + 0.01 + 0.25, rel=1e-5)
    assert found.expected.dtype == torch.float64
    assert (found.recoded, found.broken_scales, float(found.scale_ratio)) == (0, 0, 1)


def test_small_weights_need_a_scale():
    """A scale of 0 under weights that are not 0 is broken, however small they are."""
    assert in_a_block("nf4", [1e-3, 0.0], 0.0, [15, 7]).broken_scales == 1
    assert in_a_block("nf4", [0.0, 0.0], 0.0, [7, 7]).broken_scales == 0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_16_bit_weights_in_blocks(kind):
    """A 16-bit weight is quantized as the same numbers in 32 bits are."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).half()
    ours, plain = (codebook.pseudo_quantize_blocks(w, CodebookScheme(kind)) for w in (weight, weight.float()))

    assert (ours.codes.dtype, ours.absmax.dtype) == (torch.int16, torch.float32)
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.absmax, plain.absmax)


@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_go_where_the_weight_is(kind, slack, monkeypatch):
    """A weight on another device is decoded and judged there, though tables are made on the CPU."""
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: 0)  # a device without numbers has none to count
    weight, absmax = torch.zeros(2, 64, device="meta"), torch.ones(2, device="meta")
    quantized = CodebookQuantized(weight.short(), absmax, CodebookScheme(kind), absmax if slack else None)
    found = quantized.rounding(weight)

    judged_there = (found.error, found.end_error, found.clipped, found.expected, found.scale_ratio)
    assert {t.device.type for t in (quantized.weight, *judged_there)} == {"meta"}
