"""The load generator counts what came, loses no failure, and keeps to its concurrency; no test depends on timing."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest

from fixtures.meters.events import EventStream, StreamError
from fixtures.meters.load import Request, Timing, load, pool_of, run
from suites.meta.scripted import HANG_UP, Answer, Scripted, chunk, ending, event, serving, whole

pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

MODEL = "scripted"


def asked(count: int, new_tokens: int = 3) -> list[Request]:
    """Requests that differ in their prompts."""
    return [
        Request("completions", {"prompt": [number], "max_tokens": new_tokens}, new_tokens) for number in range(count)
    ]


def streamed(answer: Answer, new_tokens: int = 3) -> Timing:
    """The timing of one streamed request that gets ``answer``."""
    with serving(lambda _: answer) as server:
        (timing,) = run(server.url, MODEL, asked(1, new_tokens), 1, stream=True)
    return timing


def good(_: dict[str, Any]) -> Answer:
    """Three tokens, one by one."""
    return Answer([chunk(1), chunk(2), chunk(3), ending(3)])


# End to end


def test_good_stream() -> None:
    """A good stream is counted token by token, in order of time, from arrival to end."""
    timing = streamed(good({}))
    assert timing.problem == ""
    assert [tokens for _, tokens in timing.chunks] == [1, 1, 1]
    assert (timing.prompt_tokens, timing.completion_tokens) == (3, 3)
    times = [timing.arrived, timing.sent, *(time for time, _ in timing.chunks), timing.done]
    assert times == sorted(times)
    assert timing.first_token == timing.chunks[0][0]


def test_body() -> None:
    """What is asked reaches the server, with the model's name and a count of tokens in every event of a stream."""
    with serving(good) as server:
        run(server.url, MODEL, asked(1), 1, stream=True)
        body = server.bodies[0]
    assert body == {
        "prompt": [0],
        "max_tokens": 3,
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def test_whole_answers() -> None:
    """Answers that are not streamed are counted by the server's count; when the first token came is not known."""
    with serving(lambda _: whole(3)) as server:
        timings = run(server.url, MODEL, asked(5), 2, stream=False)
    assert [timing.problem for timing in timings] == [""] * 5
    assert [timing.completion_tokens for timing in timings] == [3] * 5
    assert all(math.isnan(timing.first_token) for timing in timings)


@pytest.mark.parametrize(("count", "concurrency"), [(1, 1), (7, 1), (9, 3), (3, 8)])
def test_every_request_once(count: int, concurrency: int) -> None:
    """Every request is asked once, its timing stands where it stood, and no more are under way than allowed."""
    with serving(lambda body: whole(3, prompt=10 + body["prompt"][0])) as server:
        timings = run(server.url, MODEL, asked(count), concurrency, stream=False)
        most = server.most_under_way
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(count))
    assert [timing.prompt_tokens for timing in timings] == [10 + number for number in range(count)]
    assert most <= concurrency


def test_arriving_at_once() -> None:
    """Requests that arrive at once and are answered one by one have all arrived before the first was sent."""
    with serving(good) as server:
        timings = load(server.url, MODEL, asked(4), 1, stream=True, at_once=True).timings
        closed = run(server.url, MODEL, asked(4), 1, stream=True)
    assert len({timing.arrived for timing in timings}) == 1
    assert all(timing.arrived <= timing.sent for timing in timings)
    assert all(after.sent >= before.done for before, after in pairwise(timings))
    assert all(after.arrived >= before.done for before, after in pairwise(closed))


def test_several_processes() -> None:
    """Processes that share a load ask every request once, and give the timings in order, of one clock."""
    with serving(lambda body: whole(3, prompt=10 + body["prompt"][0])) as server, pool_of(2) as pool:
        loaded = load(server.url, MODEL, asked(5), 4, stream=False, pool=pool)
    assert [timing.prompt_tokens for timing in loaded.timings] == [10, 11, 12, 13, 14]
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(5))
    assert loaded.busy > 0


def test_no_concurrency() -> None:
    """A concurrency of none is refused: nothing would be asked, and nothing would fail."""
    with pytest.raises(ValueError, match="concurrency"):
        run("http://127.0.0.1:9/v1", MODEL, asked(1), 0, stream=False)


# Streams as they come


def test_several_tokens_in_a_chunk() -> None:
    """Tokens that come in one event are counted each, at the time of the event."""
    timing = streamed(Answer([chunk(1), chunk(4), chunk(6), ending(6)]), 6)
    assert timing.problem == ""
    assert [tokens for _, tokens in timing.chunks] == [1, 3, 2]


def test_several_events_at_once() -> None:
    """Events that arrive together count all their tokens."""
    timing = streamed(Answer([chunk(1) + chunk(2), chunk(3) + ending(3)]))
    assert timing.problem == ""
    assert [tokens for _, tokens in timing.chunks] == [2, 1]


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_cut_anywhere(cut: int) -> None:
    """Wherever the network cuts a stream, the tokens, the count and the end are the same."""
    data = chunk(1) + chunk(2) + ending(2)
    stream = EventStream()
    for now, piece in enumerate((data[:cut], data[cut:])):
        stream.feed(piece, float(now))
    assert (sum(tokens for _, tokens in stream.chunks), stream.ended, stream.uncounted) == (2, True, False)
    assert stream.usage is not None
    assert stream.usage["completion_tokens"] == 2


