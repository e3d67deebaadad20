"""What mutation testing found unsaid of all layouts alike: each test kills mutants that the others let live."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme
from fixtures.formats import AWQ_GEMM, BNB_4BIT, BNB_8BIT, awq_gemm, bnb_4bit, bnb_8bit
from suites.meta.small_linears import awq_parts, eight_bits, nested_parts, opened, stored_linears


@pytest.fixture
def stored(tmp_path):
    """Write an artifact of one linear "m.up", and open it."""
    return partial(opened, tmp_path)


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
            assert torch.equal(part.absmax, whole.absmax[begin * 48 // 64 : end * 48 // 64])
            assert torch.equal(part.slack, part.absmax / 8)
        if layout != "8 bits" and begin:
            assert linear.repacks(0, part) is False


def test_rows_ask_for_no_bytes_of_others(monkeypatch):
    """Rows are decoded from the bytes that they are in alone: a part costs what a part is, not what is left."""
    unpack, asked = bnb_4bit.unpack, []
    monkeypatch.setattr(bnb_4bit, "unpack", lambda words: asked.append(words.numel()) or unpack(words))
    linear = stored_linears()["4 bits"][0]

    for begin, end in [(0, 4), (4, 12), (12, 24)]:
        linear.rows(begin, end)
    assert asked == [4 * 48 / 2, 8 * 48 / 2, 12 * 48 / 2]


def test_nothing_packs():
    """No rows make no words."""
    assert awq_gemm.pack(torch.zeros(0, 8, dtype=torch.int16)).shape == (0, 1)
    assert awq_gemm.unpack(torch.zeros(0, 1, dtype=torch.int32)).shape == (0, 8)
    assert bnb_4bit.pack(torch.zeros(0, dtype=torch.int16)).shape == (0, 1)


def test_unpacked_where_the_words_are():
    """Codes stay on their device, and zero points that are not stored are made there."""
    assert awq_gemm.unpack(torch.zeros(2, 1, dtype=torch.int32, device="meta")).device.type == "meta"
    codes, largest = torch.zeros(2, 3, dtype=torch.int8, device="meta"), torch.ones(2, device="meta")
    rows = bnb_8bit.StoredInt8(codes, largest, Scheme(8, -1, zero_point=False)).rows(0, 2)
    assert {t.device.type for t in (rows.codes, rows.scales, rows.zeros)} == {"meta"}


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


@pytest.mark.parametrize("layout", [AWQ_GEMM, BNB_4BIT, BNB_8BIT], ids=["awq", "4 bits", "8 bits"])
def test_parts_come_by_the_loader_given(stored, layout):
    """Whoever brings a loader is asked for every part that weights are decoded from, each once."""
    parts = {AWQ_GEMM: awq_parts()[1], BNB_4BIT: nested_parts(), BNB_8BIT: eight_bits()}[layout]
    needed = {f"m.up.{part}" for part in parts if "quant_state" not in part}
    needed -= {"m.up.weight.quant_map", "m.up.weight_format"}  # what decides nothing
    artifact = stored(parts)
    asked = []

    layout.read(artifact, "m.up", Scheme(4, 8), lambda name: asked.append(name) or artifact.load(name))
    assert sorted(asked) == sorted(needed)
