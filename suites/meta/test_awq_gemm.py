"""AWQ's gemm layout: bytes mean the weights that every engine reads in them.

The oracle is a decoder in plain Python that shares nothing with ours but the layout as published.
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.pseudo_quantize import Quantized, Scheme, pseudo_quantize_tensor
from fixtures.formats import awq_gemm, format_of

SOME = settings(deadline=None, max_examples=100)
WORD = 0x75316420  # columns 0..7 hold codes 0..7; its nibbles, least significant first, are columns 0 2 4 6 1 3 5 7
LINEAR = "model.layers.0.mlp.down_proj"

words = st.integers(-(2**31), 2**31 - 1)
nibbles = st.integers(0, 15)


def plain_unpack(word_rows):
    """Rows of int32 words -> rows of codes, by shifts of Python integers."""
    columns_of_nibbles = (0, 2, 4, 6, 1, 3, 5, 7)
    rows = []
    for word_row in word_rows:
        row = [None] * (8 * len(word_row))
        for c, word in enumerate(word_row):
            unsigned = word % 2**32
            for i in range(8):
                row[8 * c + columns_of_nibbles[i]] = unsigned // 16**i % 16
        rows.append(row)
    return rows


def plain_weight(qweight, qzeros, scales, group_size):
    """weight[o][i] = (code[i][o] - zero[i // group size][o]) x scale[i // group size][o]."""
    codes, zeros = plain_unpack(qweight.tolist()), plain_unpack(qzeros.tolist())
    steps = scales.tolist()
    return [
        [(codes[i][o] - zeros[i // group_size][o]) * steps[i // group_size][o] for i in range(len(codes))]
        for o in range(len(codes[0]))
    ]


def parts_of(in_features=16, out_features=24, group_size=8, seed=0):
    """Random tensors of the layout: qweight [in, out/8], qzeros [in/g, out/8], scales [in/g, out]."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size

    def some_words(rows):
        shape = (rows, out_features // 8)
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scales = torch.rand(groups, out_features, generator=generator).add(0.01).half()
    return {"qweight": some_words(in_features), "qzeros": some_words(groups), "scales": scales}


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact with one linear of the tensors given, and open it."""

    def write(parts):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
        save_file({f"{LINEAR}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    return write


# Words


def test_nibble_order():
    """A word's nibbles, from the least significant, are columns 0, 2, 4, 6, 1, 3, 5, 7."""
    assert awq_gemm.pack(torch.arange(8)[None]).tolist() == [[WORD]]
    assert awq_gemm.unpack(torch.tensor([[WORD]], dtype=torch.int32)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("column", "word"), [(0, 0xF), (2, 0xF0), (4, 0xF00), (6, 0xF000), (1, 0xF0000), (3, 0xF00000), (5, 0xF000000)]
)
def test_nibble_of_a_column(column, word):
    """Each column has its own nibble, and fills no other."""
    codes = torch.zeros(1, 8, dtype=torch.int16)
    codes[0, column] = 15

    assert awq_gemm.pack(codes).tolist() == [[word]]


def test_sign_bit():
    """Column 7 lies in the sign bit: a negative word holds codes 0..15 like any other."""
    codes = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]])

    assert awq_gemm.pack(codes).tolist() == [[-0x10000000]]
    assert awq_gemm.unpack(torch.tensor([[-0x10000000]], dtype=torch.int32)).tolist() == codes.tolist()
    assert awq_gemm.unpack(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[15] * 8]


def test_words_in_order():
    """Word c of a row holds columns 8c to 8c + 7; rows stay rows."""
    codes = torch.stack([torch.arange(16) % 8, torch.arange(16) % 8 + 8])

    assert awq_gemm.pack(codes).tolist() == [[WORD, WORD], [(WORD | 0x88888888) - 2**32] * 2]


@SOME
@given(st.lists(st.lists(words, min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_word(rows):
    """Every 32-bit word decodes as the plain decoder says, and packs into itself again."""
    stored = torch.tensor(rows, dtype=torch.int64).to(torch.int32)

    codes = awq_gemm.unpack(stored)

    assert codes.tolist() == plain_unpack(rows)
    assert torch.equal(awq_gemm.pack(codes), stored)


@SOME
@given(st.lists(st.lists(nibbles, min_size=16, max_size=16), min_size=1, max_size=4))
def test_every_code(rows):
    """Codes come back from their words as they went in."""
    codes = torch.tensor(rows, dtype=torch.int16)

    assert torch.equal(awq_gemm.unpack(awq_gemm.pack(codes)), codes)


def test_word_shapes():
    """Eight int16 codes make an int32 word."""
    stored = awq_gemm.pack(torch.zeros(5, 24, dtype=torch.int16))
    codes = awq_gemm.unpack(stored)

    assert (stored.shape, stored.dtype) == ((5, 3), torch.int32)
    assert (codes.shape, codes.dtype) == ((5, 24), torch.int16)


@pytest.mark.parametrize("code", [-1, 16, 255, -128])
def test_code_out_of_range(code):
    """A code that four bits do not hold is refused, not cut to fit."""
    codes = torch.zeros(2, 8, dtype=torch.int16)
    codes[1, 3] = code

    with pytest.raises(ValueError, match="do not fit four bits"):
        awq_gemm.pack(codes)


@pytest.mark.parametrize("columns", [1, 7, 9, 3420])
def test_columns_that_fill_no_words(columns):
    """Columns that do not fill words are refused, not padded."""
    with pytest.raises(ValueError, match=f"{columns} columns do not fill words of 8"):
        awq_gemm.pack(torch.zeros(1, columns, dtype=torch.int16))


# Weights


@pytest.mark.parametrize("group_size", [4, 8, 16])
@pytest.mark.parametrize("shape", [(16, 24), (32, 8), (16, 16)], ids=str)
def test_decode(shape, group_size):
    """Bytes decode to the weights of the published formula, element by element."""
    in_features, out_features = shape
    parts = parts_of(in_features, out_features, group_size)

    quantized = awq_gemm.decode(parts, Scheme(4, group_size))

    assert quantized.weight.shape == (out_features, in_features)
    expected = torch.tensor(plain_weight(**parts, group_size=group_size), dtype=torch.float64)
    assert torch.equal(quantized.weight, expected.float())


def test_decode_by_hand():
    """Two inputs, eight outputs, one group: (code - zero point) x scale, outputs by row."""
    parts = {
        "qweight": torch.tensor([[WORD], [0x11111111]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x22222222]], dtype=torch.int32),
        "scales": torch.tensor([[1, 1, 1, 1, 0.5, 0.5, 0.5, 2]], dtype=torch.float16),
    }

    weight = awq_gemm.decode(parts, Scheme(4, -1)).weight

    assert weight.tolist() == [
        [-2, -1], [-1, -1], [0, -1], [1, -1], [1, -0.5], [1.5, -0.5], [2, -0.5], [10, -2],
    ]  # fmt: skip


@pytest.mark.parametrize("group_size", [4, 16])
def test_encode(group_size):
    """An encoded weight has the published shapes and dtypes, and its bytes mean what its codes meant."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    quantized = pseudo_quantize_tensor(weight, Scheme(4, group_size), scale_dtype=torch.float16)

    parts = awq_gemm.encode(quantized)

    groups = 16 // group_size
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        "qweight": ((16, 3), torch.int32),
        "qzeros": ((groups, 3), torch.int32),
        "scales": ((groups, 24), torch.float16),
    }
    assert all(t.is_contiguous() for t in parts.values())
    assert torch.equal(torch.tensor(plain_weight(**parts, group_size=group_size)), quantized.weight)


@pytest.mark.parametrize("name", awq_gemm.PARTS)
def test_parts_survive(name):
    """Decoding and encoding again gives the same bytes."""
    parts = parts_of()

    assert torch.equal(awq_gemm.encode(awq_gemm.decode(parts, Scheme(4, 8)))[name], parts[name])


def test_symmetric_codes_are_refused():
    """Codes around 0 do not fit the layout's unsigned nibbles, and are not wrapped into them."""
    quantized = pseudo_quantize_tensor(-torch.ones(8, 8), Scheme(4, 8, zero_point=False))

    with pytest.raises(ValueError, match="do not fit four bits"):
        awq_gemm.encode(quantized)


# What a config says


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        pytest.param({"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, Scheme(4, 128), id="full"),
        pytest.param({"bits": 4, "group_size": 64, "version": "GEMM"}, Scheme(4, 64), id="upper case"),
        pytest.param({"bits": 4, "group_size": -1}, Scheme(4, -1), id="per row"),
        pytest.param({"w_bit": 4, "q_group_size": 32}, Scheme(4, 32), id="older names"),
        pytest.param({}, Scheme(4, 128), id="defaults"),
    ],
)
def test_scheme(config, scheme):
    """The scheme is the one that the config states."""
    assert awq_gemm.scheme_of(config) == scheme


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param({"version": "gemv"}, "layout 'gemv' is not supported", id="gemv"),
        pytest.param({"version": "marlin"}, "layout 'marlin' is not supported", id="marlin"),
        pytest.param({"version": None}, "layout 'none' is not supported", id="no version"),
        pytest.param({"bits": 3}, "says 3 bits", id="3 bits"),
        pytest.param({"bits": 8}, "says 8 bits", id="8 bits"),
        pytest.param({"w_bit": 3}, "says 3 bits", id="3 bits, older name"),
        pytest.param({"bits": "4"}, "says 4 bits", id="bits as text"),
        pytest.param({"bits": None}, "says None bits", id="no bits"),
        pytest.param({"zero_point": False}, "says no zero points", id="symmetric"),
        pytest.param({"group_size": 0}, "group size 0: must be positive", id="groups of 0"),
        pytest.param({"group_size": -2}, "group size -2: must be positive", id="groups of -2"),
        pytest.param({"group_size": "x"}, "group size 'x'", id="groups of x"),
        pytest.param({"group_size": None}, "group size None", id="no group size"),
        pytest.param({"group_size": [128]}, "group size [128]", id="a list of groups"),
        pytest.param({"group_size": 128.5}, "group size 128.5", id="half an input"),
        pytest.param({"group_size": float("inf")}, "group size inf", id="infinite groups"),
        pytest.param({"group_size": True}, "group size True", id="true groups"),
    ],
)
def test_no_such_scheme(config, said):
    """A config that the layout cannot have is refused in one line that says what is wrong."""
    with pytest.raises(UserError) as caught:
        awq_gemm.scheme_of(config)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Out of an artifact


def test_load(artifact):
    """A linear is loaded by the name it is stored under, as its bytes decode."""
    parts = parts_of()

    quantized = awq_gemm.load(artifact(parts), LINEAR, Scheme(4, 8))

    assert isinstance(quantized, Quantized)
    assert torch.equal(quantized.weight, torch.tensor(plain_weight(**parts, group_size=8)))


@pytest.mark.parametrize("part", awq_gemm.PARTS)
def test_missing_part(artifact, part):
    """A linear that lacks a part is refused, naming the linear and the part."""
    parts = parts_of()
    del parts[part]

    with pytest.raises(CheckpointError, match=rf"{LINEAR}: lacks its {part}$"):
        awq_gemm.load(artifact(parts), LINEAR, Scheme(4, 8))


def test_missing_linear(artifact):
    """A linear that is not there is refused."""
    with pytest.raises(CheckpointError, match="lm_head: lacks its qweight"):
        awq_gemm.load(artifact(parts_of()), "lm_head", Scheme(4, 8))


@pytest.mark.parametrize(
    ("changed", "group_size", "said"),
    [
        pytest.param({}, 16, "1 groups of 16 for 24 outputs need scales", id="another group size"),
        pytest.param({}, 4, "4 groups of 4", id="a smaller group size"),
        pytest.param({}, -1, "1 groups of 16", id="not per row"),
        pytest.param({}, 128, "16 input features do not split into groups of 128", id="a group beyond the row"),
        pytest.param({}, 5, "16 input features do not split into groups of 5", id="an indivisible row"),
        pytest.param({"scales": torch.ones(3, 24).half()}, 8, "scales (3, 24)", id="a group too many"),
        pytest.param({"scales": torch.ones(24, 2).half()}, 8, "scales (24, 2)", id="transposed scales"),
        pytest.param({"scales": torch.ones(48).half()}, 8, "are not matrices", id="flat scales"),
        pytest.param({"scales": torch.ones(0, 24).half()}, 8, "are not matrices", id="no scales"),
        pytest.param({"scales": torch.ones(2, 24).int()}, 8, "dtypes I32, I32, I32", id="whole scales"),
        pytest.param({"qzeros": torch.zeros(2, 24).int()}, 8, "qzeros (2, 24)", id="zero points not packed"),
        pytest.param({"qzeros": torch.zeros(1, 3).int()}, 8, "qzeros (1, 3)", id="zero points for one group"),
        pytest.param({"qzeros": torch.zeros(2, 3).half()}, 8, "dtypes I32, F16, F16", id="zero points in fp16"),
        pytest.param({"qweight": torch.zeros(16, 3).long()}, 8, "dtypes I64", id="64-bit words"),
        pytest.param({"qweight": torch.zeros(16, 24).int()}, 8, "for 192 outputs", id="codes not packed"),
        pytest.param({"qweight": torch.zeros(24, 2).int()}, 8, "3 groups of 8 for 16 outputs", id="transposed codes"),
        pytest.param({"qweight": torch.zeros(48).int()}, 8, "are not matrices", id="flat codes"),
        pytest.param({"qweight": torch.zeros(0, 3).int()}, -1, "are not matrices", id="no codes"),
    ],
)
def test_contradiction(artifact, changed, group_size, said):
    """Parts whose headers contradict each other or the group size are refused in one line, before any is decoded."""
    with pytest.raises(CheckpointError) as caught:
        awq_gemm.load(artifact(parts_of() | changed), LINEAR, Scheme(4, group_size))

    assert said in str(caught.value)
    assert LINEAR in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_as_stored(artifact):
    """Scales stored in bfloat16 or float32 are read in their own dtype."""
    parts = parts_of()
    parts["scales"] = parts["scales"].float() * (1 + 2.0**-20)

    quantized = awq_gemm.load(artifact(parts), LINEAR, Scheme(4, 8))

    assert torch.equal(quantized.scales, parts["scales"].t())


def test_little_endian(artifact):
    """On disk a word is little-endian: its first byte holds columns 2 and 0."""
    checkpoint = artifact({"qweight": torch.tensor([[WORD]], dtype=torch.int32)})

    stored = (checkpoint.path / "model.safetensors").read_bytes()[-4:]

    assert stored == bytes([0x20, 0x64, 0x31, 0x75]) == struct.pack("<I", WORD)


# Which format


def test_format(artifact):
    """An artifact's format is the one that its quant_method names."""
    assert isinstance(format_of(artifact(parts_of())), awq_gemm.AwqGemm)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "awk"}}, "did you mean 'awq'?"),
        ({"quantization_config": {}}, "unknown quant_method"),
        ({"quantization_config": "awq"}, "not a JSON object"),
    ],
    ids=["none", "unknown", "nameless", "not an object"],
)
def test_no_format(artifact, config, said):
    """An artifact that nothing decodes is refused in one line that names it."""
    folder = artifact(parts_of()).path
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError) as caught:
        format_of(Checkpoint(folder))

    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
