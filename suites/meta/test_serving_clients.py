"""What clients send to a server of vLLM, good and bad, and what it does when they leave: tried on a stand-in."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixtures.adapters import adapter_for
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.engines import offline
from fixtures.engines.bad_requests import Refusal, bad_requests, lost_bytes, message_of, refused
from fixtures.engines.chat import ask, reply_of
from fixtures.engines.hanging_up import (
    LONG,
    READ,
    UNFINISHED,
    HungUp,
    Load,
    hang_up,
    let_go,
    load_of,
    metric,
    streamed,
)
from fixtures.engines.loading import load_processor
from fixtures.engines.process import EngineError
from fixtures.engines.requests import audio_url, chat_request, video_url
from fixtures.engines.server import Server, Serving, start_server
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites.meta import fake_vllm

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
    hearing = bad_requests(server, sample, processor, images=4, hears=True)
    assert set(deaf) - set(hearing) == {"sound to a model without ears"}
    assert set(hearing) - set(deaf) == {"image for sound", "sound for an image"}
    assert len(deaf) == 10
    picture, sound = (hearing[kind]["messages"][0]["content"][0] for kind in ("image for sound", "sound for an image"))
    assert picture["audio_url"]["url"].startswith("data:image/png;base64,")
    Image.open(io.BytesIO(_bytes_of(picture["audio_url"]["url"]))).load()  # a good one, in the wrong place
    with pytest.raises(OSError):
        Image.open(io.BytesIO(_bytes_of(sound["image_url"]["url"]))).load()
    assert _bytes_of(sound["image_url"]["url"])[:4] == b"RIFF"
    shown = [part["type"] for part in deaf["too many images"]["messages"][0]["content"]]
    assert shown.count("image_url") == 5
    with pytest.raises(OSError):
        Image.open(io.BytesIO(_bytes_of(deaf["corrupt image"]["messages"][0]["content"][0]["image_url"]["url"]))).load()


def _bytes_of(url: str) -> bytes:
    data = url.partition(",")[2]
    return base64.b64decode(data + "=" * (-len(data) % 4))


GOOD = {"model": "fake", "max_tokens": 8}


def test_hanging_up(fake: Callable[[str], Server]) -> None:
    """A client hangs up on an answer that goes on; the server lets go of it, serves on, and computes no more of it."""
    server = fake("none")
    idle = let_go(server)
    assert idle == Load(0, 0, 0)
    with streamed(server, {**GOOD, **UNFINISHED}) as found:
        assert (found, load_of(server).held) == (HungUp(200, READ, ""), 1)
        assert let_go(server, within=0.2).held == 1  # as long as it is listened to
    assert hang_up(server, GOOD).mid_stream
    gone = let_go(server)
    assert gone.held == 0
    assert 2 * READ <= gone.generated < LONG
    assert server.alive()
    server._process.close()
    with pytest.raises(EngineError, match="does not stream"):
        hang_up(server, GOOD)
    with pytest.raises(EngineError, match="shows no metrics"):
        load_of(server)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("answers 500", "500, 0 pieces, {"),
        ("streams no words", "200, 0 pieces, ended by length"),
        ("ends by itself", "200, 6 pieces, ended by length"),
        ("breaks off", "200, 2 pieces, the stream broke off"),
        ("fails in the stream", "200, 2 pieces, no piece of an answer"),
        ("accepts anything", "200, 0 pieces, the stream broke off"),
    ],
)
def test_hanging_up_on_nothing_is_seen(fake: Callable[[str], Server], fault: str, found: str) -> None:
    """An answer that never came, had no words or was over is no stream that a client hung up on."""
    asked = {**GOOD, "model": "another"} if fault == "accepts anything" else GOOD
    left = hang_up(fake(fault), asked)
    assert not left.mid_stream
    assert str(left).startswith(found)


def test_servers_that_go_on_for_nobody_are_seen(fake: Callable[[str], Server]) -> None:
    """What is computed for clients that are gone stands in its gauges or in its tokens; neither may be missing."""
    server = fake("computes on")
    assert hang_up(server, GOOD).mid_stream
    assert let_go(server, within=0.5).held == 1
    server = fake("answers on")
    assert hang_up(server, GOOD).mid_stream
    assert (gone := let_go(server)).held == 0
    assert gone.generated == LONG
    mute = let_go(fake("has no metrics"), within=0.1)
    assert math.isnan(mute.held)
    assert math.isnan(mute.generated)


def test_metrics_are_read() -> None:
    """A metric is summed over its labels, found by its whole name, and no number where it is not there or is none."""
    text = '# HELP a some\na{x="1 2"} 1.5\na{x="3"} 2\na_more 9\nb 1e3\nc{} what\n'
    assert (metric(text, "a"), metric(text, "b")) == (3.5, 1000.0)
    assert all(math.isnan(metric(text, name)) for name in ("c", "d", "a_", ""))


def test_long_answers_fit(tiny_reference: Checkpoint) -> None:
    """What is asked for before hanging up fits a shipped model beside the picture that it is asked about."""
    for reference in (tiny_reference, Checkpoint(shipped("qwen2_5_omni-tiny"))):
        (prompt,) = offline.prompt_tokens(reference, draw("image", "evaluation", 1), with_answer=False)
        length = adapter_for(reference).text_config(reference.config)["max_position_embeddings"]
        assert len(prompt) + LONG <= length


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
