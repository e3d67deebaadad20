"""What mutation testing found unsaid of the formats: each test kills mutants that the others let live."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.core import codebook
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookScheme, pseudo_quantize_blocks
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.formats import AWQ_GEMM, BNB_4BIT, BNB_8BIT, awq_gemm, bnb_4bit, bnb_8bit, format_of

NAN = math.nan


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


def test_last_row_of_an_odd_number():
    """The nibble too many of an odd number of codes is no code, of whichever rows the last is read with."""
    words = torch.full((98, 1), 0x21, dtype=torch.uint8)  # 65 rows of 3
    linear = bnb_4bit.Stored4bit(words, torch.ones(4), bnb_4bit.State("nf4", (65, 3), 64))

    assert linear.together == 64
    assert linear.rows(64, 65).codes.tolist() == [[2, 1, 2]]
    assert linear.repacks(64, linear.rows(64, 65)) is True
    assert linear.all_rows.codes.shape == (65, 3)


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
    assert bnb_4bit.unpack(words.reshape(2, 2)[:, :1]).tolist() == codes.tolist()
    assert bnb_4bit.unpack(words.reshape(2, 2)).tolist() == bnb_4bit.unpack(words).tolist()
    linear = bnb_4bit.Stored4bit(words[::2], torch.ones(1), bnb_4bit.State("nf4", (1, 8), 64))
    assert linear.all_rows.codes.tolist() == [codes.tolist()]


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


def nested_parts():
    """The same linear of 128 weights with nested scales."""
    return four_bits(absmax=torch.zeros(2, dtype=torch.uint8), **NESTED) | {
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": codebook.dynamic_map().clone(),
    }


@pytest.mark.parametrize("part", ["weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax"])
def test_every_table_of_a_nest_has_its_size(stored, part):
    """With nested scales all tables must be there in full, the one of the codes, too."""
    parts = nested_parts()
    scheme = CodebookScheme("nf4", nested=True)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme) == ""

    parts[part] = torch.ones(len(parts[part]) + 1)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme).startswith(f"needs {part} F32")


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
