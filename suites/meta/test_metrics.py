"""Metrics: each is what its name says, on tensors small enough to reckon by hand; nothing and NaN are never good."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core import metrics

NAN, INF = math.nan, math.inf
SOME = settings(deadline=None, max_examples=100)
HALVES = [[0.0, 0.0]]  # logits of p = (1/2, 1/2)
QUARTER = [[0.0, math.log(3)]]  # of p = (1/4, 3/4)
finite = st.floats(-50, 50)


def tensor(rows):
    """float64, so that hand-computed numbers hold to many digits."""
    return torch.tensor(rows, dtype=torch.float64)


# KL divergence


@pytest.mark.parametrize(
    ("reference", "quantized", "nats"),
    [
        # 1/2 ln((1/2)/(1/4)) + 1/2 ln((1/2)/(3/4)) = 1/2 ln(4/3)
        pytest.param(HALVES, QUARTER, 0.14384103622589045, id="1/2 against 1/4"),
        # 1/4 ln((1/4)/(1/2)) + 3/4 ln((3/4)/(1/2)) = 3/4 ln 3 - ln 2
        pytest.param(QUARTER, HALVES, 0.13081203594113697, id="1/4 against 1/2"),
        pytest.param([[7.0, 7.0]], QUARTER, 0.14384103622589045, id="logits shifted"),
        pytest.param([[0.0, -INF]], HALVES, 0.6931471805599453, id="a token ruled out by the reference"),
        pytest.param([[0.0, -INF]], [[0.0, -INF]], 0.0, id="a token ruled out by both"),
        pytest.param(HALVES, [[0.0, -INF]], INF, id="a token ruled out by the artifact alone"),
        pytest.param([[800.0, 0.0]], [[0.0, 800.0]], 800.0, id="certain, and wrong"),
    ],
)
def test_kl(reference, quantized, nats):
    """KL is sum p ln(p/q) in nats, of the reference's p, not the other way round."""
    assert metrics.token_kl(tensor(reference), tensor(quantized)).tolist() == [pytest.approx(nats, abs=1e-12)]


def test_kl_per_token():
    """Every token has a KL of its own, so that one broken token is not averaged away."""
    kl = metrics.token_kl(tensor(HALVES * 2 + QUARTER), tensor(QUARTER + HALVES * 2))

    assert kl.tolist() == pytest.approx([0.14384103622589045, 0.0, 0.13081203594113697])


@SOME
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=5))
def test_kl_is_numpys(pairs):
    """KL is that of an independent float64 computation, and never negative."""
    logits = np.array(pairs).T
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits)

    kl = metrics.token_kl(tensor(logits[:1].tolist()), tensor(logits[1:].tolist()))

    assert kl.item() >= 0
    assert kl.item() == pytest.approx(float((p * (np.log(p) - np.log(q))).sum()), abs=1e-9)


@SOME
@given(st.lists(finite, min_size=2, max_size=6), finite)
def test_kl_zero(logits, shift):
    """KL is 0 where both give one distribution, also by logits that differ by a constant."""
    a = tensor([logits])

    assert metrics.token_kl(a, a).tolist() == [0.0]
    assert 0 <= metrics.token_kl(a, a + shift).item() < 1e-12


def test_kl_is_never_negative():
    """Rounding makes no KL negative, over a thousand distributions that are nearly equal."""
    logits = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    assert (metrics.token_kl(logits, logits + 0.1) >= 0).all()


@SOME
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.01, 5), st.data())
def test_kl_positive(logits, change, data):
    """KL is above 0 wherever the distributions differ."""
    other = list(logits)
    other[data.draw(st.integers(0, len(logits) - 1))] += change

    assert metrics.token_kl(tensor([logits]), tensor([other])).item() > 1e-12


def test_kl_in_half_precision():
    """Logits in 16 bits are compared in float64: a small KL is not lost in rounding."""
    kl = metrics.token_kl(torch.zeros(1, 2, dtype=torch.float16), torch.tensor([[0.0, 2.0**-10]], dtype=torch.float16))

    # Second order: p q / 2 x the difference of the logits, squared.
    assert kl.item() == pytest.approx(2.0**-20 / 8, rel=1e-3)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["NaN", "inf"])
