"""What the serving checks must see: planted in replies, distributions, refusals and runs, and asked of the checks."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fixtures.chosen import Selection
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines import offline, saying
from fixtures.engines.bad_requests import Refusal, bad_requests, hang_up, lost_bytes, message_of, refused
from fixtures.engines.chat import ask, reply_of
from fixtures.engines.decoded import write_decoded
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import load_processor
from fixtures.engines.offline import Batch, Recorded
from fixtures.engines.offline_worker import as_vllm_takes_it, taught
from fixtures.engines.process import EngineError
from fixtures.engines.replies import Reply, Taught, compare, paired
from fixtures.engines.requests import audio_url, chat_request, video_url
from fixtures.engines.server import Server, Serving, start_server
from fixtures.engines.vllm_logs import Started
from fixtures.serving_under_test import applicable
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify
from suites import test_serving
from suites.meta import fake_vllm
from suites.meta.answering import listener

END = 9
TOP: dict[int, float] = {1: -0.7, 2: -0.8, 3: -2.0, 4: -3.0, 5: -4.0}


def reply(*said: int, prompt: tuple[int, ...] = (0,), top: dict[int, float] | None = None, sample: str = "s") -> Reply:
    """A reply whose tokens were all among a few likely ones."""
    return Reply(sample, prompt, said, tuple({END: -0.9, **(TOP if top is None else top)} for _ in said))


# -- greedy answers --------------------------------------------------------------------------------------------------


def test_same_answers() -> None:
    """Answers that are the same are the same, every token counted."""
    compared = compare([reply(1, 2, END)], [reply(1, 2, END)])
    assert (compared.same, compared.tokens, compared.unexcused, compared.same_share) == (1, 3, [], 1.0)


def test_near_tie_is_excused() -> None:
    """Where both find the other's token likely, the first difference is a near tie, told with how near."""
    compared = compare([reply(1, 2, END)], [reply(2, 4, 4, END)])
    assert compared.unexcused == []
    assert (compared.same, compared.tokens) == (0, 1)
    assert compared.divergences[0].gap == pytest.approx(0.1)
    assert "0.100 nats apart" in str(compared.divergences[0])


UNKNOWN = {7: -0.1, 11: -3.0, 12: -3.1, 13: -3.2, 14: -3.3, 15: -3.4}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (reply(1, END), reply(7, END, top=UNKNOWN)),  # a wrong token that the one does not know
        (reply(1, 2, END), reply(1, 2)),  # cut before its end of turn
        (reply(1, 2, END), reply()),  # empty
        (reply(), reply()),  # both empty
        (reply(1, END), reply(2, END, top={**TOP, 2: math.nan})),  # no number
        (reply(1, END), reply(6, END, top={**TOP, 6: -5.0})),  # sixth of the other's own
        (reply(1, END), reply(1, END, prompt=(1,))),  # another prompt
    ],
    ids=["unknown token", "cut short", "empty", "both empty", "NaN", "sixth", "other prompt"],
)
def test_other_answers_are_seen(one: Reply, other: Reply) -> None:
    """A difference that no rounding explains is seen from either side, and never counts as the same."""
    for pair in ((one, other), (other, one)):
        compared = compare(*([reply] for reply in pair))
        assert len(compared.unexcused) == 1
        assert compared.same == 0


def test_nothing_compared_is_nothing() -> None:
    """Without answers there is no share of same ones, and answers to other samples are never compared."""
    assert math.isnan(compare([], []).same_share)
    with pytest.raises(ValueError, match="not to the same samples"):
        compare([reply(1)], [])
    with pytest.raises(ValueError, match="not to the same samples"):
        compare([reply(1)], [reply(1, sample="another")])


# -- the checks, on recordings that are damaged ----------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS = torch.randn(200, 32, generator=GENERATOR).log_softmax(-1)


def moved(by: float) -> Tensor:
    """The distributions, moved a little."""
    return (LOGPROBS + by * torch.randn(LOGPROBS.shape, generator=torch.Generator().manual_seed(1))).log_softmax(-1)


NOISE = test_serving.kl([Taught("s", (0,), LOGPROBS)], [Taught("s", (0,), moved(1e-3))])


