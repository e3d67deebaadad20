"""bitsandbytes' layouts from their configs on: what contradicts itself is refused, and what is flawed is said."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core.codebook import CodebookQuantized, code_book
from fixtures.core.errors import CheckpointError, UserError
from fixtures.formats import BNB_4BIT, BNB_8BIT, bnb_4bit, format_of
from suites.meta.bnb_parts import (
    CONFIG_8BIT,
    FP4,
    INT8,
    LINEAR,
    NESTED_NF4,
    NF4,
    STATE,
    blob,
    int8_parts,
    nested_parts,
    opened,
    plain_parts,
    said_of,
)

SOME = settings(deadline=None, max_examples=100)


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact with one linear of the tensors given, and open it."""
    return partial(opened, tmp_path)


# Configs


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        pytest.param({"bnb_4bit_quant_type": "nf4"}, NF4, id="nf4"),
        pytest.param({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, NESTED_NF4, id="nested"),
        pytest.param({}, FP4, id="transformers' default"),
    ],
)
def test_scheme(config, scheme):
    """The scheme is the one that the config states."""
    assert BNB_4BIT.scheme_of(config) == scheme


@pytest.mark.parametrize(
    ("layout", "config", "said"),
    [
        pytest.param(BNB_4BIT, {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'", id="another kind"),
        pytest.param(BNB_4BIT, {"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type ['nf4']", id="a list of kinds"),
        pytest.param(BNB_4BIT, {"bnb_4bit_use_double_quant": "yes"}, "double_quant 'yes'", id="yes"),
        pytest.param(BNB_4BIT, {"bnb_4bit_use_double_quant": None}, "double_quant None", id="null"),
        pytest.param(BNB_8BIT, {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight", id="kept in float16"),
    ],
)
def test_no_such_scheme(layout, config, said):
    """A config that bitsandbytes cannot have is refused in one line."""
    with pytest.raises(UserError) as caught:
        layout.scheme_of(config)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", [BNB_4BIT, BNB_8BIT], ids=["4 bits", "8 bits"])
def test_skip_list(layout):
    """Both widths have their skip list in ``llm_int8_skip_modules``; what is no list of names is refused."""
    assert layout.skipped({"llm_int8_skip_modules": ["lm_head"]}) == ["lm_head"]
    assert layout.skipped({}) is None
    for wrong in ("lm_head", [1], {"lm_head": 1}):
        with pytest.raises(UserError, match="is no list of names"):
            layout.skipped({"llm_int8_skip_modules": wrong})


def test_format(artifact):
    """Which of the two an artifact has, its config says."""
    assert format_of(artifact(plain_parts())) is BNB_4BIT
    assert format_of(artifact(int8_parts(), CONFIG_8BIT)) is BNB_8BIT


@pytest.mark.parametrize(
    ("layout", "parts"), [(BNB_4BIT, nested_parts()), (BNB_8BIT, int8_parts())], ids=["4 bits", "8 bits"]
)
def test_names(layout, parts):
    """Parts belong to their linear; a plain one has none; a quantized one is known as such, whatever part it lost."""
    names = {f"{LINEAR}.{part}" for part in parts}
    plain = {"lm_head.weight", "lm_head.bias"}

    assert layout.quantized(names | plain) == {LINEAR}
    assert set(layout.parts(LINEAR, names)) == names
    assert {layout.module_of(name) for name in names | plain} == {LINEAR, "lm_head"}
    assert layout.parts("lm_head", plain) == []
    assert not layout.keeps_plain_weight(LINEAR, names)
    assert layout.keeps_plain_weight("lm_head", plain)
    for lost in names:
        assert layout.quantized(names - {lost}) == {LINEAR}


# Contradictions


def refused(layout, checkpoint, scheme):
    """The one line in which a linear is refused."""
    problem = layout.contradiction(checkpoint, LINEAR, scheme)
    with pytest.raises(CheckpointError) as caught:
        layout.load(checkpoint, LINEAR, scheme)
    assert LINEAR in str(caught.value)
    assert "\n" not in str(caught.value)
    assert problem in str(caught.value)
    assert layout.flaws(checkpoint, LINEAR) == []
    return problem


@pytest.mark.parametrize("part", sorted(nested_parts()))
def test_missing_part(artifact, part):
    """A 4-bit linear that lacks a part is refused, naming it."""
    parts = nested_parts()
    del parts[part]

    said = refused(BNB_4BIT, artifact(parts), NESTED_NF4)
    assert said == f"lacks its {'quant_state' if part == STATE else part}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"weight": torch.zeros(2047, 1).byte()}, "need 2048 bytes, found 2047", id="a byte too few"),
        pytest.param({"weight": torch.zeros(32, 128)}, "need 2048 bytes, found 16384", id="a plain weight"),
        pytest.param({"weight.absmax": torch.ones(63)}, "needs absmax F32 [64], found F32 [63]", id="a block too few"),
        pytest.param({"weight.absmax": torch.ones(64).byte()}, "found U8 [64]", id="nested without a nest"),
        pytest.param({"weight.absmax": torch.ones(64).double()}, "found F64 [64]", id="scales in float64"),
        pytest.param({"weight.quant_map": torch.ones(15)}, "needs weight.quant_map F32 [16], found F32 [15]", id="map"),
        pytest.param({"weight.quant_map": torch.ones(16).half()}, "found F16 [16]", id="map in float16"),
        pytest.param({"weight.nested_absmax": torch.ones(1)}, "has weight.nested_absmax, but", id="a stray nest"),
        pytest.param({STATE.replace("nf4", "fp4"): blob(said_of())}, "has two quant_states", id="two states"),
        pytest.param({STATE: blob(said_of()).float()}, "its quant_state is F32", id="a state of floats"),
        pytest.param({STATE: torch.zeros(5000).byte()}, "its quant_state is U8 [5000]", id="a long state"),
        pytest.param({STATE: blob(said_of((32, 64)))}, "[32, 64] weights need 1024 bytes", id="another shape"),
        pytest.param({STATE: blob(said_of(blocksize=128))}, "needs absmax F32 [32]", id="another block size"),
    ],
)
def test_contradiction(artifact, changed, said):
    """Parts whose headers contradict each other or the state are refused in one line, before any is decoded."""
    assert said in refused(BNB_4BIT, artifact(plain_parts() | changed), NF4)


NEST = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"weight.absmax": torch.ones(64)}, "needs absmax U8 [64], found F32 [64]", id="plain in a nest"),
        pytest.param({"weight.nested_absmax": torch.ones(2)}, "needs weight.nested_absmax F32 [1]", id="a nest more"),
        pytest.param({"weight.nested_quant_map": torch.ones(255)}, "nested_quant_map F32 [256]", id="a short map"),
        pytest.param({STATE: blob(said_of())}, "has weight.nested_absmax, but its quant_state has no", id="no offset"),
        pytest.param({STATE: blob(said_of(nested_offset=1.0))}, "has the entries", id="half a nest"),
    ],
)
def test_nested_contradiction(artifact, changed, said):
    """So are nested scales that do not fit together."""
    assert said in refused(BNB_4BIT, artifact(nested_parts() | changed), NESTED_NF4)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        pytest.param("", "is not JSON", id="empty"),
        pytest.param("{", "is not JSON", id="cut"),
        pytest.param("[" * 4000, "is not JSON", id="deep"),
        pytest.param("[]", "is not a JSON object", id="a list"),
        pytest.param("__import__('os')", "is not JSON", id="code"),
        pytest.param(said_of(evil=1), "has the entries", id="another entry"),
        pytest.param(dict.fromkeys([f"e{i}" for i in range(300)], 1), "has the entries", id="many entries"),
        pytest.param(said_of(quant_type="int4"), "says quant_type 'int4'", id="another kind"),
        pytest.param(said_of(quant_type=["nf4"]), "says quant_type ['nf4']", id="a list of kinds"),
        pytest.param(said_of(dtype="__class__"), "says dtype '__class__'", id="another dtype"),
        pytest.param(said_of(shape=None), "says shape None", id="no shape"),
        pytest.param(said_of((4096,)), "says shape [4096]", id="a vector"),
        pytest.param(said_of((0, 128)), "says shape [0, 128]", id="no rows"),
        pytest.param(said_of((-32, -128)), "says shape [-32, -128]", id="negative"),
        pytest.param(said_of((True, 4096)), "says shape [True, 4096]", id="true"),
        pytest.param(said_of((32.0, 128.0)), "says shape [32.0, 128.0]", id="floats"),
        pytest.param(said_of((10**300, 1)), "says shape [1000", id="astronomical"),
        pytest.param(said_of(blocksize=0), "says blocksize 0", id="blocks of 0"),
        pytest.param(said_of(blocksize=63), "says blocksize 63", id="blocks of 63"),
        pytest.param(said_of(blocksize="64"), "says blocksize '64'", id="blocks as text"),
        pytest.param(said_of(blocksize=True), "says blocksize True", id="true blocks"),
        pytest.param(said_of(**NEST | {"nested_blocksize": -1}), "says nested_blocksize -1", id="negative nests"),
        pytest.param(said_of(**NEST | {"nested_offset": math.nan}), "says nested_offset nan", id="NaN"),
        pytest.param(said_of(**NEST | {"nested_offset": math.inf}), "says nested_offset inf", id="infinite"),
        pytest.param(said_of(**NEST | {"nested_offset": "1"}), "says nested_offset '1'", id="offset as text"),
        pytest.param(said_of(**NEST | {"nested_offset": None}), "says nested_offset None", id="no offset"),
        pytest.param(said_of(**NEST | {"nested_offset": 10**400}), "says nested_offset 1000", id="astronomical offset"),
    ],
)
def test_hostile_state(artifact, said, problem):
    """JSON that bitsandbytes did not write is refused in one short line, and never run."""
    line = refused(BNB_4BIT, artifact(plain_parts() | {STATE: blob(said)}), NF4)

    assert line.startswith(f"its quant_state {problem}")
    assert len(line) < 400


