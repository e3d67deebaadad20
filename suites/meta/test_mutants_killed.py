"""What mutation testing found unsaid: each test here kills mutants that the others let live. Numbers are by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fixtures.core import codebook, metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookQuantized, CodebookScheme, pseudo_quantize_blocks
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import NARROWEST_RANGE, Quantized, Scheme, encode, pseudo_quantize_tensor
from fixtures.core.rounding import side
from fixtures.formats import AWQ_GEMM, BNB_4BIT, BNB_8BIT, awq_gemm, bnb_4bit, bnb_8bit, format_of

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


# Formats


@pytest.fixture
def stored(tmp_path):
    """Write an artifact of one linear "m.up", and open it."""

    def write(parts, **quantization):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        save_file({f"m.up.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    return write


def test_which_width_of_bitsandbytes(stored):
    """The width stands under either name, and is 4 bits where nothing is said; no method is not called "None"."""
    parts = {"weight": torch.zeros(1)}

    assert format_of(stored(parts, quant_method="bitsandbytes", _load_in_8bit=True)) is BNB_8BIT
    assert format_of(stored(parts, quant_method="bitsandbytes", load_in_8bit=True)) is BNB_8BIT
    assert format_of(stored(parts, quant_method="bitsandbytes", load_in_8bit=False, _load_in_8bit=True)) is BNB_4BIT
    assert format_of(stored(parts, quant_method="bitsandbytes")) is BNB_4BIT
    with pytest.raises(UserError, match=r"quant_method in .*config\.json'? ''"):
        format_of(stored(parts, bits=4))


def awq_parts():
    """Two groups of 8 inputs for 16 outputs."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    quantized = pseudo_quantize_tensor(weight, Scheme(4, 8), scale_dtype=torch.float16)
    return quantized, awq_gemm.encode(quantized)