def test_first_event_without_tokens() -> None:
    """A chat's first event says who speaks; the first token is the one after it."""
    role = event({"choices": [{"delta": {"role": "assistant"}}], "usage": {"completion_tokens": 0}})
    stream = EventStream()
    stream.feed(role, 1.0)
    stream.feed(chunk(1), 2.0)
    assert stream.chunks == [(2.0, 1)]


@pytest.mark.parametrize(
    "text", ['"completion_tokens":99', "data: [DONE]", "\ndata: {", '"error"', '{"error": {"message": "no"}}', "error"]
)
def test_answers_that_look_like_events(text: str) -> None:
    """What the model says is never taken for the server's own words."""
    timing = streamed(Answer([chunk(1, text), chunk(2, text), chunk(3, text), ending(3)]))
    assert timing.problem == ""
    assert len(timing.chunks) == 3


# What goes wrong


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(Answer([b'{"error":"too long"}'], 400), "HTTP 400: {.error.:.too long.}", id="400"),
        pytest.param(Answer([b"oops"], 500), "HTTP 500: oops", id="500"),
        pytest.param(Answer([chunk(1), HANG_UP]), "RemoteProtocolError|ReadError", id="connection dropped"),
        pytest.param(Answer([HANG_UP]), "RemoteProtocolError|ReadError", id="connection dropped before a token"),
        pytest.param(Answer([chunk(1), chunk(2)]), "the stream broke off", id="half a stream"),
        pytest.param(Answer([]), "the stream broke off", id="empty stream"),
        pytest.param(Answer([chunk(1), chunk(2), ending(2)]), "2 tokens came of 3", id="a token short"),
        pytest.param(
            Answer([chunk(1), chunk(3), ending(4)]), "4 tokens came of 3", id="a token too many by the last count"
        ),
        pytest.param(
            Answer([chunk(1), event({"error": {"message": "out of memory"}}), b"data: [DONE]\n\n"]),
            "error in the stream: out of memory",
            id="error in the stream",
        ),
        pytest.param(Answer([b'data: {nonsense, "error"}\n\n']), "JSONDecodeError", id="no JSON"),
        pytest.param(
            Answer([event({"choices": [{"text": " a"}]})] * 3 + [b"data: [DONE]\n\n"]),
            "did not say how many tokens",
            id="no usage",
        ),
        pytest.param(
            Answer([event({"choices": [{"text": " a"}]})] * 3 + [ending(3)]),
            "does not count tokens in every event",
            id="usage at the end only",
        ),
    ],
)
def test_failures_are_kept(answer: Answer, said: str) -> None:
    """A request that fails, however it does, is a timing that says so: never one that is missing."""
    assert re.search(said, streamed(answer).problem)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(Answer([b"{}"]), "did not say how many tokens", id="no usage"),
        pytest.param(Answer([b"[]"]), "AttributeError", id="no object"),
        pytest.param(Answer([b"<html>"]), "JSONDecodeError", id="no JSON"),
        pytest.param(whole(2), "2 tokens came of 3", id="a token short"),
    ],
)
def test_failures_of_whole_answers(answer: Answer, said: str) -> None:
    """So is one that is not streamed."""
    with serving(lambda _: answer) as server:
        (timing,) = run(server.url, MODEL, asked(1), 1, stream=False)
    assert said in timing.problem


def test_one_failure_among_many() -> None:
    """One that fails takes no other with it."""

    def third_fails(body: dict[str, Any]) -> Answer:
        return Answer([b"no"], 503) if body["prompt"] == [3] else good(body)

    with serving(third_fails) as server:
        timings = run(server.url, MODEL, asked(6), 2, stream=True)
    assert [bool(timing.problem) for timing in timings] == [False, False, False, True, False, False]


def test_nobody_there() -> None:
    """A server that is not there fails every request."""
    with serving(good) as gone:
        url = gone.url
    timings = run(url, MODEL, asked(3), 2, stream=True)
    assert ["Connect" in timing.problem for timing in timings] == [True] * 3


def test_cached_tokens_are_counted() -> None:
    """What a server took from a cache is in the timing."""
    timing = streamed(Answer([chunk(1), chunk(3), ending(3, prompt_tokens_details={"cached_tokens": 2})]))
    assert (timing.cached_tokens, timing.problem) == (2, "")


def test_an_error_event_is_raised() -> None:
    """An error event ends the stream at once."""
    with pytest.raises(StreamError, match="no room"):
        EventStream().feed(event({"error": {"message": "no room"}}), 0.0)


def test_the_scripted_server_counts_itself() -> None:
    """The server that all this rests on sees several requests at once, where several are asked."""
    with serving(good) as server:
        assert isinstance(server, Scripted)
        run(server.url, MODEL, asked(4), 4, stream=True)
        assert server.most_under_way > 1
