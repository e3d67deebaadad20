"""How questions reach an engine and answers come back: offline, by transformers, and with faults."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.core.checkpoint import Checkpoint
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines import kernels, offline, saying
from fixtures.engines.decoded import write_decoded
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import load_processor
from fixtures.engines.offline import Batch, Recorded
from fixtures.engines.offline_worker import as_vllm_takes_it, taught
from fixtures.engines.process import EngineError
from fixtures.engines.replies import Taught
from fixtures.engines.server import Serving
from fixtures.engines.vllm_logs import Started
from fixtures.faults.editing import copied, edit_tensor
from fixtures.formats import AWQ_GEMM
from fixtures.meters import nvml
from fixtures.options import SELECTION, Selection
from fixtures.serving_under_test import applicable, artifact_recorded, pytest_collection_modifyitems
from fixtures.subjects.samples import draw
from suites import test_serving
from suites.meta.answering import listener

# -- offline ---------------------------------------------------------------------------------------------------------

WORKER = """
import json, sys, pathlib
import numpy as np
folder, fault = pathlib.Path(sys.argv[2]), sys.argv[1]
batches = json.loads((folder / "prompts.json").read_text())
print("GPU KV cache size: 1,000 tokens", flush=True)
if fault == "dies":
    print("ValueError: no such layer", flush=True)
    sys.exit(1)
if fault == "hangs":
    import time
    time.sleep(600)
replies = {}
for batch in batches:
    some = batch["prompts"][1:] if fault == "leaves one out" else batch["prompts"]
    replies[batch["name"]] = [{"prompt": [1], "said": [2], "top": [[[2, -0.1]]]} for _ in some]
    if batch["taught"]:
        np.savez(folder / (batch["name"] + ".npz"), **{str(n): np.zeros((2, 4), np.float32) for n in range(len(some))})
(folder / "done.json").write_text(json.dumps({"seconds": 1.0, "batches": replies}))
"""


def run_offline(reference: Checkpoint, folder: Path, fault: str, within: float = 60) -> Recorded:
    """An offline run by a stand-in for the worker."""
    samples = tuple(draw("text", "evaluation", 2))
    batches = [Batch("text", samples), Batch("text-taught", samples, taught=True)]
    script = folder / "worker.py"
    script.write_text(WORKER)
    worker = (sys.executable, str(script), fault)
    return offline.run(reference, Serving(), batches, folder / fault, worker=worker, within=within)


def test_offline_run(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """What the worker replied comes back by batch and sample, with what its log says of the start."""
    recorded = run_offline(tiny_reference, tmp_path, "none")
    assert [r.said for r in recorded.greedy["text"]] == [(2,), (2,)]
    assert recorded.taught["text-taught"][0].logprobs.shape == (2, 4)
    assert recorded.started.kv_tokens == 1000


@pytest.mark.parametrize(
    ("fault", "says"),
    [("dies", "no such layer"), ("hangs", "not done after"), ("leaves one out", "1 replies to 2 prompts")],
)
def test_failed_offline_run(tiny_reference: Checkpoint, tmp_path: Path, fault: str, says: str) -> None:
    """A worker that dies, hangs or leaves a prompt out is an error that says so."""
    with pytest.raises(EngineError, match=says):
        run_offline(tiny_reference, tmp_path, fault, within=2.0 if fault == "hangs" else 60)


@pytest.mark.parametrize("modality", ["text", "image", "video"])
def test_prompts_are_transformers(tiny_reference: Checkpoint, tmp_path: Path, modality: str) -> None:
    """What the worker is given is the text and the media that transformers' processor reads, told the same of them."""
    sample = draw(modality, "evaluation", 1)[0]
    offline.write_prompts(tiny_reference, [Batch("b", (sample,), taught=True)], tmp_path)
    (prompt,) = json.loads((tmp_path / "prompts.json").read_text())[0]["prompts"]
    taken = as_vllm_takes_it(prompt, np.load(tmp_path / "media.npz"))
    processor = load_processor(tiny_reference)
    media = taken.get("multi_modal_data", {})
    given = {f"{kind}s": items for kind, items in media.items()}
    inputs = processor(text=[taken["prompt"]], **given, **taken.get("mm_processor_kwargs", {}), return_tensors="pt")
    (wanted,) = offline.prompt_tokens(tiny_reference, [sample], with_answer=True)
    assert tuple(inputs["input_ids"][0].tolist()) == wanted
    answer = processor.tokenizer(sample.answer + "<|im_end|>")["input_ids"]
    assert prompt["answer_tokens"] == len(answer)
    assert list(wanted[-len(answer) :]) == answer


