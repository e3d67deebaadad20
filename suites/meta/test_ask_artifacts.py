"""Asking artifacts by hand: each runs in the best way there is and says which; two are compared token by token."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint, TensorInfo
from fixtures.engines import ways
from fixtures.engines.__main__ import difference, main, ratio, speed
from fixtures.engines.asking import Told
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import compute_dtype, runs_by_library
from fixtures.engines.ways import way_to_run
from fixtures.faults.awq_codes import all_scales_off
from fixtures.faults.editing import copied
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites.meta.asked_by_hand import greedy

VL = ADAPTERS["qwen2_5_vl"]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ's library is not looked for: the weights are decoded by us."""
    monkeypatch.setattr(ways, "runs_by_library", lambda _: False)


# How one runs


def test_says_how_an_artifact_runs(
    good_artifact: Path, tiny_reference: Checkpoint, decoded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """An artifact whose library is not used says that our dequantization decoded it; a reference does not."""
    for folder, said in ((good_artifact, True), (tiny_reference.path, False)):
        assert main(["ask", "--model", str(folder), "--device", "cpu", "Add 1 to 1234 and tell of a cat."]) == 0
        err = capsys.readouterr().err
        assert ("decoded by our reference dequantization" in err) is said
        assert ("awq 4-bit g128" in err) is said


def test_library_of_an_artifact(good_artifact: Path, tiny_reference: Checkpoint) -> None:
    """A reference needs no library; an artifact runs by its own exactly where that is installed."""
    assert not runs_by_library(tiny_reference)
    assert runs_by_library(Checkpoint(good_artifact)) is (find_spec("gptqmodel") is not None)


def test_answers_by_the_librarys_kernels(
    tiny_reference: Checkpoint, selection: Selection, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bitsandbytes artifact answers as its library's modules do, and names them."""
    pytest.importorskip("bitsandbytes", reason='bitsandbytes is absent: pip install "quantproof[bnb]"')
    artifact = Checkpoint(cached_artifact(tiny_reference, recipe_for("bnb-nf4", None), [], selection.cache))
    (sample,) = draw("text", "evaluation", 1)
    tokens, text = greedy(TransformersEngine(artifact, VL, torch.bfloat16, kernels=True), sample)
    prompt, count = sample.content[0]["text"], str(len(tokens))
    assert main(["ask", "--model", str(artifact.path), "--device", "cpu", "--max-new-tokens", count, prompt]) == 0
    out, err = capsys.readouterr()
    assert out == f"{text}\n"
    assert "the library's kernels (Linear4bit)" in err


def test_best_way_of_awq(good_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ runs by GPTQModel's kernels, else packed by AutoAWQ's on a GPU, else decoded; on GPUs packed in float16."""
    artifact = Checkpoint(good_artifact)
    for gptqmodel, autoawq, device, load, dtype in (
        (True, True, "cuda", ways.load_by_transformers, torch.float16),
        (True, True, "cpu", ways.load_by_transformers, torch.float32),
        (False, True, "cuda", ways.load_packed, torch.float16),
        (False, True, "cpu", ways.load_model, torch.float32),
        (False, False, "cuda", ways.load_model, torch.float32),
    ):
        monkeypatch.setattr(ways, "runs_by_library", lambda _, there=gptqmodel: there)
        monkeypatch.setattr(ways, "_has_autoawq", lambda there=autoawq: there)
        way = way_to_run(artifact, device)
        assert (way.load, way.dtype) == (load, dtype)


def test_sixteen_bits_on_a_gpu() -> None:
    """A large checkpoint computes in 16 bits on a GPU, an artifact of mostly integer tensors too; on a CPU in 32."""

    def computed(device: str, **tensors: tuple[str, int]) -> torch.dtype:
        infos = {name: TensorInfo(dtype, (count,), "model.safetensors") for name, (dtype, count) in tensors.items()}
        checkpoint = Checkpoint(shipped("qwen2_5_vl-tiny"))
        checkpoint.tensors = infos
        return compute_dtype(checkpoint, device)

    codes = {f"codes{number}": ("I32", 10**9) for number in range(3)}
    awq = {**codes, "scales": ("F16", 10**7), "embedding": ("BF16", 10**8)}
    assert computed("cuda", **awq) == torch.bfloat16
    assert computed("cpu", **awq) == torch.float32
    assert computed("cuda", codes=("U8", 10**10), absmax=("F32", 10**6), head=("F16", 10**8)) == torch.float16
    assert computed("cuda", weights=("BF16", 10**6)) == torch.float32  # small: exact


# Two answers


def test_compares_two(
    tiny_reference: Checkpoint,
    good_artifact: Path,
    tmp_path: Path,
    decoded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``--compare`` shows both answers, and names the first token at which a damaged artifact leaves the good one."""
    broken = copied(good_artifact, tmp_path / "broken")
    all_scales_off(4.0)(broken)
    good, bad = (TransformersEngine(Checkpoint(folder), VL, torch.float32) for folder in (good_artifact, broken))
    for sample in draw("text", "evaluation", 8):
        (left, left_text), (right, right_text) = greedy(good, sample), greedy(bad, sample)
        if left != right:
            break
    place = next(n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    prompt = sample.content[0]["text"]
    count = str(min(len(left), len(right)))  # the engine cuts what does not end
    arguments = ["ask", "--model", str(good_artifact), "--device", "cpu", "--max-new-tokens", count, prompt]
    assert main([*arguments, "--compare", str(broken)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0::2][:2] == [f"== {good_artifact.name}", "== broken"]
    assert left_text.startswith(lines[1])
    assert right_text.startswith(lines[3])
    decode = good.processor.tokenizer.decode
    assert lines[4] == (
        f"first different at token {place + 1}: {decode([left[place]])!r} and {decode([right[place]])!r}; "
        f"same before it: {place}"
    )
    assert err.count("tokens/s, first token") == 2
    assert "of the first's speed" in err

    assert main([*arguments, "--compare", str(copied(good_artifact, tmp_path / "same"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"the same, all {count} tokens"


def test_says_where_answers_part() -> None:
    """The first difference is that of tokens, even where one answer begins with the other; speeds are compared."""
    told = {
        name: Told("", tokens, 9, 0.5, seconds)
        for name, tokens, seconds in (("a", (7, 8, 9), 1.0), ("longer", (7, 8, 9, 4), 6.0), ("other", (7, 1, 9), 1.0))
    }
    tokenizer = SimpleNamespace(decode=lambda tokens: f"<{tokens[0]}>")
    assert difference(told["a"], told["a"], tokenizer) == "the same, all 3 tokens"
    assert difference(told["a"], told["other"], tokenizer).startswith("first different at token 2: '<8>' and '<1>'")
    assert difference(told["longer"], told["a"], tokenizer).startswith("first different at token 4: '<4>' and nothing")
    assert ratio(told["a"], told["longer"]) == "2 and 0.5 tokens/s: 0.25 of the first's speed"
    alone = Told("", (7,), 9, 0.5, 0.0)
    assert math.isnan(alone.tokens_per_second)
    assert "too short" in speed(alone)
    assert "too short" in ratio(told["a"], alone)