@pytest.mark.parametrize("side", ["reference", "quantized", "both"])
def test_kl_of_broken_logits(bad, side):
    """NaN or overflowed logits have a KL of NaN, never 0, and spare the other tokens."""
    good, broken = tensor(HALVES * 2), tensor([[0.0, 0.0], [bad, 0.0]])
    reference, quantized = (good if side == "quantized" else broken), (good if side == "reference" else broken)

    first, second = metrics.token_kl(reference, quantized).tolist()

    assert first == 0
    assert math.isnan(second)


def test_kl_where_everything_is_ruled_out():
    """A row of -inf is no distribution: its KL is NaN, never 0."""
    nothing = torch.full((1, 3), -INF)

    assert metrics.token_kl(nothing, nothing).isnan().all()
    assert metrics.token_kl(nothing, torch.zeros(1, 3)).isnan().all()


def test_kl_of_no_vocabulary():
    """Without a vocabulary nothing is compared, which is an error, not a KL of 0."""
    with pytest.raises(ValueError, match="vocabulary"):
        metrics.token_kl(torch.zeros(3, 0), torch.zeros(3, 0))


# The first choice


def test_top1():
    """Top-1 agreement looks at the first choice alone."""
    reference = tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    quantized = tensor([[9.0, 1.0, 8.9], [2.9, 3.0, 0.0], [0.0, 1.0, 1.1]])

    assert metrics.top1_agreement(reference, quantized).tolist() == [1.0, 0.0, 1.0]


def test_top1_is_not_top5():
    """A first choice that became second, or fifth of five, does not agree."""
    reference = tensor([[5.0, 4.0, 3.0, 2.0, 1.0]] * 2)
    quantized = tensor([[4.0, 5.0, 3.0, 2.0, 1.0], [1.0, 5.0, 4.0, 3.0, 2.0]])

    assert metrics.top1_agreement(reference, quantized).tolist() == [0.0, 0.0]


def test_top1_is_the_highest():
    """The choice is the most likely token, not the least."""
    assert metrics.top1_agreement(tensor([[9.0, 5.0, 1.0]]), tensor([[5.0, 9.0, 1.0]])).tolist() == [0.0]
    assert metrics.top1_agreement(tensor([[9.0, 5.0, 1.0]]), tensor([[9.0, 1.0, 5.0]])).tolist() == [1.0]


@pytest.mark.parametrize("row", [[NAN, 0.0], [0.0, NAN], [NAN, NAN], [INF, 0.0], [INF, INF], [-INF, -INF]], ids=str)
@pytest.mark.parametrize("side", ["reference", "quantized", "both"])
def test_top1_of_broken_logits(row, side):
    """What is no distribution has no first choice: NaN, never agreement."""
    good, broken = tensor([[1.0, 0.0]]), tensor([row])
    reference, quantized = (good if side == "quantized" else broken), (good if side == "reference" else broken)

    assert metrics.top1_agreement(reference, quantized).isnan().all()


def test_top1_beside_a_token_ruled_out():
    """A single -inf logit is a token ruled out, not a broken row."""
    assert metrics.top1_agreement(tensor([[1.0, -INF]]), tensor([[2.0, -INF]])).tolist() == [1.0]


@pytest.mark.parametrize("metric", [metrics.token_kl, metrics.top1_agreement, metrics.relative_error])
@pytest.mark.parametrize("shapes", [((2, 4), (3, 4)), ((1, 4), (3, 4)), ((2, 4), (2, 5)), ((4,), (1, 4))], ids=str)
def test_other_shape(metric, shapes):
    """Tensors of other shapes are refused, not cut to the shorter nor broadcast."""
    a, b = (torch.zeros(shape) for shape in shapes)

    with pytest.raises(ValueError, match="cannot compare"):
        metric(a, b)


# Likelihood


def test_nll():
    """A token's NLL is -ln of the probability it had, for every token that came."""
    nll = metrics.token_nll(tensor(QUARTER * 2 + HALVES), torch.tensor([0, 1, 1]))

    assert nll.tolist() == pytest.approx([1.3862943611198906, 0.2876820724517809, 0.6931471805599453])  # ln 4, 4/3, 2


def test_nll_of_broken_logits():
    """NaN logits have an NLL of NaN; a token ruled out has an infinite one."""
    nll = metrics.token_nll(tensor([[0.0, NAN], [0.0, -INF]]), torch.tensor([0, 1]))

    assert math.isnan(nll[0])
    assert nll[1] == INF


