"""Adapters know their architectures: every linear of the published models, and the name of every tensor."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fixtures.adapters import ADAPTERS, Linear
from fixtures.core.codebook import CodebookScheme
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.rounding import WeightScheme
from fixtures.meters.ledger import predicted, stored_bytes, total
from fixtures.subjects.published import published_config

VL = ADAPTERS["qwen2_5_vl"]
OMNI = ADAPTERS["qwen2_5_omni"]
AWQ = Scheme(4, 128)
NF4 = CodebookScheme("nf4")
OMNI_3B = published_config("qwen2_5_omni-3b")


@pytest.fixture(scope="module")
def linears_3b() -> tuple[Linear, ...]:
    """The linears of the full-size 3B, on the meta device."""
    return VL.linears(published_config("qwen2_5_vl-3b"))


def test_415_linears(linears_3b: tuple[Linear, ...]) -> None:
    """Qwen2.5-VL-3B has the 415 linears that were counted in it, each in its tower and of its shape."""
    shapes = Counter((one.tower, one.in_features, one.out_features) for one in linears_3b)
    assert shapes == {
        ("visual", 1280, 3840): 32,  # qkv
        ("visual", 1280, 1280): 32,  # proj
        ("visual", 1280, 3420): 64,  # gate, up
        ("visual", 3420, 1280): 32,  # down
        ("visual", 5120, 5120): 1,  # merger
        ("visual", 5120, 2048): 1,
        ("language_model", 2048, 2048): 72,  # q, o
        ("language_model", 2048, 256): 72,  # k, v
        ("language_model", 2048, 11008): 72,  # gate, up
        ("language_model", 11008, 2048): 36,  # down
        ("lm_head", 2048, 151936): 1,
    }
    assert len(linears_3b) == 415


def test_252_are_quantized(linears_3b: tuple[Linear, ...]) -> None:
    """AWQ g128 quantizes the 252 linears of its language model and keeps every other one for a stated reason."""
    reasons = VL.kept_reasons(published_config("qwen2_5_vl-3b"), AWQ, ("language_model",))
    quantized = {one.tower for one in linears_3b if not reasons[one.name]}
    assert quantized == {"language_model"}
    assert sum(not reason for reason in reasons.values()) == 252
    indivisible = [one for one in linears_3b if one.in_features == 3420]
    assert all("3420" in reasons[one.name] for one in indivisible)


def test_biases(linears_3b: tuple[Linear, ...]) -> None:
    """q, k and v of the language model have a bias; o, gate, up, down and the head have none."""
    with_bias = {one.name.rsplit(".", 1)[-1] for one in linears_3b if one.bias and one.tower == "language_model"}
    without = {one.name.rsplit(".", 1)[-1] for one in linears_3b if not one.bias and one.tower != "visual"}
    assert with_bias == {"q_proj", "k_proj", "v_proj"}
    assert without == {"o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_names() -> None:
    """In-memory names and the hub's lead to the same hub name."""
    for inside, hub in (
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert VL.hub_name(inside) == hub
        assert VL.hub_name(hub) == hub


def test_grouped_query_attention_has_no_output_group() -> None:
    """V is folded into o only where every query head has a value head of its own."""
    config = published_config("qwen2_5_vl-3b")
    (decoder,) = VL.decoders(config)
    assert [group.name for group in decoder.groups] == ["qkv", "gate_up", "down"]
    config["text_config"]["num_key_value_heads"] = config["text_config"]["num_attention_heads"]
    (decoder,) = VL.decoders(config)
    assert [group.name for group in decoder.groups] == ["qkv", "o", "gate_up", "down"]


# -- Qwen2.5-Omni ----------------------------------------------------------------------------------------------


def test_1001_linears() -> None:
    """Qwen2.5-Omni-3B has the 1001 linears that were counted in it, each in its tower; 5.54 billion parameters."""
    found = OMNI.linears(OMNI_3B)
    assert Counter(one.tower for one in found) == {
        "audio_tower": 193,  # 32 layers of q, k, v, out, fc1, fc2; proj
        "visual": 226,  # 32 blocks of q, k, v, proj, gate, up, down; merger's two
        "language_model": 252,
        "lm_head": 1,
        "talker": 170,  # projection in, 24 layers of seven, codec head
        "token2wav": 159,
    }
    shapes = Counter((one.in_features, one.out_features) for one in found if one.tower == "talker")
    assert shapes == {
        (2048, 896): 1,  # thinker_to_talker_proj
        (896, 896): 48,  # q, o
        (896, 128): 48,  # k, v
        (896, 4864): 48,  # gate, up
        (4864, 896): 24,  # down
        (896, 8448): 1,  # codec_head
    }
    assert sum(parameter.numel() for parameter in OMNI.on_meta(OMNI_3B).parameters()) == pytest.approx(5.54e9, rel=1e-3)


def test_audio_keys_have_no_bias() -> None:
    """The audio tower's q, v and out have a bias, its k has none."""
    towers = [one for one in OMNI.linears(OMNI_3B) if one.tower == "audio_tower" and ".self_attn." in one.name]
    assert {one.name.rsplit(".", 1)[-1] for one in towers if not one.bias} == {"k_proj"}
    assert {one.name.rsplit(".", 1)[-1] for one in towers if one.bias} == {"q_proj", "v_proj", "out_proj"}


@pytest.mark.parametrize(
    ("towers", "count"),
    [((), 420), (("language_model",), 252), (("talker",), 168), (("language_model", "talker"), 420)],
)
def test_thinker_talker_or_both(towers: tuple[str, ...], count: int) -> None:
    """Thinker, talker or both are quantized as asked for, both by default; each other linear has a reason to stay."""
    reasons = OMNI.kept_reasons(OMNI_3B, AWQ, towers or OMNI.quantizable(OMNI_3B))
    assert sum(not reason for reason in reasons.values()) == count
    assert len(reasons) == 1001
    assert reasons["talker.codec_head"]
    assert reasons["token2wav.code2wav_dit_model.input_embed.proj"]


def test_towers_beside_the_decoders() -> None:
    """Bitsandbytes may quantize a tower that AWQ cannot, where it is asked to."""
    reasons = OMNI.kept_reasons(OMNI_3B, NF4, ("language_model", "visual"))
    assert sum(not reason for reason in reasons.values()) == 252 + 226


OMNI_NAMES = [
    ("thinker.model.visual.blocks.0.attn.q.weight", "thinker.visual.blocks.0.attn.q.weight", "visual.blocks.0.attn.q"),
    ("thinker.model.audio_tower.proj.weight", "thinker.audio_tower.proj.weight", "audio_tower.proj"),
    (
        "thinker.model.language_model.layers.3.mlp.up_proj.weight",
        "thinker.model.layers.3.mlp.up_proj.weight",
        "language_model.model.layers.3.mlp.up_proj",
    ),
    ("thinker.lm_head.weight", "thinker.lm_head.weight", "language_model.lm_head"),
    ("talker.model.layers.0.mlp.up_proj.weight", "talker.model.layers.0.mlp.up_proj.weight", ""),
]


@pytest.mark.parametrize(("inside", "hub", "served"), OMNI_NAMES)
def test_omni_names(inside: str, hub: str, served: str) -> None:
    """In-memory names and the hub's lead to the same hub name, and to vLLM's where it loads the module."""
    assert OMNI.hub_name(inside) == hub
    assert OMNI.hub_name(hub) == hub
    assert OMNI.engine_name(hub.removesuffix(".weight")) == served


@pytest.mark.parametrize("towers", [("language_model",), ("talker",), ("language_model", "talker")])
def test_skip_lists(towers: tuple[str, ...]) -> None:
    """Each choice of towers has a skip list that transformers' own matching reads as meant."""
    skipped = OMNI.skip_list(OMNI_3B, towers)
    reasons = OMNI.kept_reasons(OMNI_3B, NF4, towers)
    modules = {name for name, module in OMNI.on_meta(OMNI_3B).named_modules() if isinstance(module, nn.Linear)}
    converted = {OMNI.hub_name(name) for name in modules if should_convert_module(name, list(skipped))}
    assert converted == {name for name, reason in reasons.items() if not reason}


# -- ledger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (AWQ, 512 * 256 // 2 + 2 * 512 * 2 + 2 * 512 // 2),  # codes, fp16 scales and nibbles of two groups a row
        (Scheme(8, -1, zero_point=False), 512 * 256 + 4 * 512),
        (NF4, 512 * 256 // 2 + 4 * 2048 + 64),  # 2048 blocks of 64
        (CodebookScheme("nf4", nested=True), 512 * 256 // 2 + 2048 + 4 * 8 + 64 + 1024),
    ],
    ids=str,
)
def test_stored_bytes(scheme: WeightScheme, expected: int) -> None:
    """The ledger counts the bytes of a 512 x 256 linear as they are counted by hand."""
    assert stored_bytes(scheme, 512, 256) == expected


def test_ledger_of_the_published_models() -> None:
    """The ledger's bytes of the published models are those that were measured of their artifacts: 7.51 and 3.40 GB."""
    vl = total(predicted(VL, published_config("qwen2_5_vl-3b"), AWQ))
    assert vl.before == pytest.approx(7.51e9, rel=1e-3)
    assert vl.after == pytest.approx(3.40e9, rel=1e-3)
    omni = total(predicted(OMNI, OMNI_3B, NF4, ("language_model", "visual", "audio_tower")))
    assert omni.saved == pytest.approx(0.529, abs=1e-3)