def test_awq_as_a_format(stored):
    """AWQ's layout as every suite asks for it: scheme, shape, codes, scales, and what belongs to a linear."""
    quantized, parts = awq_parts()
    parts = {name: part[:, : part.shape[1] // 2].contiguous() for name, part in parts.items()}  # 8 outputs of 16 inputs
    artifact = stored(parts)
    loaded = AWQ_GEMM.load(artifact, "m.up", Scheme(4, 8))

    assert (AWQ_GEMM.method, AWQ_GEMM.folds_scales, AWQ_GEMM.codes) == ("awq", True, "qweight")
    assert AWQ_GEMM.scheme_of({"bits": 4, "group_size": 8}) == Scheme(4, 8)
    assert AWQ_GEMM.contradiction(artifact, "m.up", Scheme(4, 8)) == ""
    assert AWQ_GEMM.contradiction(artifact, "m.up", Scheme(4, 16)) != ""
    assert AWQ_GEMM.shape(artifact, "m.up") == (8, 16)
    assert torch.equal(loaded.weight, quantized.weight[:8])
    assert all(t.is_contiguous() for t in (loaded.codes, loaded.scales, loaded.zeros))
    assert AWQ_GEMM.flaws(artifact, "m.up") == []


def test_names_of_awq_parts():
    """A linear is known by its codes; a weight beside them is one too many, and no weight is none."""
    names = ["m.up.qweight", "m.up.qzeros", "m.up.scales"]

    assert AWQ_GEMM.quantized([*names, "m.down.scales", "m.norm.weight"]) == {"m.up"}
    assert AWQ_GEMM.parts("m.up", names) == names
    assert AWQ_GEMM.module_of("m.up.qzeros") == "m.up"
    assert not AWQ_GEMM.keeps_plain_weight("m.up", names)
    assert AWQ_GEMM.keeps_plain_weight("m.up", [*names, "m.up.weight"])


@pytest.mark.parametrize("part", ["qweight", "qzeros"])
def test_awq_repacks(stored, monkeypatch, part):
    """Both codes and zero points must survive packing: losing one bit of either is noticed."""
    _, parts = awq_parts()
    artifact = stored(parts)
    pack = awq_gemm.pack
    rows = parts[part].shape[0]

    assert AWQ_GEMM.repacks(artifact, "m.up", Scheme(4, 8)) is True
    monkeypatch.setattr(awq_gemm, "pack", lambda codes: pack(codes) ^ int(len(codes) == rows))
    assert AWQ_GEMM.repacks(artifact, "m.up", Scheme(4, 8)) is False


def stored_linears():
    """One linear of each layout, 24 outputs of 48 inputs: words hold 8 rows, blocks of 64 end with every fourth."""
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    affine = pseudo_quantize_tensor(weight, Scheme(4, 16), scale_dtype=torch.float16)
    blocks = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    four = bnb_4bit.State("nf4", (24, 48), 64)
    return {
        "awq": (awq_gemm.StoredAwq(awq_gemm.encode(affine), affine.scheme), affine, 8),
        "4 bits": (bnb_4bit.Stored4bit(bnb_4bit.pack(blocks.codes), blocks.absmax, four, blocks.absmax / 8), blocks, 4),
        "8 bits": (bnb_8bit.StoredInt8(codes, largest, Scheme(8, -1, zero_point=False)), None, 1),
    }


@pytest.mark.parametrize("layout", ["awq", "4 bits", "8 bits"])
def test_rows_of_a_stored_linear(layout):
    """Some rows decode to what they are in the whole; no part is torn from its words or blocks."""
    linear, codes, together = stored_linears()[layout]
    whole = linear.all_rows
    if codes is not None:
        assert torch.equal(whole.weight, codes.weight)
    assert (linear.shape, linear.together) == ((24, 48), together)
    assert list(linear.parts(1)) == [(at, at + together) for at in range(0, 24, together)]
    assert list(linear.parts(48 * 17 - 1)) == [(0, 16), (16, 24)]
    assert list(linear.parts(48 * 100)) == [(0, 24)]
    for begin, end in [*linear.parts(1), (8, 24)]:
        part = linear.rows(begin, end)
        assert torch.equal(part.weight, whole.weight[begin:end])
        assert linear.repacks(begin, part) is True
        if layout == "4 bits":
            assert torch.equal(part.slack, part.absmax / 8)
        if layout != "8 bits" and begin:
            assert linear.repacks(0, part) is False


def test_awq_stores_16_bit_scales(stored):
    """Scales are written in float16, whatever they are reckoned in, and read in bfloat16, too."""
    _, parts = awq_parts()
    wide = pseudo_quantize_tensor(torch.ones(8, 8), Scheme(4, 8))

    assert awq_gemm.encode(wide)["scales"].dtype == torch.float16
    assert awq_gemm.contradiction(stored(parts | {"scales": parts["scales"].bfloat16()}), "m.up", Scheme(4, 8)) == ""


def test_nothing_packs():
    """No rows make no words."""
    assert awq_gemm.pack(torch.zeros(0, 8, dtype=torch.int16)).shape == (0, 1)
    assert awq_gemm.unpack(torch.zeros(0, 1, dtype=torch.int32)).shape == (0, 8)
    assert bnb_4bit.pack(torch.zeros(0, dtype=torch.int16)).shape == (0, 1)


def test_unpacked_where_the_words_are():
    """Codes stay on their device."""
    assert awq_gemm.unpack(torch.zeros(2, 1, dtype=torch.int32, device="meta")).device.type == "meta"


def test_layout_under_its_older_name():
    """The layout may stand under "format"; one that is not gemm is refused there, too."""
    assert awq_gemm.scheme_of({"format": "gemm"}) == Scheme(4, 128)
    with pytest.raises(UserError, match="layout 'gemv' is not supported"):
        awq_gemm.scheme_of({"format": "gemv"})


@pytest.mark.parametrize(
    ("layout", "key"),
    [(AWQ_GEMM, "modules_to_not_convert"), (BNB_4BIT, "llm_int8_skip_modules"), (BNB_8BIT, "llm_int8_skip_modules")],
    ids=["awq", "4 bits", "8 bits"],
)
def test_skip_lists(layout, key):
    """A skip list is read as it stands; none is None; what cannot be one, or runs away, is refused."""
    for good in ([], ["visual", "model.visual"], [r"layers\.\d+.*"], ["a" * 300], ["a+b+c+d"], ["m"] * 2000):
        assert layout.skipped({key: good}) == good
    assert layout.skipped({"other": ["visual"]}) is None
    for bad in ("visual", ["visual", 1], ["("], ["a" * 301], ["(a+)+"], ["a*b*c*d*"], ["m"] * 2001, {"visual": 1}):
        with pytest.raises(UserError, match=key):
            layout.skipped({key: bad})


# The state of a 4-bit linear

SAID = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def parsed(**changes):
    """What our parser makes of a state that says so."""
    return bnb_4bit.parse_state(json.dumps(SAID | changes).encode())


def test_state():
    """A state says its kind, shape, block size, and, where there is one, the nest."""
    assert parsed() == bnb_4bit.State("nf4", (4, 32), 64, None, 0.0)
    assert parsed(**NESTED) == bnb_4bit.State("nf4", (4, 32), 64, 256, 0.5)
    assert bnb_4bit.State("fp4", (3, 43), 64) == bnb_4bit.State("fp4", (3, 43), 64, None, 0.0)
    assert bnb_4bit.State("fp4", (3, 43), 64).blocks == 3  # of 129 weights
    assert str(bnb_4bit.State("fp4", (3, 43), 128, 256).scheme) == "fp4 b128 double-quantized"


@pytest.mark.parametrize("entry", ["blocksize", "nested_blocksize"])
def test_block_sizes(entry):
    """Blocks are the powers of two from 32 to 4096 long, those of nested scales, too; no others."""
    for exponent in range(5, 13):
        assert parsed(**NESTED | {entry: 2**exponent}).nested_block_size
    for other in (16, 31, 33, 65, 129, 257, 513, 1025, 2049, 4097, 8192, 64.0):
        with pytest.raises(ValueError, match=f"^says {entry} {other}"):
            parsed(**NESTED | {entry: other})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_of_states(dtype):
    """The three dtypes that a layer can have been of."""
    assert parsed(dtype=dtype).kind == "nf4"


def test_shape_of_states():
    """A matrix has two sides from 1 to 2^31 - 1."""
    assert parsed(shape=[1, 2**31 - 1]).shape == (1, 2**31 - 1)
    for bad in ([2**31, 1], [1, 2**31], [0, 1], [1, 0], [1], [1, 1, 1], {"0": 1, "1": 1}, [1, 1.0]):
        with pytest.raises(ValueError, match=r"^says shape"):
            parsed(shape=bad)


@pytest.mark.parametrize("offset", [0, -1, 3.4e38, -3.4e38])
def test_offset(offset):
    """An offset is a number that float32 holds."""
    assert parsed(**NESTED | {"nested_offset": offset}).nested_offset == offset
    for bad in (3.5e38, -3.5e38, True, [0.0]):
        with pytest.raises(ValueError, match=r"^says nested_offset"):
            parsed(**NESTED | {"nested_offset": bad})


def test_half_a_nest():
    """Of the nest's entries either all are there or none."""
    for lost in NESTED:
        with pytest.raises(ValueError, match=r"^has the entries"):
            parsed(**{name: value for name, value in NESTED.items() if name != lost})
    with pytest.raises(ValueError, match=r"^has the entries"):
        parsed(nested_dtype="float32")


def test_length_of_states():
    """4096 bytes are read, one more is not."""
    text = json.dumps(SAID).encode()

    assert bnb_4bit.parse_state(text.ljust(4096)).kind == "nf4"
    with pytest.raises(ValueError, match=r"^is 4097 bytes long$"):
        bnb_4bit.parse_state(text.ljust(4097))


# 4 bits


def four_bits(shape=(4, 32), absmax=None, **changes):
    """A linear of 128 weights in the 4-bit layout, unless a shape is said."""
    count = math.prod(shape)
    blocks = -(-count // 64)
    return {
        "weight": (torch.arange((count + 1) // 2) % 251).to(torch.uint8)[:, None],
        "weight.absmax": torch.ones(blocks) if absmax is None else absmax,
        "weight.quant_map": codebook.code_book("nf4").clone(),
        "weight.quant_state.bitsandbytes__nf4": state(SAID | {"shape": shape} | changes),
    }


def state(said):
    """JSON as a tensor of bytes."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def test_bytes_of_any_stride():
    """Bytes are read as they lie, of other dtypes and with gaps between them, into int16 codes."""
    words = torch.tensor([0x1234, 0x5678, 0x1122, 0x3344], dtype=torch.int16)

    codes = bnb_4bit.unpack(words[::2])

    assert codes.tolist() == [3, 4, 1, 2, 2, 2, 1, 1]  # little-endian
    assert codes.dtype == torch.int16


def test_nested_scales_by_hand(stored):
    """A nested absmax is value x nested absmax + offset; nesting may have moved it by half a cell and a lookup."""
    grid = (torch.arange(256) / 256) ** 2  # unevenly spaced: the gaps beside value 10 are 19 and 21 65536ths
    absmax = torch.zeros(257, dtype=torch.uint8)
    absmax[0], absmax[1], absmax[2], absmax[256] = 10, 0, 255, 10
    parts = four_bits((257, 64), absmax, **NESTED) | {
        "weight.nested_absmax": torch.tensor([2.0, -4.0]),
        "weight.nested_quant_map": grid,
    }
    loaded = BNB_4BIT.load(stored(parts), "m.up", CodebookScheme("nf4"))

    unit = 1 / 65536
    assert loaded.absmax[[0, 1, 2, 256]].tolist() == pytest.approx(
        [200 * unit + 0.5, 0.5, 2 * 65025 * unit + 0.5, -400 * unit + 0.5], rel=1e-6
    )
    assert loaded.slack[[0, 1, 2, 256]].tolist() == pytest.approx(
        [2 * (10.5 + 1) * unit, 2 * (0.5 + 1) * unit, 2 * (254.5 + 1) * unit, 4 * (10.5 + 1) * unit], rel=1e-6
    )
    assert loaded.absmax.shape == loaded.slack.shape == (257,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_scales_of_any_float(stored, dtype):
    """Scales stored plainly may be of any float, and of any shape of the right size; they are read as float32."""
    loaded = BNB_4BIT.load(
        stored(four_bits(absmax=torch.tensor([[0.5], [2.0]], dtype=dtype))), "m.up", CodebookScheme("nf4")
    )

    assert (loaded.absmax.tolist(), loaded.absmax.dtype) == ([0.5, 2.0], torch.float32)


def test_repacks_4_bits(stored, monkeypatch):
    """Words that packing does not give back are noticed, in whatever dtype they are stored."""
    parts = four_bits()
    for words in (parts["weight"], parts["weight"].reshape(-1).view(torch.bfloat16)):
        assert BNB_4BIT.repacks(stored(parts | {"weight": words}), "m.up", CodebookScheme("nf4")) is True
    monkeypatch.setattr(bnb_4bit, "pack", lambda codes: torch.zeros(64, 1, dtype=torch.uint8))
    assert BNB_4BIT.repacks(stored(parts), "m.up", CodebookScheme("nf4")) is False


def test_tables_of_4_bits(stored):
    """A table may be off by float32's last digits, not by more, and never hold NaN."""
    for code, off, flaws in ((7, 9e-7, 0), (7, 1.1e-6, 1), (0, 5e-6, 1), (0, NAN, 1)):
        parts = four_bits()
        parts["weight.quant_map"][code] += off
        found = BNB_4BIT.flaws(stored(parts, bnb_4bit_quant_type="nf4"), "m.up")
        assert found == ["its quant_map is not the published table"] * flaws


def test_flaws_without_a_config(stored):
    """Where no config says a scheme, transformers' default is what the state is held against."""
    artifact = stored(four_bits())
    (artifact.path / "config.json").write_text("{}")

    flaws = BNB_4BIT.flaws(Checkpoint(artifact.path), "m.up")
    assert flaws == ["is stored as nf4 b64, but quantization_config says fp4 b64"]


def test_state_of_any_shape(stored):
    """A state may be 4096 bytes long, in a tensor of any shape."""
    parts = four_bits()
    name = "weight.quant_state.bitsandbytes__nf4"
    long = torch.nn.functional.pad(parts[name], (0, 4096 - len(parts[name])), value=ord(" "))

    assert BNB_4BIT.shape(stored(parts | {name: long.reshape(2, 2048)}), "m.up") == (4, 32)
    too_long = torch.nn.functional.pad(long, (0, 1), value=ord(" "))
    said = BNB_4BIT.contradiction(stored(parts | {name: too_long}), "m.up", CodebookScheme("nf4"))
    assert said == "its quant_state is U8 [4097]"


@pytest.mark.parametrize("layout", [BNB_4BIT, BNB_8BIT], ids=["4 bits", "8 bits"])
def test_bitsandbytes_as_formats(layout):
    """Both are bitsandbytes', whose quantizers scale nothing before a linear; codes stand where the weight was."""
    assert (layout.method, layout.folds_scales, layout.codes) == ("bitsandbytes", False, "weight")


def eight_bits(**changes):
    """A linear of two outputs in the 8-bit layout: the second row is one of zeros."""
    codes = torch.tensor([[127, -127, 64], [5, 0, 0]], dtype=torch.int8)
    return {"weight": codes, "SCB": torch.tensor([254.0, 0.0]), "weight_format": torch.tensor(0).byte()} | changes


def test_8_bits_by_hand(stored):
    """Weight = code x SCB / 127; a row whose SCB is 0 is zeros, in codes of 0 under a scale that divides."""
    artifact = stored(eight_bits())
    loaded = BNB_8BIT.load(artifact, "m.up", BNB_8BIT.scheme_of({}))

    assert loaded.weight.tolist() == [[254, -254, 128], [0, 0, 0]]
    assert loaded.codes.tolist() == [[127, -127, 64], [0, 0, 0]]
    assert loaded.scales[:, 0].tolist() == pytest.approx([2.0, 1e-5 / 127])
    assert loaded.zeros.tolist() == [[0], [0]]
    assert (loaded.codes.dtype, loaded.zeros.dtype) == (torch.int16, torch.int16)
    assert str(loaded.scheme) == "8-bit per row symmetric"
    assert BNB_8BIT.shape(artifact, "m.up") == (2, 3)
    assert BNB_8BIT.repacks(artifact, "m.up", loaded.scheme) is True
    assert BNB_8BIT.contradiction(artifact, "m.up", loaded.scheme) == ""


def test_8_bit_flaws(stored):
    """Every code of -128 is counted, and a lost order of rows said."""
    codes = torch.tensor([[-128, -127, 1], [-128, 0, 127]], dtype=torch.int8)
    parts = eight_bits(weight=codes)

    assert BNB_8BIT.flaws(stored(parts), "m.up") == ["2 codes of -128, which rounding never gives"]
    del parts["weight_format"]
    assert len(BNB_8BIT.flaws(stored(parts), "m.up")) == 2
    assert BNB_8BIT.contradiction(stored(parts), "m.up", BNB_8BIT.scheme_of({})) == ""


@pytest.mark.parametrize("part", ["weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax"])
def test_every_table_of_a_nest_has_its_size(stored, part):
    """With nested scales all tables must be there in full, the one of the codes, too."""
    parts = four_bits(absmax=torch.zeros(2, dtype=torch.uint8), **NESTED) | {
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": codebook.dynamic_map().clone(),
    }
    scheme = CodebookScheme("nf4", nested=True)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme) == ""

    parts[part] = torch.ones(len(parts[part]) + 1)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme).startswith(f"needs {part} F32")