def test_distributions_of_the_answer() -> None:
    """Of a prompt's logprobs the answer's are kept, by token; one that was left out is NaN, not 0."""

    class Flat(SimpleNamespace):
        def __len__(self) -> int:
            return 3

    flat = Flat(
        start_indices=[0, 0, 3],
        end_indices=[0, 3, 5],
        token_ids=[2, 0, 2, 0, 2],
        logprobs=[-1.0, -2.0, -1.0, -3.0, -4.0],
    )
    rows = taught(SimpleNamespace(prompt_logprobs=flat), 2)
    assert rows.shape == (2, 3)
    assert rows[:, 0].tolist() == [-2.0, -3.0]
    assert np.isnan(rows[:, 1]).all()
    assert rows[:, 2].tolist() == [-1.0, -4.0]


# -- transformers' side ----------------------------------------------------------------------------------------------


def test_transformers_replies(tiny_reference: Checkpoint) -> None:
    """Transformers' replies are its greedy answers, each token the likeliest of those told beside it."""
    samples = draw("image", "evaluation", 2)
    engine = TransformersEngine(tiny_reference, _vl(), torch.float32)
    said = saying.replies(engine, samples, 24)
    assert [list(one.said) for one in said] == engine.greedy(samples)
    assert all(
        max(top, key=top.__getitem__) == token for one in said for top, token in zip(one.top, one.said, strict=True)
    )
    assert [one.prompt for one in said] == offline.prompt_tokens(tiny_reference, samples, with_answer=False)
    (first, _) = saying.taught(engine, samples)
    assert first.logprobs.logsumexp(-1).abs().max() < 1e-4


def _vl() -> Any:
    from fixtures.adapters import ADAPTERS

    return ADAPTERS["qwen2_5_vl"]


def test_decoded_checkpoint(good_artifact: Path, tmp_path: Path) -> None:
    """The decoded artifact is a float16 reference with the artifact's weights and side files, answering as it does."""
    artifact = Checkpoint(good_artifact)
    decoded = write_decoded(artifact, tmp_path / "decoded")
    assert decoded.quantization is None
    assert {info.dtype for info in decoded.tensors.values()} == {"F16"}
    samples: list[Sample] = draw("text", "evaluation", 4)
    one, other = (
        saying.taught(TransformersEngine(checkpoint, _vl(), torch.float32), samples)
        for checkpoint in (artifact, decoded)
    )
    assert test_serving.kl(one, other) < 1e-5


TEXTS = 8


def in_both_types(checkpoint: Checkpoint) -> dict[str, list[Taught]]:
    """What a checkpoint says of a few texts in float16, as "eager", and in bfloat16."""
    types = {"eager": torch.float16, "bfloat16": torch.bfloat16}
    samples = draw("text", "evaluation", TEXTS)
    return {name: saying.taught(TransformersEngine(checkpoint, _vl(), dtype), samples) for name, dtype in types.items()}


def test_bfloat16_of_real_checkpoints(
    tiny_reference: Checkpoint, good_artifact: Path, selection: Selection, tmp_path: Path
) -> None:
    """A real artifact holds in bfloat16, with transformers for an engine; scales that are off there alone do not.

    Nor does an artifact in its reference's place, or a reference in the artifact's.
    """
    good, samples = Checkpoint(good_artifact), draw("text", "evaluation", TEXTS)
    damaged = copied(good_artifact, tmp_path / "damaged")
    for name in AWQ_GEMM.quantized(good.tensors):
        edit_tensor(damaged, f"{name}.scales", lambda scales: scales * 1.1)
    reference, artifact, off = map(in_both_types, (tiny_reference, good, Checkpoint(damaged)))
    exactly = {
        name: saying.taught(TransformersEngine(checkpoint, _vl(), torch.float32), samples)
        for name, checkpoint in (("reference", tiny_reference), ("artifact", good))
    }

    def failing(reference: Mapping[str, list[Taught]], artifact: Mapping[str, list[Taught]]) -> list[str]:
        verify = listener()
        recorded = [
            lambda name, said=said: Recorded(Started(1.0, (1,), 1, (), name), {}, {"text-taught": said[name]})
            for said in (artifact, reference)
        ]
        test_serving.test_kl_in_bfloat16(
            *recorded,
            "artifact",
            "reference",
            None,
            lambda checkpoint, *_: ([], exactly[checkpoint]),
            Target("qwen2_5_vl", "tiny", "awq"),
            "text",
            selection.limits,
            verify,
        )
        return [m.quantity.partition(",")[0] for m in verify.measurements if m.bound and not m.holds]

    assert failing(reference, artifact) == []
    assert failing(reference, {**artifact, "bfloat16": off["bfloat16"]}) == ["KL of bfloat16 to float16"]
    assert failing(reference, reference) == ["distance to the reference in bfloat16"]
    assert failing(artifact, artifact) == ["distance to the reference in bfloat16"]


