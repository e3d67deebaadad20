"""What bfloat16 does to bitsandbytes' linears is part of the floor that vLLM's kernel is held against: no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError
from fixtures.core.targets import Target
from fixtures.engines.bfloat16_linears import coded_in_bfloat16
from fixtures.engines.loading import coded_linears, load_model
from fixtures.engines.replies import Taught
from fixtures.engines.saying import taught
from fixtures.formats import AWQ_GEMM, BNB_4BIT, BNB_8BIT
from fixtures.options import Selection
from fixtures.serving_under_test import DRAWS, Exact
from fixtures.subjects.samples import draw
from suites import test_serving
from suites.test_serving import kl

VL = ADAPTERS["qwen2_5_vl"]
LINEAR = "model.layers.1.mlp.gate_proj"  # by its hub name
SAMPLES = 8


@pytest.fixture(scope="module")
def artifact(bnb_artifacts: Callable[[str], Path]) -> Checkpoint:
    """The shipped VL in NF4."""
    return Checkpoint(bnb_artifacts("bnb-nf4"))


@pytest.fixture(scope="module")
def exact(artifact: Checkpoint) -> Exact:
    """Transformers in float32, on the CPU."""
    return Exact(partial(draw, split="evaluation", count=SAMPLES), "cpu")


def in_bits(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16, ties to even, by its bits (16 of float32's 32)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.fixture(scope="module")
def model(artifact: Checkpoint) -> nn.Module:
    """The artifact decoded, in float32."""
    return load_model(artifact, VL, torch.float32)


def test_by_hand(model: nn.Module, artifact: Checkpoint) -> None:
    """A coded linear gives what rounding by bits gives of inputs, weights and output, bias added after; then as before.

    Of outputs next to a tie another order of sums may take the other neighbour: 1 in 256 apart, and few.
    """
    name = next(name for name in coded_linears(model, artifact, VL).values() if name.endswith("q_proj"))
    linear: Any = model.get_submodule(name)
    inputs = torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = linear(inputs)
        with coded_in_bfloat16(model, artifact, VL):
            found = linear(inputs)
        assert torch.equal(linear(inputs), plain)
        weight, bias = linear.weight.numpy(), linear.bias.numpy()
    product = in_bits(inputs.numpy()).astype(np.float64) @ in_bits(weight).astype(np.float64).T
    expected = in_bits(product) + bias
    assert bias.any()
    apart = found.numpy() != expected
    assert apart.mean() < 0.01
    assert np.allclose(found, expected, rtol=0, atol=np.abs(product).max() / 256)
    assert not np.allclose(found, plain, rtol=0, atol=1e-4)


def test_as_bitsandbytes(artifact: Checkpoint, model: nn.Module) -> None:
    """It is bitsandbytes' own product of the stored codes, as vLLM asks for it."""
    library = pytest.importorskip("bitsandbytes", reason="pip install 'quantproof[bnb]'")
    name = coded_linears(model, artifact, VL)[LINEAR]
    linear: Any = model.get_submodule(name)
    codes, state = library.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    inputs = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), coded_in_bfloat16(model, artifact, VL):
        found = linear(inputs)
    theirs = library.matmul_4bit(inputs.to(torch.bfloat16), codes.t(), quant_state=state).float()
    assert torch.allclose(found, theirs, rtol=0, atol=2 * float(theirs.abs().max()) / 256)


def test_nothing_else_is_rounded(model: nn.Module, artifact: Checkpoint) -> None:
    """Linears that are stored as they were, the vision tower's and the head, compute as before."""
    coded = set(coded_linears(model, artifact, VL).values())
    others = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in coded]
    assert {"visual", "lm_head"} <= {part for name, _ in others for part in name.split(".")}
    assert len(coded) == 28
    for _, linear in others:
        inputs = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            plain = linear(inputs)
            with coded_in_bfloat16(model, artifact, VL):
                assert torch.equal(linear(inputs), plain)


def test_codes_of_no_linear_are_refused(artifact: Checkpoint) -> None:
    """Codes that the model has no linear for are named."""
    with pytest.raises(CheckpointError, match=r"has codes of .*which is no linear of the architecture"):
        coded_linears(nn.Sequential(nn.Linear(2, 2)), artifact, VL)


# -- the floor ---------------------------------------------------------------------------------------------------------


def floor_of(artifact: Checkpoint, exact: Any, noise: float = 1e-6) -> float:
    """The floor for text, where float16 and another order of sums make the noise."""
    return float(test_serving.floor.__wrapped__(lambda _: noise, artifact, VL, exact)("text"))


