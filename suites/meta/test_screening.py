"""The screen says what the definition says, of any weights and codes, and spares most of its work."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.audit.roundtrip import OUTSIDE, Place, error_of
from fixtures.core import screening, screening_codebook
from fixtures.core.codebook import CodebookQuantized, CodebookScheme, code_book, pseudo_quantize_blocks
from fixtures.core.pseudo_quantize import Quantized, Scheme, pseudo_quantize_tensor
from fixtures.core.rounding import QuantizedWeight
from fixtures.core.screening import screened_losses
from suites.meta.plain_audit import assert_same, plain_error


def assert_as_by_definition(codes: QuantizedWeight, weight: Tensor) -> None:
    """Every number that the screen gives is the definition's."""
    total = screened_losses(codes, weight)
    assert_same(error_of(Place("w", "", OUTSIDE, "w"), weight.numel(), total), plain_error(codes, weight))


def drawn(kind: str, rows: int = 24, columns: int = 256) -> Tensor:
    """Weights that one branch or another is for."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    match kind:
        case "one sign":
            return weight.abs() + 1
        case "zeros":
            return weight * (torch.arange(rows)[:, None] % 3 > 0)
        case "coarse":
            return (weight * 4).round() / 4  # many ties
        case "tiny":
            return weight * 1e-7
    return weight


def changed(codes: QuantizedWeight, how: str) -> QuantizedWeight:
    """Some codes other than the nearest."""
    if how == "good":
        return codes
    moved = codes.codes.clone()  # type: ignore[attr-defined]
    moved[3, 5:9] = 15 - moved[3, 5:9] if how == "moved" else 0
    return replace(codes, codes=moved)  # type: ignore[type-var]


@pytest.mark.parametrize("how", ["good", "moved", "zeroed"])
@pytest.mark.parametrize("kind", ["normal", "one sign", "zeros", "coarse", "tiny"])
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(2, 64), Scheme(3, -1), "clipped", "nf4", "fp4"], ids=str)
def test_screen_equals_definition(scheme: Any, kind: str, how: str) -> None:
    """Whatever the weights, scheme and codes, what the screen leaves out changes no number."""
    weight = drawn(kind)
    codes: QuantizedWeight
    if scheme in ("nf4", "fp4"):
        codes = pseudo_quantize_blocks(weight, CodebookScheme(scheme))
    elif scheme == "clipped":
        limit = weight.reshape(24, -1, 128).abs().amax(-1) * 0.8
        codes = pseudo_quantize_tensor(weight, Scheme(), limit=limit, scale_dtype=torch.float16)
    else:
        codes = pseudo_quantize_tensor(weight, scheme, scale_dtype=torch.float16)
    codes = changed(codes, how)
    assert_as_by_definition(codes, weight)


def test_short_last_block_equals_definition() -> None:
    """A last block that is shorter than the others is judged, too."""
    weight = drawn("normal", 5, 77)
    codes = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    codes = replace(codes, codes=codes.codes.clone().index_fill_(0, torch.tensor([4]), 3))
    assert_as_by_definition(codes, weight)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_broken_weights_do_not_pass(number: float) -> None:
    """A reference's NaN or infinity is no weight that anything is near."""
    weight = drawn("normal")
    codes = pseudo_quantize_tensor(weight, Scheme(), scale_dtype=torch.float16)
    weight[2, 7] = number
    error = error_of(Place("w", "", OUTSIDE, "w"), weight.numel(), screened_losses(codes, weight))
    assert not error.frobenius <= 1


def test_blind_screen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that clears every group does not say what the definition says: the comparison can fail."""
    monkeypatch.setattr(screening, "_worst_of", lambda *_: (torch.zeros(()), torch.zeros(())))
    with pytest.raises(AssertionError, match="by the definition"):
        test_screen_equals_definition(Scheme(4, 128), "normal", "moved")


def test_screen_spares_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sound weight few groups are looked at element by element: that is all the speed."""
    asked = []
    rounding = Quantized.rounding

    def counting(self: Quantized, wanted: Tensor) -> Any:
        asked.append(wanted.numel())
        return rounding(self, wanted)

    monkeypatch.setattr(Quantized, "rounding", counting)
    weight = drawn("normal", 512, 1024)
    screened_losses(pseudo_quantize_tensor(weight, Scheme(), scale_dtype=torch.float16), weight)
    assert 0 < sum(asked) < weight.numel() / 20


# What mutation testing found unsaid


def by_hand(rows: Any, codes: Any, scheme: Scheme, scale: float = 1.0, zero: int = 0) -> tuple[Quantized, Tensor]:
    """A weight of one group per row beside its codes; all rows have one scale and one zero point."""
    places = torch.tensor(codes, dtype=torch.int16)
    one = torch.ones(len(places), 1)
    return Quantized(places, one * scale, (one * zero).to(torch.int16), scheme), torch.tensor(rows)