@pytest.mark.parametrize("tokens", [1, 3, 0])
def test_nll_of_other_tokens(tokens):
    """Logits and tokens of different number are refused, not cut to the shorter."""
    with pytest.raises(ValueError, match="tokens"):
        metrics.token_nll(torch.zeros(2, 4), torch.zeros(tokens, dtype=torch.long))


def test_perplexity():
    """Perplexity is exp of the mean NLL: a fair coin's is 2, and the mean is taken before exp."""
    assert metrics.perplexity(tensor([math.log(2)] * 3)) == pytest.approx(2)
    assert metrics.perplexity(tensor([math.log(2), math.log(8)])) == pytest.approx(4)
    assert metrics.perplexity(torch.tensor([math.log(2), math.log(8)])) == pytest.approx(4)


def test_perplexity_of_nothing_good():
    """No tokens or a NaN make NaN; what no float holds is infinite, not an exception."""
    assert math.isnan(metrics.perplexity(tensor([])))
    assert math.isnan(metrics.perplexity(tensor([1.0, NAN])))
    assert metrics.perplexity(tensor([1.0, INF])) == INF
    assert metrics.perplexity(tensor([1000.0])) == INF


# Summaries


@pytest.mark.parametrize(
    ("summary", "expected"),
    [(metrics.mean, 2.5), (metrics.largest, 4.0), (lambda v: metrics.quantile(v, 0.5), 2.5)],
    ids=["mean", "largest", "quantile"],
)
def test_summary(summary, expected):
    """A summary of numbers is a plain float; of nothing, or with a NaN anywhere, it is NaN."""
    found = summary(torch.tensor([1.0, 4.0, 2.0, 3.0]))

    assert type(found) is float
    assert found == expected
    assert math.isnan(summary(torch.tensor([])))
    for place in range(9):
        values = torch.ones(9)
        values[place] = NAN
        assert math.isnan(summary(values))


def test_mean_is_exact():
    """A mean of 16-bit values neither overflows nor loses the small ones."""
    assert metrics.mean(torch.full((4,), 60000.0, dtype=torch.float16)) == 60000
    assert metrics.mean(torch.tensor([2048.0] + [1.0] * 2048, dtype=torch.float16)) == 4096 / 2049


@SOME
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values, q):
    """A quantile is linearly interpolated, as numpy's is."""
    assert metrics.quantile(tensor(values), q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-9)


def test_quantile_by_hand():
    """The quantile of shuffled values is that of the sorted ones, whatever their shape."""
    values = torch.tensor([[40.0, 0.0], [30.0, 10.0]])

    assert [metrics.quantile(values, q) for q in (0.0, 0.25, 0.5, 1.0)] == [0.0, 7.5, 20.0, 40.0]
    assert metrics.quantile(torch.arange(101), 0.99) == pytest.approx(99)


def test_quantile_of_infinity():
    """An infinite value is never interpolated away into a finite one."""
    assert not math.isfinite(metrics.quantile(tensor([0.0, 0.0, INF]), 0.99))
    assert not math.isfinite(metrics.quantile(tensor([INF]), 0.5))


# Greedy answers


@pytest.mark.parametrize(
    ("reference", "quantized", "share"),
    [
        pytest.param([1, 2, 3, 4], [1, 2, 3, 4], 1.0, id="the same"),
        pytest.param([1, 2, 3, 4], [1, 2, 9, 4], 0.5, id="a difference, then the same again"),
        pytest.param([1, 2, 3, 4], [9, 2, 3, 4], 0.0, id="the first token differs"),
        pytest.param([1, 2, 3, 4], [1, 2, 3], 0.75, id="shorter"),
        pytest.param([1, 2, 3, 4], [1, 2, 3, 4, 5], 0.75, id="longer"),
        pytest.param([1, 2, 3, 4], [1, 9, 3, 4, 5, 6], 0.25, id="longer and different"),
        pytest.param([1, 2, 3, 4], [], 0.0, id="silence"),
        pytest.param([1], [1, 2], 0.0, id="ran on after a single token"),
    ],
)
def test_agreeing_prefix(reference, quantized, share):
    """Agreement is the share of the reference before the first difference; stopping early or late is one."""
    assert metrics.agreeing_prefix(reference, quantized) == share


@pytest.mark.parametrize("quantized", [[], [1, 2]], ids=str)
def test_agreeing_with_nothing(quantized):
    """With an empty reference nothing is compared: NaN, never full agreement."""
    assert math.isnan(metrics.agreeing_prefix([], quantized))