def test_floor_is_noise_and_arithmetic(artifact: Checkpoint, exact: Exact) -> None:
    """Of bitsandbytes the floor is the noise and the mean distance that bfloat16 makes, draw by draw; measured once."""
    draws = exact.in_bfloat16(artifact, VL, "text")
    moved = [kl(exact(artifact, VL, "text")[1], rounded) for rounded in draws]
    assert len(set(moved)) == len(DRAWS) > 1
    assert all(1e-6 < one < 1e-4 for one in moved)
    assert floor_of(artifact, exact, noise=1e-6) == pytest.approx(1e-6 + sum(moved) / len(moved))
    assert exact.in_bfloat16(artifact, VL, "text") is draws


@pytest.mark.parametrize("scale", DRAWS)
def test_draws_round_as_much_and_otherwise(model: nn.Module, artifact: Checkpoint, scale: float) -> None:
    """A draw's linears are off what they compute exactly by as much as vLLM's own rounding, elsewhere."""
    linear: Any = model.get_submodule(coded_linears(model, artifact, VL)[LINEAR])
    inputs = torch.randn(256, linear.in_features, generator=torch.Generator().manual_seed(0))
    found = []
    with torch.inference_mode():
        exactly = linear(inputs)
        for by in (1.0, scale):
            with coded_in_bfloat16(model, artifact, VL, by):
                found.append(linear(inputs) - exactly)
    own, drawn = (error.square().mean().sqrt() for error in found)
    assert float(drawn / own) == pytest.approx(1, abs=0.1)
    assert torch.equal(*found) == (scale == 1)


@pytest.mark.parametrize("layout", [AWQ_GEMM, BNB_4BIT, BNB_8BIT], ids=["awq", "4 bits", "8 bits"])
def test_whose_floor_is_higher(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute in float16, as AWQ's, get no floor but the noise."""
    monkeypatch.setattr(test_serving, "format_of", lambda _: layout)
    one, *draws = ([Taught("s", (0,), torch.tensor([[p, 1 - p]]).log())] for p in (0.6, 0.5, 0.6))
    exact = type("Two", (), {"__call__": lambda *_: ([], one), "in_bfloat16": staticmethod(lambda *_: draws)})()
    anything: Any = None
    assert floor_of(anything, exact) == pytest.approx(1e-6 + (0 if layout is AWQ_GEMM else kl(one, draws[0]) / 2))
    draws.append([Taught("s", (0,), torch.tensor([[math.nan, math.nan]]))])
    assert math.isnan(floor_of(anything, exact)) == (layout is not AWQ_GEMM), "not lost among the others"


@pytest.mark.parametrize(
    ("layout", "quantizer", "as_of"),
    [
        (AWQ_GEMM, "awq", "awq"),
        (AWQ_GEMM, "rtn", "rtn"),
        (BNB_4BIT, "bnb-nf4", "bnb-nf4"),
        (BNB_4BIT, "bitsandbytes_artifact", "bnb-nf4"),
        (BNB_8BIT, "bitsandbytes_artifact", "bnb-int8"),
    ],
)
def test_whose_limit_is_which(
    layout: Any, quantizer: str, as_of: str, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's own 4 bits are held to what ours are; only LLM.int8(), which rounds activations, is not."""
    monkeypatch.setattr(test_serving, "format_of", lambda _: layout)
    target = Target("qwen2_5_vl", "tiny", quantizer)
    for modality in ("text", "video"):
        found = test_serving.most_of_kernels.__wrapped__(None, target, modality, selection.limits)
        assert found == selection.limits("serving.of_kernels", as_of, modality)


@pytest.fixture
def scaled(exact: Exact, artifact: Checkpoint) -> Iterator[Callable[[float], list[Taught]]]:
    """What is said when all absmax of one linear are off by a share, all linears coded computing in bfloat16."""
    engine = exact.engine(artifact, VL)
    weight: Any = engine.model.get_submodule(coded_linears(engine.model, artifact, VL)[LINEAR]).weight
    stored = weight.detach().clone()

    def off(share: float) -> list[Taught]:
        with torch.no_grad(), coded_in_bfloat16(engine.model, artifact, VL):
            weight.copy_(stored * (1 + share))
            return taught(engine, exact.samples("text"))

    yield off
    with torch.no_grad():
        weight.copy_(stored)


def test_a_linear_off_is_seen_above_bfloat16(
    artifact: Checkpoint, exact: Exact, selection: Selection, scaled: Callable[[float], list[Taught]]
) -> None:
    """Computing in bfloat16 holds; with the scales of one linear a tenth off it does not."""
    most = selection.limits("serving.of_kernels", "bnb-nf4", "text") * floor_of(artifact, exact)
    said = exact(artifact, VL, "text")[1]
    assert kl(said, scaled(0.0)) < most
    assert kl(said, scaled(0.1)) > most