@pytest.mark.parametrize("off", [0.5, 0.625, 0.75])
def test_end_among_larger_errors(off: float) -> None:
    """A code one below the end is noticed, from half a step on, though many groups have larger errors elsewhere."""
    # Codes 0..15 in steps of 1. In most rows a code is 3 steps off, in the last the end's neighbour stands for the end.
    rows = [[0.0, 15.0, 7.0, 8.0]] * 20 + [[0.0, 15.0, 15.0 - 1 + off, 8.0]]
    codes = [[0, 15, 10, 8]] * 20 + [[0, 15, 14, 8]]
    found = by_hand(rows, codes, Scheme(4, 4))
    assert plain_error(*found).largest_end_error == 1
    assert_as_by_definition(*found)


def test_largest_error_among_errors_at_the_ends() -> None:
    """The largest error is found in a group whose distance is less than that of many whose ends are rounded."""
    rows = [[0.0, 14.625, 7.0, 8.0]] * 20 + [[0.0, 15.0, 7.25, 8.0]]
    found = by_hand(rows, [[0, 15, 7, 8]] * 21, Scheme(4, 4))
    assert plain_error(*found).largest_error == 0.5
    assert_as_by_definition(*found)


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedWeight]:
    """What is not screened at all but judged by the definition."""
    asked: list[QuantizedWeight] = []
    plain = screening.plain_losses

    def noted(codes: QuantizedWeight, wanted: Tensor) -> Any:
        asked.append(codes)
        return plain(codes, wanted)

    monkeypatch.setattr(screening, "plain_losses", noted)
    return asked


SYMMETRIC = Scheme(4, 4, zero_point=False)


@pytest.mark.parametrize(
    ("scale", "zero", "scheme", "screened"),
    [
        (1.0, 0, Scheme(4, 4), True),
        (1.0, 15, Scheme(4, 4), True),
        (1.0, -1, Scheme(4, 4), False),
        (1.0, 16, Scheme(4, 4), False),
        (1.0, 0, SYMMETRIC, True),
        (1.0, 1, SYMMETRIC, False),
        (1.0, -1, SYMMETRIC, False),
        (1e-30, 0, SYMMETRIC, False),
        (1.5e-30, 0, SYMMETRIC, True),
        (0.9e30, 0, SYMMETRIC, True),
        (1e30, 0, SYMMETRIC, False),
        (1.5e30, 0, SYMMETRIC, False),
        (math.nan, 0, SYMMETRIC, False),
    ],
)
def test_what_is_strange_is_not_screened(
    scale: float, zero: int, scheme: Scheme, screened: bool, defined: list[QuantizedWeight]
) -> None:
    """Scales near float32's ends and zero points that the scheme does not have are the definition's business."""
    codes, weight = by_hand([[0.0, 1.0, 2.0, 3.0]] * 2, [[0, 1, 2, 3]] * 2, scheme, scale, zero)
    assert_as_by_definition(codes, weight)
    assert bool(defined) is not screened


@pytest.mark.parametrize(("kind", "screened"), [(1.0, True), (1e-30, False), (1e30, False)])
def test_strange_blocks_are_not_screened(kind: float, screened: bool, defined: list[QuantizedWeight]) -> None:
    """So it is with blocks."""
    weight = drawn("normal", 2, 64) * kind
    codes = replace(pseudo_quantize_blocks(weight, CodebookScheme("nf4")), absmax=torch.tensor([kind, kind]))
    assert_as_by_definition(codes, weight)
    assert bool(defined) is not screened


@pytest.mark.parametrize("column", [0, 1])
def test_one_strange_zero_point_is_enough(column: int, defined: list[QuantizedWeight]) -> None:
    """A symmetric weight one of whose zero points is not 0 is not screened, whichever it is."""
    codes, weight = by_hand([[0.0, 1.0]] * 2, [[0, 1]] * 2, Scheme(4, 2, zero_point=False))
    codes.zeros[column] = 1 - 2 * column
    assert_as_by_definition(codes, weight)
    assert defined


@pytest.mark.parametrize(
    ("scheme", "longest"), [(Scheme(4, -1), 32767), (Scheme(8, -1), 2047), (Scheme(4, -1, zero_point=False), 34952)]
)
def test_long_groups_are_not_screened(scheme: Scheme, longest: int, defined: list[QuantizedWeight]) -> None:
    """Of a group so long that most have an element within rounding's reach of half a step nothing is spared."""
    for length in (longest, longest + 1):
        weight = drawn("normal", 1, length)
        assert_as_by_definition(pseudo_quantize_tensor(weight, scheme), weight)
        assert bool(defined) is (length > longest)


def test_scales_in_32_bits() -> None:
    """A scale of 32 bits is held against plain rounding's in 32 bits."""
    weight = drawn("normal")
    codes = pseudo_quantize_tensor(weight, Scheme())
    assert_as_by_definition(replace(codes, scales=codes.scales * (1 + 2.0**-14)), weight)


