"""Adapters know their architectures: every linear of the published models, and the name of every tensor."""

from __future__ import annotations

from collections import Counter

import pytest

from fixtures.adapters import ADAPTERS, Linear
from fixtures.core.pseudo_quantize import Scheme
from fixtures.subjects.published import published_config

VL = ADAPTERS["qwen2_5_vl"]
AWQ = Scheme(4, 128)


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
    reasons = {one.name: VL.kept_reason(one, AWQ) for one in linears_3b}
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
    assert [group.name for group in VL.scaling_groups(config)] == ["qkv", "gate_up", "down"]
    config["text_config"]["num_key_value_heads"] = config["text_config"]["num_attention_heads"]
    assert [group.name for group in VL.scaling_groups(config)] == ["qkv", "o", "gate_up", "down"]