def recording(
    logprobs: Tensor, said: tuple[int, ...] = (1, 2, END), kernels: tuple[str, ...] = ("marlin",)
) -> Recorded:
    """What an engine is said to have replied."""
    answers = [reply(*said, sample=f"s{number}") for number in range(40)]
    return Recorded(Started(1.0, 1, 1, kernels), {"text": answers}, {"text-taught": [Taught("s", (0,), logprobs)]})


def said_by(check: Callable[..., None], selection: Selection, **given: Any) -> Verify:
    """What a check of the suite says of recordings."""
    verify = listener()
    target = Target("qwen2_5_vl", "tiny", "awq")
    known = {"limits": selection.limits, "modality": "text", "noise": lambda _: NOISE, "target": target}
    available = {"verify": verify, **known, **given}
    check(**{name: available[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    return verify


def held(verify: Verify) -> bool:
    """Whether all that was judged holds, and something was."""
    return not verify.conclude()


OTHERS: dict[str, Recorded] = {
    "a layer's scales off": recording(moved(0.05)),
    "NaN": recording(torch.full_like(LOGPROBS, math.nan)),
    "one NaN": recording(LOGPROBS.clone().index_fill(0, torch.tensor([7]), math.nan)),
    "nothing": Recorded(Started(1.0, 1, 1, ("marlin",)), {"text": []}, {"text-taught": []}),
}


@pytest.mark.parametrize("fault", [None, "a layer's scales off", "NaN", "one NaN"])
@pytest.mark.parametrize(
    "check", [test_serving.test_kernel_computes_what_is_stored, test_serving.test_graphs_are_eager]
)
def test_moved_distributions_are_seen(check: Callable[..., None], fault: str | None, selection: Selection) -> None:
    """A kernel or a graph that computes something else, or no number, does not hold; rounding does."""
    good, other = recording(LOGPROBS), OTHERS[fault] if fault else recording(moved(1e-3))
    recorded = {"decoded": good, "eager": other if check.__name__.endswith("stored") else good, "graphs": other}
    assert held(said_by(check, selection, artifact_recorded=recorded.__getitem__)) == (fault is None)


@pytest.mark.parametrize(("floor", "holds"), [(NOISE, True), (1e-2, False), (math.nan, False), (0.0, False)])
def test_a_floor_that_excuses_anything_is_seen(floor: float, holds: bool, selection: Selection) -> None:
    """A noise floor that is high, no number or nothing does not hold: all would be within it."""
    recorded = {"decoded": recording(LOGPROBS), "eager": recording(moved(1e-3))}
    check = test_serving.test_kernel_computes_what_is_stored
    said = said_by(check, selection, artifact_recorded=recorded.__getitem__, noise=lambda _: floor)
    assert held(said) == holds


FLOORS = {"reference in float32": 0, "artifact in float32": 1, "reference, eager": 2, "graphs": 3, "decoded": 4}


@pytest.mark.parametrize("broken", [None, *FLOORS])
def test_noise_is_the_largest_of_what_moves_without_a_kernel(broken: str | None) -> None:
    """The floor is the largest of its three distances, and NaN in any of what it is made of is not lost."""
    logprobs = [LOGPROBS, LOGPROBS, moved(1e-3), moved(1e-3), moved(2e-3)]
    if broken:
        logprobs[FLOORS[broken]] = torch.full_like(LOGPROBS, math.nan)
    said = [recording(one) for one in logprobs]
    exact = {"reference": said[0], "artifact": said[1]}
    floor = test_serving.noise.__wrapped__(
        {"eager": said[2], "graphs": said[3]}.__getitem__,
        {"decoded": said[4]}.__getitem__,
        "reference",
        "artifact",
        None,
        lambda checkpoint, *_: ([], exact[checkpoint].taught["text-taught"]),
    )("text")
    if broken:
        assert math.isnan(floor)
    else:
        assert floor == test_serving.kl(said[1].taught["text-taught"], said[4].taught["text-taught"]) > NOISE


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        (recording(moved(1e-3)), True),
        (recording(moved(1e-3), kernels=("machete",)), False),  # what was forced was not used
        (recording(moved(1e-3), kernels=("marlin", "awq")), False),  # a fallback
        (recording(moved(1e-3), kernels=()), False),
        (recording(moved(0.05)), False),
    ],
)
def test_other_kernels_are_seen(other: Recorded, holds: bool, selection: Selection) -> None:
    """A kernel that was not the one asked for, or computes something else, does not hold."""
    recorded = {"eager": recording(LOGPROBS), "marlin": other}
    said = said_by(test_serving.test_kernels_agree, selection, artifact_recorded=recorded.__getitem__, kernel="marlin")
    assert held(said) == holds


@pytest.mark.parametrize(
    ("said", "holds"),
    [((1, 2, END), True), ((), False), ((1,), False), ((3, 2, END), False), ((7, 2, END), False)],
    ids=["same", "empty", "cut short", "near ties everywhere", "wrong"],
)
def test_other_answers_do_not_hold(said: tuple[int, ...], holds: bool, selection: Selection) -> None:
    """VLLM's answers must be transformers': empty, short, wrong ones are not, nor are near ties everywhere."""
    exact = recording(LOGPROBS).greedy["text"]
    verify = said_by(
        test_serving.test_answers_of_transformers,
        selection,
        artifact_recorded=lambda _: recording(LOGPROBS, said),
        artifact=None,
        adapter=None,
        exact=lambda *_: (exact, []),
    )
    assert held(verify) == holds


@pytest.mark.parametrize(("artifact", "holds"), [(moved(0.02), True), (moved(0.04), False), (moved(0.005), False)])
def test_serving_that_adds_to_the_error_is_seen(artifact: Tensor, holds: bool, selection: Selection) -> None:
    """An artifact that is further from FP16 when served than its weights are, or nearer, is not served as it is."""
    weights = {"reference": [Taught("s", (0,), LOGPROBS)], "artifact": [Taught("s", (0,), moved(0.02))]}
    verify = said_by(
        test_serving.test_kl_against_fp16,
        selection,
        artifact_recorded=lambda _: recording(artifact),
        reference_recorded=lambda _: recording(LOGPROBS),
        artifact="artifact",
        reference="reference",
        adapter=None,
        exact=lambda checkpoint, *_: ([], weights[checkpoint]),
    )
    assert held(verify) == holds


def test_other_shapes_are_never_compared() -> None:
    """Distributions over other tokens are an error: nothing is cut to fit."""
    one = Taught("s", (0, 1), LOGPROBS)
    for other in (replace(one, prompt=(0, 2)), replace(one, logprobs=LOGPROBS[:-1]), replace(one, sample="t")):
        with pytest.raises(ValueError, match="sample"):
            paired([one], [other])


# -- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tiny_reference: Checkpoint, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """A stand-in with a fault."""
    running = []

    def start(fault: str) -> Server:
        module = (sys.executable, fake_vllm.__file__, fault)
        server = start_server(tiny_reference, Serving(), tmp_path / fault, module=module)
        server.model = "fake"
        running.append(server)
        return server

    yield start
    for server in running:
        server.close()


@pytest.mark.parametrize("fault", ["none", "answers 500", "accepts anything", "dies when asked"])
def test_bad_answers_to_bad_requests(fake: Callable[[str], Server], fault: str) -> None:
    """Only a 4xx that says something is a refusal: no 5xx, no answer as if nothing were wrong, no end of the server."""
    server = fake(fault)
    bodies: dict[str, Any] = {"negative max_tokens": {"model": "fake", "max_tokens": -1}, "not JSON": b"{"}
    clean = [refused(server, kind, body).clean for kind, body in bodies.items()]
    assert clean == [fault == "none"] * 2
    assert server.alive() == (fault != "dies when asked")


def test_refusals() -> None:
    """An error's words are found in either layout; without words, or as a traceback, it is no clean one."""
    assert message_of({"error": {"message": "wrong"}}) == message_of({"message": "wrong"}) == "wrong"
    assert message_of("plain") == "plain"
    assert Refusal("k", 422, "wrong").clean
    assert not Refusal("k", 400, " ").clean
    assert not Refusal("k", 400, "Traceback (most recent call last): ...").clean
    assert not Refusal("k", 200, "fine").clean
    assert (lost_bytes(5, 3), lost_bytes(3, 5)) == (0, 2)


def test_every_bad_request_is_bad_in_one_way(fake: Callable[[str], Server], tiny_reference: Checkpoint) -> None:
    """Bad requests are good ones but for what they are called after; sound is one for a model without ears only."""
    processor, sample = load_processor(tiny_reference), draw("image", "evaluation", 1)[0]
    server = fake("none")
    deaf = bad_requests(server, sample, processor, images=4, hears=False)
    assert set(deaf) - set(bad_requests(server, sample, processor, images=4, hears=True)) == {
        "sound to a model without ears"
    }
    assert len(deaf) == 10
    shown = [part["type"] for part in deaf["too many images"]["messages"][0]["content"]]
    assert shown.count("image_url") == 5
    with pytest.raises(OSError):
        Image.open(io.BytesIO(_bytes_of(deaf["corrupt image"]["messages"][0]["content"][0]["image_url"]["url"]))).load()


def _bytes_of(url: str) -> bytes:
    data = url.partition(",")[2]
    return base64.b64decode(data + "=" * (-len(data) % 4))


def test_hanging_up(fake: Callable[[str], Server]) -> None:
    """A client that hangs up leaves the server serving; a server that does not stream is told."""
    server = fake("none")
    assert hang_up(server, {"model": "fake", "max_tokens": 1}) == 0
    assert server.alive()
    server._process.close()
    with pytest.raises(EngineError, match="does not stream"):
        hang_up(server, {"model": "fake", "max_tokens": 1})


def test_replies_of_a_server(fake: Callable[[str], Server], tiny_reference: Checkpoint) -> None:
    """A server's answer becomes a reply, tokens and logprobs; one that lacks any of it is told, never filled in."""
    sample = draw("text", "evaluation", 1)[0]
    said = ask(fake("none"), sample, load_processor(tiny_reference), 4)
    assert (said.prompt, said.said, said.top) == ((1, 2), (7,), ({7: -0.1},))
    with pytest.raises(EngineError, match="answers 500"):
        ask(fake("answers 500"), sample, load_processor(tiny_reference), 4)
    place = {"token": "token_id:7", "logprob": -0.1, "top_logprobs": []}
    good = {"prompt_token_ids": [1], "choices": [{"token_ids": [7], "logprobs": {"content": [place]}}]}
    assert reply_of("s", good).said == (7,)
    for broken in ({}, {"choices": []}, {**good, "prompt_token_ids": None}, {**good, "choices": [{"token_ids": [7]}]}):
        with pytest.raises(EngineError):
            reply_of("s", broken)
    good["choices"][0]["token_ids"] = [7, 8]  # type: ignore[index]
    with pytest.raises(EngineError, match="2 tokens with 1 logprobs"):
        reply_of("s", good)


# -- requests --------------------------------------------------------------------------------------------------------


def test_media_arrive_as_they_are(tiny_reference: Checkpoint) -> None:
    """Images, frames and sound in requests are what they were, bit for bit; a video brings its frames per second."""
    processor = load_processor(tiny_reference)
    video = draw("video", "evaluation", 1)[0]
    body = chat_request("m", video, processor, max_tokens=3)
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["video_url", "text"]
    (frames,) = video.media("video")
    head, *rest = (
        body["messages"][0]["content"][0]["video_url"]["url"].removeprefix("data:video/jpeg;base64,").split(",")
    )
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in (head, *rest)]
    assert np.array_equal(np.stack(decoded), frames)
    told = body["mm_processor_kwargs"]["videos_kwargs"]
    assert told["video_metadata"][0]["fps"] == 2.0
    assert not told["do_sample_frames"]
    assert video_url(frames) == body["messages"][0]["content"][0]["video_url"]["url"]
    assert "mm_processor_kwargs" not in chat_request("m", draw("image", "evaluation", 1)[0], processor, max_tokens=3)


def test_sound_arrives_as_it_is() -> None:
    """A WAV of floats holds every sample as it was, at its rate."""
    waveform = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    data = _bytes_of(audio_url(waveform, 16000))
    assert np.array_equal(np.frombuffer(data[-4000:], "<f4"), waveform)
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert int.from_bytes(data[24:28], "little") == 16000
    assert int.from_bytes(data[20:22], "little") == 3  # floats


def test_sound_is_refused_for_models_without_ears(tiny_reference: Checkpoint) -> None:
    """A sample that a model cannot take is refused before it is sent."""
    with pytest.raises(UserError, match="does not hear"):
        chat_request("m", draw("audio", "evaluation", 1)[0], load_processor(tiny_reference), max_tokens=3)


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
