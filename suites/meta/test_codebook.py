"""Code books: the tables are the published ones; a weight's error is judged by the cell that its code stands for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core.codebook import (
    CodebookQuantized,
    CodebookScheme,
    code_book,
    dynamic_map,
    nearest_cells,
    pseudo_quantize_blocks,
    sorted_values,
)

KINDS = ("nf4", "fp4")
SOME = settings(deadline=None, max_examples=100)
SLACK = 1e-5  # float32's, on ratios of differences
SIGMAS = 6

magnitudes = st.floats(2.0**-20, 2.0**20)
shares = st.lists(st.floats(-1, 1, width=32), min_size=7, max_size=40)


def drawn(rows=8, columns=96, seed=0):
    """Weights of N(0, 1)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def one_block(kind, weights, absmax, codes):
    """Codes beside the weights that they should be near: one row, one block."""
    row = torch.tensor(codes, dtype=torch.int16)[None]
    scheme = CodebookScheme(kind, block_size=64)
    return CodebookQuantized(row, torch.tensor([absmax]), scheme).rounding(torch.tensor(weights)[None])


# Tables


@pytest.mark.parametrize("kind", KINDS)
def test_code_book_is_the_library_s(kind):
    """Codes stand for the very values that bitsandbytes has for them."""
    functional = pytest.importorskip("bitsandbytes.functional")

    assert torch.equal(code_book(kind), functional.get_4bit_type(kind, device="cpu"))


def test_nf4_holds_the_normal_distribution_s_quantiles():
    """NF4 is what the paper derives: quantiles of N(0, 1), 8 below and 7 above 0, over the largest."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (torch.linspace(outermost, 0.5, count, dtype=torch.float64)[:-1] for count in (8, 9))
    quantiles = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above)]).sort().values

    assert len(quantiles) == 16
    assert (code_book("nf4") - quantiles / quantiles.max()).abs().max() < 2e-7


def test_fp4_is_a_float():
    """FP4 is a sign, two bits of exponent, downwards, and one of mantissa; exponent 0 is 0 and the smallest value."""
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = (1 + mantissa / 2) * 2.0 ** (1 - exponent) * 8 if exponent else mantissa * 2**-4
        assert code_book("fp4")[code] == pytest.approx((-1) ** sign * value / 12, rel=1e-7)


def test_dynamic_map_is_the_library_s():
    """Nested absmax are decoded with the very values that bitsandbytes has for them."""
    functional = pytest.importorskip("bitsandbytes.functional")

    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


def test_dynamic_map_is_a_table():
    """The 8-bit type has 256 different values from -0.993 to 1, in order."""
    values = dynamic_map()

    assert (len(values), float(values[-1]), float(values[127])) == (256, 1.0, 0.0)
    assert (values.diff() > 0).all()


def test_no_such_table():
    """A kind that there is not is refused by name."""
    with pytest.raises(ValueError, match="no code book 'int4'; there are nf4 and fp4"):
        code_book("int4")


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (CodebookScheme("nf4"), "nf4 b64"),
        (CodebookScheme("fp4", 128), "fp4 b128"),
        (CodebookScheme("nf4", nested=True), "nf4 b64 double-quantized"),
    ],
    ids=str,
)
def test_scheme(scheme, said):
    """A scheme calls itself by what distinguishes it, and fits linears of any width."""
    assert str(scheme) == said
    assert scheme.divides(3420)


# Quantizing


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_value(kind):
    """Every weight gets the value nearest to it of all that its block has."""
    weight = drawn()
    quantized = pseudo_quantize_blocks(weight, CodebookScheme(kind))
    candidates = code_book(kind).double() * quantized.absmax.double()[:, None]  # [blocks, 16]
    nearest = (weight.reshape(-1, 64, 1).double() - candidates[:, None]).abs().amin(-1)

    distance = (quantized.weight.double() - weight).abs().reshape(-1, 64)
    assert torch.allclose(distance, nearest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_bound(kind, seed):
    """No weight moves by more than half the widest gap of the table times its block's largest magnitude."""
    weight = drawn(seed=seed)
    quantized = pseudo_quantize_blocks(weight, CodebookScheme(kind))

    bound = sorted_values(kind).diff().max() / 2 * quantized.absmax.repeat_interleave(64).reshape(weight.shape)
    assert ((quantized.weight - weight).abs() <= bound * (1 + SLACK)).all()


