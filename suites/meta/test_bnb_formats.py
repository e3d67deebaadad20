"""bitsandbytes' layouts: bytes mean the weights that bitsandbytes reads in them.

The oracles are bitsandbytes' own dequantization and, where it is absent, a decoder in plain Python.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core.codebook import CodebookScheme, code_book, dynamic_map, pseudo_quantize_blocks
from fixtures.formats import BNB_4BIT, BNB_8BIT, bnb_4bit
from suites.meta.bnb_parts import (
    CONFIG_8BIT,
    FP4,
    INT8,
    LINEAR,
    NESTED_NF4,
    NF4,
    drawn,
    int8_parts,
    nested_parts,
    opened,
    plain_parts,
)

SOME = settings(deadline=None, max_examples=100)


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact with one linear of the tensors given, and open it."""
    return partial(opened, tmp_path)


@pytest.fixture
def functional():
    """The functions of bitsandbytes, not compiled anew for every odd shape."""
    found = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield found


# Bytes


def test_high_nibble_first():
    """A byte's high nibble is the earlier code."""
    assert bnb_4bit.unpack(torch.tensor([[0x12], [0xFE]], dtype=torch.uint8)).tolist() == [1, 2, 15, 14]
    assert bnb_4bit.pack(torch.tensor([1, 2, 15, 14])).tolist() == [[0x12], [0xFE]]


@SOME
@given(st.binary(min_size=1, max_size=32))
def test_every_byte(words):
    """Every byte unpacks to two codes, and packs into itself again."""
    stored = torch.tensor(list(words), dtype=torch.uint8)
    codes = bnb_4bit.unpack(stored)

    assert codes.tolist() == [nibble for byte in words for nibble in divmod(byte, 16)]
    assert bnb_4bit.pack(codes).reshape(-1).tolist() == list(words)


@pytest.mark.parametrize("codes", [[1], [0, 16], [-1, 0]], ids=str)
def test_codes_that_do_not_pack(codes):
    """Codes that do not fill bytes or do not fit four bits are refused."""
    with pytest.raises(ValueError, match="do not f"):
        bnb_4bit.pack(torch.tensor(codes))


# 4 bits, decoded


def plainly_decoded(words, absmax, kind, count):
    """Weights by arithmetic on Python's numbers."""
    codes = [nibble for byte in words.reshape(-1).tolist() for nibble in divmod(byte, 16)][:count]
    book, scales = code_book(kind).tolist(), absmax.tolist()
    return [book[code] * scales[place // 64] for place, code in enumerate(codes)]


@pytest.mark.parametrize("scheme", [NF4, FP4], ids=str)
@pytest.mark.parametrize("shape", [(32, 128), (5, 7), (3, 65)], ids=str)
def test_decode(artifact, shape, scheme):
    """Bytes decode to the weights of the layout, whether or not rows fill blocks, blocks bytes."""
    parts = plain_parts(drawn(*shape), scheme)

    loaded = BNB_4BIT.load(artifact(parts), LINEAR, scheme)

    expected = plainly_decoded(parts["weight"], parts["weight.absmax"], scheme.kind, math.prod(shape))
    assert loaded.weight.reshape(-1).tolist() == pytest.approx(expected, rel=1e-7)
    assert (loaded.weight.shape, loaded.scheme) == (shape, scheme)
    assert BNB_4BIT.shape(artifact(parts), LINEAR) == shape


def test_decode_nested(artifact):
    """Nested: absmax = nested_quant_map[index] x nested_absmax + nested_offset."""
    parts = nested_parts()
    parts["weight.nested_absmax"] = torch.tensor([0.5])

    loaded = BNB_4BIT.load(artifact(parts), LINEAR, NESTED_NF4)

    assert loaded.absmax.tolist() == pytest.approx(
        [float(dynamic_map()[96 + i]) * 0.5 + 2 for i in range(64)], rel=1e-7
    )
    assert loaded.scheme == NESTED_NF4


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = {
    "normal": drawn,
    "positive": lambda *shape: drawn(*shape).abs() + 1,
    "negative": lambda *shape: -drawn(*shape).abs(),
    "zeros": torch.zeros,
    "half zeros": lambda *shape: drawn(*shape) * (torch.arange(math.prod(shape)).reshape(shape) % 256 < 128),
    "huge": lambda *shape: drawn(*shape) * 1e4,
    "tiny": lambda *shape: drawn(*shape) * 1e-4,
    "outliers": lambda *shape: drawn(*shape) * 10 ** drawn(*shape, seed=1),
}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 128), (64, 320), (33, 70), (5, 7), (3, 65), (1, 1)], ids=str)
def test_library_decodes_alike(artifact, functional, shape, dtype, kind, nested):
    """Bit for bit what bitsandbytes decodes of the same bytes, of weights of every sort."""
    for draw in WEIGHTS.values():
        weight = draw(*shape).to(dtype)
        words, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        checkpoint = artifact({"weight": words, **parts}, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
        scheme = BNB_4BIT.scheme_of(checkpoint.quantization)

        loaded = BNB_4BIT.load(checkpoint, LINEAR, scheme)

        stored = {part.removeprefix("weight."): checkpoint.load(f"{LINEAR}.{part}") for part in parts}
        theirs = functional.dequantize_4bit(words, functional.QuantState.from_dict(stored, torch.device("cpu")))
        assert torch.equal(loaded.weight.to(dtype), theirs)
        assert BNB_4BIT.flaws(checkpoint, LINEAR) == []
        assert BNB_4BIT.repacks(checkpoint, LINEAR, scheme)
        assert loaded.rounding(weight.float()).error.max() <= 1.001


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_any_storage(artifact, functional, storage):
    """The bytes may be stored under another dtype (``bnb_4bit_quant_storage``)."""
    words, state = functional.quantize_4bit(drawn(), quant_type="nf4", quant_storage=getattr(torch, storage))
    parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}

    loaded = BNB_4BIT.load(artifact({"weight": words, **parts}), LINEAR, NF4)

    assert torch.equal(loaded.weight, functional.dequantize_4bit(words, state))