# Whole tensors


def test_relative_error():
    """Relative error is the Frobenius norm of the difference over the reference's."""
    assert metrics.relative_error(tensor([[3.0, 0.0], [0.0, 4.0]]), tensor([[3.0, 1.0], [0.0, 4.0]])) == 0.2
    assert metrics.relative_error(tensor([3.0, 4.0]), tensor([3.0, 4.0])) == 0
    assert metrics.relative_error(tensor([3.0, 4.0]), tensor([0.0, 0.0])) == 1


@pytest.mark.parametrize(("scale", "error"), [(2.0, 1.0), (0.9, 0.1), (-1.0, 2.0)])
def test_relative_error_sees_scale(scale, error):
    """A global scale, to which the cosine is blind, is an error."""
    reference = torch.linspace(-3, 5, 64, dtype=torch.float64)
    other = scale * reference

    assert abs(torch.cosine_similarity(reference, other, dim=0).item()) == pytest.approx(1)
    assert metrics.relative_error(reference, other) == pytest.approx(error)


def test_relative_error_is_not_symmetric():
    """The reference's norm is what the difference is held against."""
    assert metrics.relative_error(tensor([4.0]), tensor([1.0])) == 0.75
    assert metrics.relative_error(tensor([1.0]), tensor([4.0])) == 3


def test_relative_error_in_half_precision():
    """16-bit values whose squares overflow 16 bits have a finite error."""
    a = torch.full((2,), 60000.0, dtype=torch.float16)

    assert metrics.relative_error(a, a / 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("reference", "other"),
    [([], []), ([0.0, 0.0], [0.0, 0.0]), ([1.0, NAN], [1.0, 1.0]), ([1.0, 1.0], [1.0, NAN]), ([NAN], [NAN])],
    ids=str,
)
def test_no_relative_error(reference, other):
    """Nothing, a reference of 0 and NaN on either side have an error of NaN, never 0."""
    assert math.isnan(metrics.relative_error(tensor(reference), tensor(other)))


# Accuracy


@pytest.mark.parametrize(
    ("reference", "quantized", "drop", "error"),
    [
        # Drops 1, 0, 0, 0: mean 1/4, sample variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, of the mean 1/16.
        pytest.param([1, 1, 1, 0], [0, 1, 1, 0], 0.25, 0.25, id="one of four lost"),
        # Drops 1, -1, 0, 0: mean 0, sample variance 2/3, of the mean 1/6.
        pytest.param([1, 0, 1, 0], [0, 1, 1, 0], 0.0, 0.408248290463863, id="one lost, one won"),
        # Drops -1, 0: mean -1/2, sample variance 1/2, of the mean 1/4.
        pytest.param([0, 1], [1, 1], -0.5, 0.5, id="better"),
        pytest.param([1, 0, 1], [1, 0, 1], 0.0, 0.0, id="the same"),
    ],
)
def test_accuracy_drop(reference, quantized, drop, error):
    """The drop is paired, question by question, so that what both get wrong adds no noise."""
    found = metrics.accuracy_drop([bool(x) for x in reference], [bool(x) for x in quantized])

    assert found == (pytest.approx(drop), pytest.approx(error))


def test_accuracy_drop_is_paired():
    """Over a thousand questions, two lost are told from noise, where an unpaired comparison could not."""
    reference = [True] * 900 + [False] * 100
    quantized = [False] * 2 + reference[2:]

    drop, error = metrics.accuracy_drop(reference, quantized)

    # Unpaired: sqrt(2 x 0.9 x 0.1 / 1000) = 0.0134. Paired: sqrt(0.002 x 0.998 / 999).
    assert drop == pytest.approx(0.002)
    assert error == pytest.approx(0.0014135060)


def test_accuracy_of_nothing():
    """Without questions there is neither a drop nor an error: NaN, never 0."""
    assert all(map(math.isnan, metrics.accuracy_drop([], [])))


@pytest.mark.parametrize(("reference", "quantized"), [([True, False], [True]), ([], [True]), ([True], [])])
def test_accuracy_of_other_questions(reference, quantized):
    """Answers to different numbers of questions are refused, not cut to the shorter."""
    with pytest.raises(ValueError, match="reference answers for"):
        metrics.accuracy_drop(reference, quantized)