# -- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "chosen", "served"),
    [
        (Target("qwen2_5_vl", "tiny", "awq"), False, True),
        (Target("qwen2_5_vl", "tiny", "bnb-fp4"), False, False),
        (Target("qwen2_5_vl", "tiny", "bnb-fp4"), True, True),
        (Target("qwen2_5_vl", "tiny", "bnb-int8"), True, False),
        (Target("qwen2_5_vl", "tiny_untied", "awq"), False, False),
        (Target("qwen2_5_vl", "mine", "awq_artifact"), False, True),
        (None, False, True),
    ],
)
def test_targets_that_are_served(subject: Target | None, chosen: bool, served: bool) -> None:
    """One target of each kind is served, any that the user chose, and none whose kernel is no dequantization."""
    assert applicable(subject, chosen) == served


@pytest.mark.parametrize("gpus", [1, 2])
def test_bitsandbytes_is_not_spread(gpus: int) -> None:
    """Over several GPUs no check that vLLM is started for is collected of bitsandbytes: it refuses to load that."""

    def item(quantizer: str, *fixtures: str, marker: str = "") -> Any:
        return SimpleNamespace(
            callspec=SimpleNamespace(params={"target": Target("qwen2_5_vl", "3b", quantizer)}),
            fixturenames=[*fixtures, "target", "verify"],
            get_closest_marker=lambda name: name if name == marker else None,
        )

    kept = [item("rtn", "served"), item("rtn", "contest"), item("bnb-nf4", "memory"), item("bnb-nf4")]
    refused = [
        item("bnb-nf4", "served"),
        item("bitsandbytes_artifact", "contest"),
        item("bnb-nf4", marker="served"),
    ]
    items = [*kept, *refused]
    selection = SimpleNamespace(tensor_parallel=gpus)
    config: Any = SimpleNamespace(stash={SELECTION: selection}, option=SimpleNamespace(quantizer=["bnb-nf4"]))
    pytest_collection_modifyitems(config, items)
    assert items == ([*kept, *refused] if gpus == 1 else kept)


@pytest.mark.parametrize(
    ("own", "takes", "begun"),
    [(("machete",), True, 0), (("marlin",), True, 1), (("machete", "marlin"), True, 1), (("marlin",), False, None)],
)
def test_machete_is_forced_where_it_was_not_chosen(
    own: tuple[str, ...], takes: bool, begun: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run by Machete is vLLM's own where it chose that alone; else it is forced, or skipped where it cannot be."""
    started: list[str] = []
    known = {name: SimpleNamespace(name=name, checkpoint=None) for name in ("eager", "machete")}
    runs = SimpleNamespace(
        recorded=lambda condition: SimpleNamespace(started=SimpleNamespace(kernels=own), name=condition.name),
        begin=lambda conditions, asked: started.extend(one.name for one in conditions),
    )
    subjects = SimpleNamespace(of_artifact=lambda _: known, asked=lambda *_: [])
    monkeypatch.setattr(nvml, "capability", lambda: (9, 0))
    monkeypatch.setattr(kernels, "why_not_machete", lambda *_: "" if takes else "q_proj has 32 inputs")
    recorded = artifact_recorded.__wrapped__(runs, subjects, None, None)
    if begun is None:
        with pytest.raises(pytest.skip.Exception, match="no Machete here: q_proj has 32 inputs"):
            recorded("machete")
    else:
        assert recorded("machete").name == ("machete" if begun else "eager")
    assert started == ["machete"] * (begun or 0)
    assert recorded("eager").name == "eager"
