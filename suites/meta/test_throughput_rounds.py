"""Timings to figures by hand, requests that no cache has, and what limits a step."""

from __future__ import annotations

import json
import math

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.meters import rounds
from fixtures.meters.bandwidth import Roofline, decode_bytes
from fixtures.meters.load import Timing
from fixtures.meters.regimes import (
    IMAGE_PREFILL,
    LONG_PROMPT,
    ONE_BY_ONE,
    REGIMES,
    STREAMED,
    TOGETHER,
    requests_of,
)
from fixtures.meters.rounds import turns
from fixtures.subjects import shipped

# Arrived at 0, sent at 1 and 2; three tokens one by one, and four of which three come together.
FIRST = Timing(0.0, 1.0, 3.5, 3, ((2.0, 1), (2.5, 1), (3.5, 1)), prompt_tokens=10, completion_tokens=3)
SECOND = Timing(0.0, 2.0, 5.0, 4, ((4.0, 1), (4.6, 3)), prompt_tokens=20, completion_tokens=4)
BOTH = [FIRST, SECOND]


# Figures


def test_rates() -> None:
    """Rates are over the time from the first arrival to the last answer."""
    assert rounds.seconds(BOTH) == 5
    assert rounds.tokens_per_second(BOTH) == pytest.approx(7 / 5)
    assert rounds.prompt_tokens_per_second(BOTH) == pytest.approx(30 / 5)
    assert rounds.requests_per_second(BOTH) == pytest.approx(2 / 5)


def test_time_to_first_token() -> None:
    """Time to first token is counted from arrival: waiting for one's turn is part of it."""
    assert rounds.ttft(BOTH) == [2, 4]


def test_later_tokens() -> None:
    """Tokens that come together share their gap, a pause between chunks stands whole, a mean leaves out the first."""
    assert rounds.itl(BOTH) == pytest.approx([0.5, 1.0, 0.2, 0.2, 0.2])
    assert rounds.gaps(BOTH) == pytest.approx([0.5, 1.0, 0.6])
    assert rounds.tpot(BOTH) == pytest.approx([1.5 / 2, 0.6 / 3])


def test_inter_token_latencies_add_up() -> None:
    """There is a latency for every token after the first chunk, and they add up to the time that passed."""
    for timing in BOTH:
        found = rounds.itl([timing])
        assert len(found) == timing.completion_tokens - timing.chunks[0][1]
        assert sum(found) == pytest.approx(timing.chunks[-1][0] - timing.first_token)


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 2.5), (0.99, 3.97), (1.0, 4.0)])
def test_quantiles(q: float, value: float) -> None:
    """Percentiles are interpolated between the values around them."""
    assert rounds.quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(value)


def test_nothing_measured() -> None:
    """Nothing measured is NaN, never 0 and never infinitely fast."""
    figures = [
        rounds.seconds([]),
        rounds.tokens_per_second([]),
        rounds.quantile([], 0.5),
        rounds.median_of(rounds.itl)([]),
    ]
    instant = Timing(1.0, 1.0, 1.0, 1, completion_tokens=1)
    assert all(math.isnan(figure) for figure in [*figures, rounds.tokens_per_second([instant])])


def test_a_single_token_has_no_later_ones() -> None:
    """An answer of one token has a time to first token and nothing after it; one that was not streamed has neither."""
    single = Timing(0.0, 0.0, 1.0, 1, ((0.5, 1),), completion_tokens=1)
    assert (rounds.ttft([single]), rounds.tpot([single]), rounds.itl([single])) == ([0.5], [], [])
    assert math.isnan(rounds.ttft([Timing(0.0, 0.0, 1.0, 1, completion_tokens=1)])[0])


def test_turns() -> None:
    """Conditions go there and back again, so that a drift favours nobody."""
    assert [turns(("a", "b", "c"), number) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


# Requests


def test_no_request_twice() -> None:
    """No prompt and no picture comes twice, in a round or between rounds: a cache has nothing to give."""
    for regime in {*REGIMES, *STREAMED, ONE_BY_ONE, TOGETHER}:
        bodies = [
            json.dumps(request.body)
            for number in (-1, 0)
            for request in requests_of(regime, 151936, f"model/{number}")[:20]
        ]
        assert len(set(bodies)) == len(bodies)


def test_requests_are_the_regimes() -> None:
    """Requests ask what their regime says, and are the same for the same seed."""
    for regime in REGIMES:
        found = requests_of(regime, 151936, "a")
        assert len(found) == regime.requests
        assert {request.new_tokens for request in found} == {regime.new_tokens}
        assert {request.body["max_tokens"] for request in found} == {regime.new_tokens}
        assert all(request.body["ignore_eos"] and request.body["temperature"] == 0 for request in found)
        assert found[0] == requests_of(regime, 151936, "a")[0]
    assert len(requests_of(LONG_PROMPT, 151936, "a")[0].body["prompt"]) == 3000


def test_prompts_hold_no_special_tokens() -> None:
    """Prompts are of the vocabulary's middle: Qwen's special tokens stand at its end, from 151643 on."""
    ids = [token for request in requests_of(LONG_PROMPT, 151936, "a") for token in request.body["prompt"]]
    assert max(ids) < 151643
    assert min(ids) >= 256


def test_pictures() -> None:
    """A picture is a PNG of the regime's size, small enough to be sent quickly."""
    import base64
    import io

    from PIL import Image

    (request, *_) = requests_of(IMAGE_PREFILL, 151936, "a")
    (content,) = (message["content"] for message in request.body["messages"])
    kind, data = content[0]["image_url"]["url"].split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64"
    assert picture.size == (IMAGE_PREFILL.side, IMAGE_PREFILL.side)
    assert len(data) < 100_000
    assert IMAGE_PREFILL.least_prompt_tokens == 1024


def test_prefill() -> None:
    """Regimes know which of them mostly read."""
    assert [regime.name for regime in REGIMES if regime.prefill] == ["image_prefill", "long_prompt"]


# What limits a step


def test_bytes_of_a_step() -> None:
    """A step reads the language model and the head, a tied one in the embedding's stead; no tower and no embedding."""
    adapter = ADAPTERS["qwen2_5_vl"]
    tied = Checkpoint(shipped("qwen2_5_vl-tiny"))
    decoder = sum(info.bytes for name, info in tied.tensors.items() if name.startswith("model."))
    assert decode_bytes(tied, adapter) == decoder  # the embedding among them, as the head
    omni = Checkpoint(shipped("qwen2_5_omni-tiny"))
    thinker = sum(info.bytes for name, info in omni.tensors.items() if name.startswith("thinker.model.layers."))
    head = omni.tensors["thinker.lm_head.weight"].bytes
    read = decode_bytes(omni, ADAPTERS["qwen2_5_omni"])
    assert thinker + head <= read < thinker + head + 10_000  # and a norm


def test_roofline() -> None:
    """A step of 3 ms that reads 6 GB at 4 TB/s spends half its time on it."""
    line = Roofline(6_000_000_000, 4e12)
    assert line.seconds == pytest.approx(1.5e-3)
    assert "1.50 ms" in line.words(3e-3)
    assert "50%" in line.words(3e-3)
    assert "1 card " in line.words(3e-3)


def test_roofline_of_two_cards() -> None:
    """Two cards read half of the weights each, at the same time: a step may take half as long."""
    line = Roofline(6_000_000_000, 4e12, 2)
    assert line.seconds == pytest.approx(0.75e-3)
    assert "2 cards" in line.words(3e-3)
