"""The benchmarks fail when what they time is wrong: a fast wrong answer is no benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.core.pseudo_quantize import Scheme
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


def holds(check: Callable[..., None], selection: Selection) -> bool:
    """Whether a benchmark's result is what it should be."""
    verify, once = listener(), Once()
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    given = {"device": "cpu", "benchmark": once, "verify": verify, "limits": selection.limits}
    check(**{name: given[name] for name in wanted})
    assert once.extra_info["bytes"] > 0
    (judged,) = [m for m in verify.measurements if m.bound is not None]
    return bool(judged.holds)


CHECKS = (
    test_steady.test_packing,
    test_steady.test_dequantization_awq,
    test_steady.test_dequantization_nf4,
    test_steady.test_decode_step,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_good_results_hold(check: Callable[..., None], selection: Selection) -> None:
    """Each benchmark's result is right as the project stands, and says what it read."""
    assert holds(check, selection)


def test_wrong_order_of_nibbles(monkeypatch: pytest.MonkeyPatch, selection: Selection) -> None:
    """Codes packed in plain order are caught."""
    monkeypatch.setattr(awq_gemm, "NIBBLE_ORDER", tuple(range(8)))
    assert not holds(test_steady.test_packing, selection)


def test_wrong_zero_points(monkeypatch: pytest.MonkeyPatch, selection: Selection) -> None:
    """Zero points off by one, as another layout has them, are caught."""
    decode = awq_gemm.decode

    def off_by_one(parts: dict[str, Tensor], scheme: Scheme) -> Any:
        found = decode(parts, scheme)
        return type(found)(found.codes, found.scales, found.zeros + 1, found.scheme)

    monkeypatch.setattr(awq_gemm, "decode", off_by_one)
    assert not holds(test_steady.test_dequantization_awq, selection)


def test_wrong_half_of_a_byte(monkeypatch: pytest.MonkeyPatch, selection: Selection) -> None:
    """The low nibble read first is caught."""

    def low_first(words: Tensor) -> Tensor:
        flat = words.reshape(-1)
        return torch.stack([flat & 15, flat >> 4], dim=1).reshape(-1).to(torch.int16)

    monkeypatch.setattr(bnb_4bit, "unpack", low_first)
    assert not holds(test_steady.test_dequantization_nf4, selection)


def test_a_cache_that_grows(monkeypatch: pytest.MonkeyPatch, selection: Selection) -> None:
    """A step that leaves its token in the cache, so that the next one is another step, is caught."""
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "crop", lambda cache, length: None)
    assert not holds(test_steady.test_decode_step, selection)