def nested(kind: str, weight: Tensor, how: str) -> CodebookQuantized:
    """As double quantization leaves it: scales moved, and known to be moved by so much at most."""
    codes = pseudo_quantize_blocks(weight, CodebookScheme(kind))
    by = torch.linspace(-1, 1, len(codes.absmax))
    moved = replace(codes, absmax=codes.absmax * (1 + by / 32), slack=codes.absmax / 32)
    match how:
        case "clipped":
            return replace(moved, absmax=codes.absmax * (0.8 + by / 8))
        case "slack too small":
            return replace(moved, slack=codes.absmax / 64)
    return changed(moved, how)  # type: ignore[return-value]


HOWS = ("good", "moved", "zeroed", "clipped", "slack too small")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(24, 256), (5, 77), (16, 4)])
def test_nested_scales_equal_definition(shape: tuple[int, int], kind: str, how: str) -> None:
    """What nesting moved a scale by widens the screen's bounds as the definition's; of a short block, too."""
    weight = drawn("normal", *shape)
    assert_as_by_definition(nested(kind, weight, how), weight)


@pytest.mark.parametrize("elements", [7, 64, 65])
def test_one_block_equals_definition(elements: int) -> None:
    """A weight may have one block, whole or not, and one element more."""
    weight = drawn("normal", 1, elements)
    assert_as_by_definition(pseudo_quantize_blocks(weight, CodebookScheme("nf4")), weight)


def test_scales_of_blocks_off() -> None:
    """The widest and the narrowest scale of blocks are the definition's."""
    weight = drawn("normal")
    codes = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    codes.absmax[3] *= 1.5
    codes.absmax[5] *= 0.75
    assert_as_by_definition(codes, weight)


def test_screen_spares_clipped_and_sound_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beyond the range are no reason to look at each, nor is it that no group is in doubt."""
    asked = []
    definition = screening._definition

    def counting(codes: Quantized, grouped: Tensor, these: Tensor) -> Any:
        asked.append(int(these.sum()))
        return definition(codes, grouped, these)

    monkeypatch.setattr(screening, "_definition", counting)
    weight = drawn("normal", 64, 1024)
    limit = weight.reshape(64, -1, 128).abs().amax(-1) * 0.5
    sound = pseudo_quantize_tensor(weight, Scheme())
    for codes, wanted in (
        (pseudo_quantize_tensor(weight, Scheme(), limit=limit), weight),
        (sound, sound.weight + (weight - sound.weight) / 2),  # a quarter of a step off at most
    ):
        asked.clear()
        assert_as_by_definition(codes, wanted)
        assert 0 < sum(asked) < 64 * 8 / 10


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements of tables the definition was asked for, each time."""
    asked = []
    of_elements = CodebookQuantized.of_elements

    def counting(self: CodebookQuantized, codes: Tensor, *more: Any) -> Any:
        asked.append(codes.numel())
        return of_elements(self, codes, *more)

    monkeypatch.setattr(CodebookQuantized, "of_elements", counting)
    return asked


@pytest.mark.parametrize("slack", [False, True], ids=["plain", "nested"])
def test_screen_spares_sound_blocks(slack: bool, looked_at: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sound blocks few are in doubt, and in these few elements."""
    doubted = []
    doubtful = screening_codebook._doubtful

    def counting(codes: Any, blocks: Any, error: Any, doubt: Tensor) -> Any:
        doubted.append(int(doubt.sum()))
        return doubtful(codes, blocks, error, doubt)

    monkeypatch.setattr(screening_codebook, "_doubtful", counting)
    weight = drawn("normal", 64, 1024)
    codes = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    if slack:
        codes = replace(codes, slack=codes.absmax * 2.0**-12)
    screened_losses(codes, weight)
    assert sum(doubted) < 64 * 16 / 10
    assert sum(looked_at) < weight.numel() / 100


@pytest.mark.parametrize("slack", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(("within", "wanted"), [(1.25, 0), (0.75, 1), (-0.75, 1)])
def test_what_rounding_may_hide_is_looked_at(
    within: float, wanted: int, side: int, scale: float, slack: bool, looked_at: list[int]
) -> None:
    """An element nearer to its cell's end than rounding can tell is looked at, on either side; others are not."""
    book = code_book("nf4")
    at, beside = 8, 8 + side
    edge = (book[at] + book[beside]) / 2
    weight = torch.zeros(1, 128)
    weight[0, [0, 64]] = 1.0
    weight[0, 5] = edge - (edge - book[at]) * within * 2.0**-16
    codes = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    codes.codes[0, 5] = at
    codes = replace(codes, absmax=codes.absmax * scale, slack=codes.absmax * 0 if slack else None)
    screened_losses(codes, weight * scale)
    assert looked_at == [wanted] * wanted


def test_block_in_doubt_by_rounding_alone() -> None:
    """Where the doubt about a block comes from rounding, none of its elements may be in doubt: then nothing is off."""
    weight = drawn("normal", 1, 64)
    codes = pseudo_quantize_blocks(weight, CodebookScheme("nf4"))
    found = screening_codebook._doubtful(codes, weight, torch.zeros_like(weight), torch.tensor([True]))
    assert [float(one) for one in found] == [0, 0, 0]