def test_library_rounds_alike(functional):
    """Our own rounding to the nearest value is bitsandbytes', absmax and values both."""
    for kind in ("nf4", "fp4"):
        weight = drawn(256, 512)
        words, state = functional.quantize_4bit(weight, quant_type=kind)
        ours = pseudo_quantize_blocks(weight, CodebookScheme(kind))

        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.weight, functional.dequantize_4bit(words, state))


# 8 bits, decoded


def test_decode_int8(artifact):
    """Weight = code x SCB / 127."""
    parts = int8_parts()

    loaded = BNB_8BIT.load(artifact(parts, CONFIG_8BIT), LINEAR, INT8)

    expected = parts["weight"].double() * parts["SCB"].double()[:, None] / 127
    assert torch.allclose(loaded.weight.double(), expected, rtol=2e-7, atol=0)
    assert BNB_8BIT.shape(artifact(parts, CONFIG_8BIT), LINEAR) == (32, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sort", [sort for sort in WEIGHTS if sort != "huge"])
def test_library_decodes_int8_alike(artifact, functional, sort, dtype):
    """What bitsandbytes decodes, within the last bit of float32: it divides last, we first."""
    weight = WEIGHTS[sort](33, 70).to(dtype)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    checkpoint = artifact(int8_parts() | {"weight": codes, "SCB": scales}, CONFIG_8BIT)

    loaded = BNB_8BIT.load(checkpoint, LINEAR, INT8)

    theirs = functional.int8_vectorwise_dequant(codes, scales)
    assert torch.allclose(loaded.weight, theirs, rtol=2.0**-22, atol=0)
    assert BNB_8BIT.flaws(checkpoint, LINEAR) == []
    assert loaded.rounding(weight.half().float()).error.max() <= 1.001
    assert loaded.rounding(weight.half().float()).broken_scales == 0


@pytest.mark.parametrize(
    ("dtype", "scale", "moved"),
    [
        pytest.param(torch.bfloat16, 1.0, 0.0, id="bfloat16"),
        pytest.param(torch.bfloat16, 1e-3, 254 * 2.0**-25 / 1e-3, id="small bfloat16"),
        pytest.param(torch.float32, 1.0, 254 * 2.0**-12, id="float32"),
    ],
)
def test_cast_to_float16(artifact, functional, dtype, scale, moved):
    """The cast to float16 before rounding costs no more than its own bound: nothing for bfloat16 of ordinary size."""
    weight = (drawn(64, 512).clamp(-1, 1) * scale).to(dtype)
    weight[:, 0] = scale  # so that a row's SCB is known: half a step is SCB / 254
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    loaded = BNB_8BIT.load(artifact(int8_parts() | {"weight": codes, "SCB": scales}, CONFIG_8BIT), LINEAR, INT8)

    assert loaded.rounding(weight.float()).error.max() <= 1.001 + moved
    bound = weight.float().abs().amax(1, keepdim=True) / 254 * (1.001 + moved)
    assert ((loaded.weight - weight.float()).abs() <= bound).all()


def test_row_of_zeros(artifact):
    """A row of zeros decodes to zeros, whatever its codes; its SCB of 0 breaks no scale."""
    parts = int8_parts()
    parts["SCB"][3] = 0
    loaded = BNB_8BIT.load(artifact(parts, CONFIG_8BIT), LINEAR, INT8)
    weight = drawn()
    weight[3] = 0

    assert loaded.weight[3].abs().max() == 0
    assert (loaded.rounding(weight).broken_scales, loaded.rounding(weight).recoded) == (0, 0)
    assert loaded.rounding(weight).error.max() <= 1.001


def test_lost_row(artifact):
    """A row with an SCB of 0 whose weights are not 0 is off by its whole range."""
    parts = int8_parts()
    parts["SCB"][3] = 0
    rounding = BNB_8BIT.load(artifact(parts, CONFIG_8BIT), LINEAR, INT8).rounding(drawn())

    assert rounding.end_error.max() > 100
    assert rounding.scale_ratio.min() < 1e-4
