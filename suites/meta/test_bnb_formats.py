"""bitsandbytes' layouts: bytes mean the weights that bitsandbytes reads in them, and broken ones are told from sound.

The oracles are bitsandbytes' own dequantization and, where it is absent, a decoder in plain Python.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.codebook import CodebookQuantized, CodebookScheme, code_book, dynamic_map, pseudo_quantize_blocks
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.pseudo_quantize import Scheme
from fixtures.formats import BNB_4BIT, BNB_8BIT, bnb_4bit, format_of

SOME = settings(deadline=None, max_examples=100)
LINEAR = "model.layers.0.mlp.down_proj"
NF4, FP4, NESTED_NF4 = CodebookScheme("nf4"), CodebookScheme("fp4"), CodebookScheme("nf4", nested=True)
INT8 = Scheme(8, -1, zero_point=False)
CONFIG_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
CONFIG_8BIT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__nf4"


def drawn(rows=32, columns=128, seed=0):
    """Weights of N(0, 1)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def blob(said):
    """JSON as bitsandbytes packs it into a tensor."""
    return torch.tensor(list((said if isinstance(said, str) else json.dumps(said)).encode()), dtype=torch.uint8)


def said_of(shape=(32, 128), **changes):
    """What the JSON of a plain NF4 linear says."""
    return {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape, **changes}


def plain_parts(weight=None, scheme=NF4):
    """A linear's tensors in the 4-bit layout, without double quantization, by our own rounding."""
    weight = drawn() if weight is None else weight
    quantized = pseudo_quantize_blocks(weight, scheme)
    codes = torch.nn.functional.pad(quantized.codes.reshape(-1), (0, weight.numel() % 2))
    return {
        "weight": bnb_4bit.pack(codes),
        "weight.absmax": quantized.absmax,
        "weight.quant_map": code_book(scheme.kind).clone(),
        f"weight.quant_state.bitsandbytes__{scheme.kind}": blob(said_of(weight.shape, quant_type=scheme.kind)),
    }


def nested_parts():
    """The same, with made-up nested scales."""
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.0}
    return plain_parts() | {
        "weight.absmax": torch.arange(64, dtype=torch.uint8) + 96,
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": dynamic_map().clone(),
        STATE: blob(said_of(**nested)),
    }


def int8_parts(weight=None):
    """A linear's tensors in the 8-bit layout."""
    weight = drawn() if weight is None else weight
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact with one linear of the tensors given, and open it."""

    def write(parts, config=CONFIG_4BIT, **settings):
        quantization = {"bnb_4bit_quant_type": "nf4", **config, **settings}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        tensors = {f"{LINEAR}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    return write


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