@SOME
@given(st.binary(max_size=200))
def test_any_state(words):
    """Any other bytes are refused in a line about what is wrong with them."""
    with pytest.raises(ValueError, match=r"^(is|has|says) .{1,300}$"):
        bnb_4bit.parse_state(words)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"weight": torch.zeros(32, 128)}, "its weight is F32 [32, 128]", id="a plain weight"),
        pytest.param({"weight": torch.zeros(32, 128).byte()}, "its weight is U8 [32, 128]", id="unsigned"),
        pytest.param({"weight": torch.zeros(4096).char()}, "its weight is I8 [4096]", id="flat"),
        pytest.param({"weight": torch.zeros(0, 128).char()}, "its weight is I8 [0, 128]", id="empty"),
        pytest.param({"SCB": torch.ones(31)}, "needs SCB F32 [32], found F32 [31]", id="a row too few"),
        pytest.param({"SCB": torch.ones(32).half()}, "needs SCB F32 [32], found F16 [32]", id="scales in float16"),
        pytest.param({"SCB": torch.ones(32, 1)}, "needs SCB F32 [32], found F32 [32, 1]", id="a column of scales"),
        pytest.param({"weight_format": torch.tensor(1).byte()}, "its weight_format is 1", id="another order"),
        pytest.param({"weight_format": torch.zeros(2).byte()}, "its weight_format is U8 [2]", id="two orders"),
        pytest.param({"weight_format": torch.tensor(0.0)}, "its weight_format is F32", id="a float's order"),
    ],
)
def test_int8_contradiction(artifact, changed, said):
    """8-bit parts that contradict each other are refused in one line."""
    assert said in refused(BNB_8BIT, artifact(int8_parts() | changed, CONFIG_8BIT), INT8)