# bitsandbytes' tests/test_functional.py, test_4bit_quant: blocks of 64, weights of N(0, 1)
PUBLISHED = {"nf4": (0.0728, 0.2033), "fp4": (0.0965, 0.2601)}


@pytest.mark.parametrize("kind", KINDS)
def test_published_errors(kind):
    """On weights of N(0, 1) the mean errors are those that bitsandbytes' own tests have, within 6 standard errors."""
    trials = []
    for seed in range(16):
        weight = drawn(256, 512, seed)
        error = (pseudo_quantize_blocks(weight, CodebookScheme(kind)).weight - weight).abs()
        trials.append([error.mean(), (error / (weight.abs() + 1e-8)).mean()])
    measured = torch.tensor(trials, dtype=torch.float64)

    for mean, deviation, published in zip(measured.mean(0), measured.std(0), PUBLISHED[kind], strict=True):
        assert abs(mean - published) < SIGMAS * deviation / math.sqrt(len(trials)) + 5e-5  # published to 4 digits
        assert deviation < published / 50  # else the test would say little


def test_nested_scales_are_not_made():
    """Double quantization is the library's; ours refuses it rather than leave it out."""
    with pytest.raises(ValueError, match="nested scales are not made here"):
        pseudo_quantize_blocks(drawn(), CodebookScheme("nf4", nested=True))


# Judging


@SOME
@given(st.sampled_from(KINDS), shares, magnitudes)
def test_nearest_code_and_no_other(kind, row, absmax):
    """An error of at most 1 is the nearest code's, and any other code's is larger."""
    weights = [share * absmax for share in row]
    values, book = sorted_values(kind), code_book(kind).tolist()
    middles = (values[:-1] + values[1:]) / 2
    errors = [one_block(kind, weights, absmax, [code] * len(row)).error for code in range(16)]
    for place, share in enumerate(row):
        if (middles - share).abs().min() < SLACK / 10:
            continue  # a tie: two codes are nearest
        nearest = min(range(16), key=lambda code: abs(book[code] - share))
        for code in range(16):
            assert (errors[code][place] <= 1 + SLACK) == (book[code] == book[nearest])


@SOME
@given(st.sampled_from(KINDS), shares, magnitudes)
def test_good_block(kind, row, absmax):
    """What is quantized to the nearest value is within theory's bounds in every respect."""
    weight = torch.tensor([[share * absmax for share in row]])
    rounding = pseudo_quantize_blocks(weight, CodebookScheme(kind)).rounding(weight)

    assert rounding.error.max() <= 1 + SLACK
    assert rounding.end_error.max() == 0
    assert torch.equal(rounding.scale_ratio, torch.ones(1))
    assert (int(rounding.clipped.sum()), rounding.recoded, rounding.broken_scales) == (0, 0, 0)


def test_expected_error():
    """The error that theory expects is that of the nearest values, exactly."""
    weight = drawn()
    quantized = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))

    actual = (quantized.weight - weight).double().square().sum()
    assert float(quantized.rounding(weight).expected) == pytest.approx(float(actual), rel=1e-6)


