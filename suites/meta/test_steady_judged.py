"""The benchmarks fail when what they time is wrong: a fast wrong answer is no benchmark."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fixtures.core.codebook import CodebookScheme
from fixtures.core.measurement import Measurement
from fixtures.core.pseudo_quantize import Scheme
from fixtures.engines.loading import load_model
from fixtures.formats import awq_gemm, bnb_4bit
from fixtures.options import Selection
from suites import test_steady
from suites.meta.answering import listener


class Once:
    """A benchmark that runs what it is given twice, as a timed one does many times, and times nothing."""

    stats = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, work: Callable[[], Tensor], **_: int) -> Tensor:
        """Run it again, and give the last result."""
        work()
        return work()


def measured_by(check: Callable[..., None], selection: Selection) -> list[Measurement]:
    """What a benchmark says."""
    verify, once = listener(), Once()
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    given = {"device": "cpu", "benchmark": once, "verify": verify, "limits": selection.limits}
    check(**{name: given[name] for name in wanted})
    assert once.extra_info["bytes"] > 0
    return verify.measurements


def judged_by(check: Callable[..., None], selection: Selection) -> Measurement:
    """The one thing that a benchmark judges: its result."""
    (judged,) = [m for m in measured_by(check, selection) if m.bound is not None]
    return judged


CHECKS = tuple(check for name, check in vars(test_steady).items() if name.startswith("test_"))
Plant = Callable[[pytest.MonkeyPatch], None]


def nibbles_in_plain_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes packed in plain order."""
    monkeypatch.setattr(awq_gemm, "NIBBLE_ORDER", tuple(range(8)))


def words_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes packed a word too far to the right."""
    pack = awq_gemm.pack
    monkeypatch.setattr(awq_gemm, "pack", lambda codes: pack(codes).roll(1, dims=1))


def awq_decoded_with(monkeypatch: pytest.MonkeyPatch, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """AWQ's words decoded, and the codes, scales or zero points then changed."""
    decode = awq_gemm.decode

    def wrong(parts: dict[str, Tensor], scheme: Scheme) -> Any:
        found: Any = decode(parts, scheme)
        return dataclasses.replace(found, **{part: change(getattr(found, part))})

    monkeypatch.setattr(awq_gemm, "decode", wrong)


def zeros_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero points as another layout has them."""
    awq_decoded_with(monkeypatch, "zeros", lambda zeros: zeros + 1)


def scales_of_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that belong to another output."""
    awq_decoded_with(monkeypatch, "scales", lambda scales: scales.roll(1, 0))


def scale_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are no numbers, of one output."""
    awq_decoded_with(monkeypatch, "scales", lambda scales: scales.index_fill(0, torch.tensor([3]), math.nan))


def low_nibble_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The low half of a byte read first."""

    def low_first(words: Tensor) -> Tensor:
        flat = words.reshape(-1)
        return torch.stack([flat & 15, flat >> 4], dim=1).reshape(-1).to(torch.int16)

    monkeypatch.setattr(bnb_4bit, "unpack", low_first)


def table_of_fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4's codes decoded by FP4's table."""
    monkeypatch.setattr(test_steady, "CodebookScheme", lambda _, block: CodebookScheme("fp4", block))


def another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that answers for a token that it was not given."""
    monkeypatch.setattr(test_steady, "load_model", lambda *_: Swapped(load_model(*_)))


class Swapped:
    """A model that takes a single token for the next one of the vocabulary."""

    def __init__(self, model: Any) -> None:
        self.parameters = model.parameters
        self.model = model

    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        """The model's answer to what it took."""
        return self.model(tokens + (tokens.shape[1] == 1), **options)


def cache_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that leaves its token in the cache, so that the next one is another step."""
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, length: None)


PLANTED: list[tuple[Callable[..., None], Plant]] = [
    (test_steady.test_packing, nibbles_in_plain_order),
    (test_steady.test_packing, words_shifted),
    (test_steady.test_dequantization_awq, zeros_off_by_one),
    (test_steady.test_dequantization_awq, scales_of_the_next_row),
    (test_steady.test_dequantization_awq, scale_of_nan),
    (test_steady.test_dequantization_nf4, low_nibble_first),
    (test_steady.test_dequantization_nf4, table_of_fp4),
    (test_steady.test_decode_step, cache_that_grows),
    (test_steady.test_decode_step, another_token),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_good_results_hold(check: Callable[..., None], selection: Selection) -> None:
    """Each benchmark's result is right as the project stands, says what it read, and has a planted fault."""
    assert judged_by(check, selection).holds
    assert check in [planted for planted, _ in PLANTED]


@pytest.mark.parametrize(("check", "plant"), PLANTED)
def test_wrong_results_do_not_hold(
    check: Callable[..., None], plant: Plant, monkeypatch: pytest.MonkeyPatch, selection: Selection
) -> None:
    """Each fault makes the result of its benchmark wrong."""
    plant(monkeypatch)
    assert judged_by(check, selection).holds is False


def test_timed_without_statistics() -> None:
    """Where pytest-benchmark is switched off, as under xdist, as many times are taken, after the same warm-up."""
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) <= test_steady.WARM_UP else 0.002)

    assert 0.002 <= test_steady.clocked(work) < 0.05
    assert len(calls) == test_steady.WARM_UP + test_steady.ROUNDS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_times_are_noted(check: Callable[..., None], selection: Selection) -> None:
    """Each benchmark notes its median time, with pytest-benchmark's statistics or without."""
    noted = {m.quantity: m.value for m in measured_by(check, selection)}
    assert noted["median time"] > 0
    assert noted["coded bytes per second"] > 0
