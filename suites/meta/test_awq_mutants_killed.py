"""What mutation testing found unsaid of AWQ's layout: each test kills mutants that the others let live."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.formats import AWQ_GEMM, awq_gemm
from suites.meta.small_linears import awq_parts, opened, stored_linears


@pytest.fixture
def stored(tmp_path):
    """Write an artifact of one linear "m.up", and open it."""
    return partial(opened, tmp_path)


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


def test_words_of_awq_follow_each_other():
    """A row's words and zero points lie beside each other, as kernels that count them from the first take them."""
    linear = stored_linears()["awq"][0]

    assert all(part.is_contiguous() for part in (linear.words, linear.zero_words, linear.scales))


class Widths(TorchDispatchMode):
    """Notes how many bytes wide the elements of all results are."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run it, and note."""
        result = operation(*args, **(kwargs or {}))
        self.seen.add(result.element_size())
        return result


def test_awq_is_unpacked_in_its_own_width():
    """Codes are shifted out of their words in 32 bits each: in 64 a large linear's would take twice the memory."""
    with Widths() as widths:
        awq_gemm.unpack(torch.zeros(2, 1, dtype=torch.int32))

    assert widths.seen == {4, 2}


def test_awq_stores_16_bit_scales(stored):
    """Scales are written in float16, whatever they are reckoned in, and read in bfloat16, too."""
    _, parts = awq_parts()
    wide = pseudo_quantize_tensor(torch.ones(8, 8), Scheme(4, 8))

    assert awq_gemm.encode(wide)["scales"].dtype == torch.float16
    assert awq_gemm.contradiction(stored(parts | {"scales": parts["scales"].bfloat16()}), "m.up", Scheme(4, 8)) == ""


def test_layout_under_its_older_name():
    """The layout may stand under "format"; one that is not gemm is refused there, too."""
    assert awq_gemm.scheme_of({"format": "gemm"}) == Scheme(4, 128)
    with pytest.raises(UserError, match="layout 'gemv' is not supported"):
        awq_gemm.scheme_of({"format": "gemv"})
