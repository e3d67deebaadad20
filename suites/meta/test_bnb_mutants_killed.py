"""What mutation testing found unsaid of bitsandbytes' layouts: each test kills mutants that the others let live."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookScheme
from fixtures.core.errors import UserError
from fixtures.formats import BNB_4BIT, BNB_8BIT, bnb_4bit, format_of
from suites.meta.small_linears import NESTED, SAID, eight_bits, four_bits, nested_parts, opened

NAN = math.nan


@pytest.fixture
def stored(tmp_path):
    """Write an artifact of one linear "m.up", and open it."""
    return partial(opened, tmp_path)


# Both


def test_which_width_of_bitsandbytes(stored):
    """The width stands under either name, and is 4 bits where nothing is said; no method is not called "None"."""
    parts = {"weight": torch.zeros(1)}

    assert format_of(stored(parts, quant_method="bitsandbytes", _load_in_8bit=True)) is BNB_8BIT
    assert format_of(stored(parts, quant_method="bitsandbytes", load_in_8bit=True)) is BNB_8BIT
    assert format_of(stored(parts, quant_method="bitsandbytes", load_in_8bit=False, _load_in_8bit=True)) is BNB_4BIT
    assert format_of(stored(parts, quant_method="bitsandbytes")) is BNB_4BIT
    with pytest.raises(UserError, match=r"quant_method in .*config\.json'? ''"):
        format_of(stored(parts, bits=4))


@pytest.mark.parametrize("layout", [BNB_4BIT, BNB_8BIT], ids=["4 bits", "8 bits"])
def test_bitsandbytes_as_formats(layout):
    """Both are bitsandbytes', whose quantizers scale nothing before a linear; codes stand where the weight was."""
    assert (layout.method, layout.folds_scales, layout.codes) == ("bitsandbytes", False, "weight")


# The state of a 4-bit linear


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


def test_last_row_of_an_odd_number():
    """The nibble too many of an odd number of codes is no code, of whichever rows the last is read with."""
    words = torch.full((98, 1), 0x21, dtype=torch.uint8)  # 65 rows of 3
    linear = bnb_4bit.Stored4bit(words, torch.ones(4), bnb_4bit.State("nf4", (65, 3), 64))

    assert linear.together == 64
    assert linear.rows(64, 65).codes.tolist() == [[2, 1, 2]]
    assert linear.repacks(64, linear.rows(64, 65)) is True
    assert linear.all_rows.codes.shape == (65, 3)


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


@pytest.mark.parametrize("part", ["weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax"])
def test_every_table_of_a_nest_has_its_size(stored, part):
    """With nested scales all tables must be there in full, the one of the codes, too."""
    parts = nested_parts()
    scheme = CodebookScheme("nf4", nested=True)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme) == ""

    parts[part] = torch.ones(len(parts[part]) + 1)
    assert BNB_4BIT.contradiction(stored(parts), "m.up", scheme).startswith(f"needs {part} F32")


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


# 8 bits


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