@pytest.mark.parametrize("absmax", [math.nan, math.inf, -math.inf, -1.0, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_scale(kind, absmax):
    """A scale that is NaN, infinite, negative or zero under weights that are not zero is counted."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme(kind))
    scales = good.absmax.clone()
    scales[3] = absmax

    assert dataclasses.replace(good, absmax=scales).rounding(weight).broken_scales == 1


@pytest.mark.parametrize("absmax", [math.nan, math.inf])
def test_nan_never_passes(absmax):
    """Where a decoded weight is NaN or infinite the largest error is, too: it is within no bound."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    broken = dataclasses.replace(good, absmax=torch.full_like(good.absmax, absmax)).rounding(weight)

    assert not broken.error.max() <= 1
    assert not broken.expected <= 1e30
    assert broken.recoded > 0


@pytest.mark.parametrize("absmax", [0.0, 1e-38, 1.0])
def test_block_of_zeros(absmax):
    """A block of zeros may have any scale, as long as it decodes to zeros."""
    zeros = torch.zeros(1, 64)
    quantized = pseudo_quantize_blocks(zeros, CodebookScheme("nf4"))
    rounding = dataclasses.replace(quantized, absmax=torch.tensor([absmax])).rounding(zeros)

    assert float(rounding.error.max()) == float(rounding.end_error.max()) == 0
    assert (float(rounding.scale_ratio), rounding.recoded, rounding.broken_scales) == (1, 0, 0)


def test_zeros_that_are_not():
    """A block of zeros that decodes to anything else is off."""
    quantized = pseudo_quantize_blocks(torch.zeros(1, 64), CodebookScheme("nf4"))
    ones = dataclasses.replace(quantized, codes=quantized.codes + 1, absmax=torch.ones(1))

    assert ones.rounding(torch.zeros(1, 64)).error.min() > 1


@pytest.mark.parametrize("share", [0.99, 1.01, 2.0, 0.5])
def test_scale_off(share):
    """A scale that is not the block's largest magnitude shows as its share of it."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    rounding = dataclasses.replace(good, absmax=good.absmax * share).rounding(weight)

    assert rounding.scale_ratio == pytest.approx(torch.full((12,), share), rel=1e-6)


def test_scale_too_small():
    """Weights farther beyond the last value than half a step are clipped, and those at the end are off by steps."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    rounding = dataclasses.replace(good, absmax=good.absmax / 2).rounding(weight)

    assert rounding.clipped.sum() > 20
    assert rounding.error.max() > 3
    assert rounding.end_error.max() > 1


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 65), (33, 70)], ids=str)
def test_blocks_run_on(shape):
    """Blocks run on from row to row, and the last may be short."""
    weight = drawn(*shape)
    quantized = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))

    flat = weight.reshape(-1)
    assert quantized.absmax.tolist() == [float(flat[i : i + 64].abs().max()) for i in range(0, len(flat), 64)]
    assert quantized.weight.shape == shape
    assert quantized.rounding(weight).error.max() <= 1 + SLACK


# Nested scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", [0.01, 0.1, 0.3])
def test_moved_scales(kind, moved):
    """Codes chosen for one scale and decoded with another stay within the bound that is widened by what moved it."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme(kind))
    factor = 1 + moved * (2 * torch.rand(len(good.absmax), generator=torch.Generator().manual_seed(1)) - 1)
    nested = dataclasses.replace(good, absmax=good.absmax * factor, slack=moved * good.absmax)

    rounding = nested.rounding(weight)
    assert rounding.error.max() <= 1 + SLACK
    assert torch.allclose(rounding.scale_ratio, torch.ones(12))
    assert rounding.clipped.sum() == 0
    assert dataclasses.replace(nested, slack=None).rounding(weight).error.max() > 1


def test_slack_excuses_no_more():
    """A scale moved by more than nesting can is seen, and by how much more."""
    weight = drawn()
    good = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    nested = dataclasses.replace(good, absmax=good.absmax * 1.03, slack=0.01 * good.absmax)

    assert nested.rounding(weight).scale_ratio == pytest.approx(torch.full((12,), 1.02), rel=1e-5)


def test_cells():
    """A value's cell reaches half way to its neighbours, and outwards as far as inwards."""
    below, above = nearest_cells(torch.tensor([0.0, 1.0, 4.0]))

    assert (below.tolist(), above.tolist()) == ([0.5, 0.5, 1.5], [0.5, 1.5, 1.5])