@pytest.mark.parametrize("part", ["weight", "SCB"])
def test_missing_int8_part(artifact, part):
    """An 8-bit linear that lacks its codes or its scales is refused."""
    parts = int8_parts()
    del parts[part]

    assert refused(BNB_8BIT, artifact(parts, CONFIG_8BIT), INT8) == f"lacks its {part}"


# Flaws


@pytest.mark.parametrize(
    ("changed", "settings", "said"),
    [
        pytest.param(
            {}, {"bnb_4bit_quant_type": "fp4"}, "stored as nf4 b64, but quantization_config says fp4", id="kind"
        ),
        pytest.param({}, {"bnb_4bit_use_double_quant": True}, "says nf4 b64 double-quantized", id="nesting"),
        pytest.param({"weight.quant_map": code_book("fp4").clone()}, {}, "quant_map is not the published", id="map"),
        pytest.param({"weight.quant_map": code_book("nf4") * math.nan}, {}, "quant_map is not the published", id="NaN"),
        pytest.param({STATE: blob(said_of(quant_type="fp4"))}, {}, "is named nf4, but says fp4", id="named otherwise"),
        pytest.param(
            {"weight.absmax": torch.ones(2, 32).bfloat16()}, {}, "absmax is BF16 [2, 32], not F32 [64]", id="forward"
        ),
        pytest.param({"weight.absmax": torch.ones(64).half()}, {}, "absmax is F16 [64]", id="scales in float16"),
    ],
)
def test_flaw(artifact, changed, settings, said):
    """What bitsandbytes decodes all the same is a flaw, said in one line, and decodes as bitsandbytes does it."""
    checkpoint = artifact(plain_parts() | changed, **settings)

    assert said in "; ".join(BNB_4BIT.flaws(checkpoint, LINEAR))
    assert BNB_4BIT.contradiction(checkpoint, LINEAR, NF4) == ""
    assert isinstance(BNB_4BIT.load(checkpoint, LINEAR, NF4), CodebookQuantized)


def test_nested_flaw(artifact):
    """A table of nested scales that is not the library's is a flaw."""
    parts = nested_parts()
    assert BNB_4BIT.flaws(artifact(parts, bnb_4bit_use_double_quant=True), LINEAR) == []
    parts["weight.nested_quant_map"][7] += 1e-3

    flaws = BNB_4BIT.flaws(artifact(parts, bnb_4bit_use_double_quant=True), LINEAR)
    assert flaws == ["its nested_quant_map is not the published table"]


def test_int8_flaws(artifact):
    """Codes of -128 and a lost order of rows are flaws of an 8-bit linear."""
    parts = int8_parts()
    assert BNB_8BIT.flaws(artifact(parts, CONFIG_8BIT), LINEAR) == []
    parts["weight"][2, 3] = -128
    del parts["weight_format"]

    flaws = BNB_8BIT.flaws(artifact(parts, CONFIG_8BIT), LINEAR)
    assert flaws == [
        "lacks its weight_format; bitsandbytes takes it for rows",
        "1 codes of -128, which rounding never gives",
    ]
