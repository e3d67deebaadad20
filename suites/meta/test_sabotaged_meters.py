"""Edges of what turns timings, bytes, replies and logs into figures: each was once moved by one, and is held here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.intervals import Interval, paired_ratio, ratio_or_unknown
from fixtures.engines.hanging_up import UNFINISHED, HungUp, hang_up
from fixtures.engines.kernels import identified
from fixtures.engines.plain_awq import SAYS
from fixtures.engines.replies import TOP, compare
from fixtures.engines.vllm_logs import QUOTED, WIDEST, telling_lines
from fixtures.meters import held, rounds
from fixtures.meters.events import EventStream
from fixtures.meters.held import Held, Ledger
from fixtures.meters.load import Loaded, Pool, Request, Timing, load
from fixtures.meters.memory import Measured, Reading, Record
from fixtures.meters.rounds import WARM_UP
from fixtures.subjects import shipped
from suites.meta.contests import KERNELS, changed, good
from suites.meta.scripted import Answer, chunk, event, serving
from suites.meta.test_serving_sabotage import END, reply

# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_condition_without_requests_leaves_none() -> None:
    """Where one condition has no request nothing was compared, however many the others have."""
    assert good().requests > 0
    assert changed(lambda one: None).requests == 0


def test_first_chunk_of_several_tokens() -> None:
    """The mean time per later token leaves out all tokens of the first chunk."""
    timing = Timing(0.0, 0.0, 3.0, 6, ((1.0, 2), (2.0, 1), (3.0, 3)), completion_tokens=6)
    assert rounds.tpot([timing]) == pytest.approx([2.0 / 4])


def test_two_kernels_are_a_fallback() -> None:
    """A server that names two kernels is on another one for some linears, though either would have been right alone."""
    expected = {name: (name, "marlin") for name in KERNELS}
    both = dataclasses.replace(good(), kernels={**KERNELS, "machete": ("machete", "marlin")})
    assert good().fallbacks(expected) == []
    assert len(both.fallbacks(expected)) == 1


def test_a_busy_warm_up_is_none() -> None:
    """How busy the generator was while all warmed up says nothing of what is counted."""
    busy = changed(lambda one: dataclasses.replace(one, busy=1.4) if one.number == WARM_UP else one)
    assert busy.busiest == good().busiest < 1


# -- events ------------------------------------------------------------------------------------------------------------


def test_usage_in_another_spelling() -> None:
    """An end with blanks in its JSON is read as one without, before the last word of the stream."""
    stream = EventStream()
    stream.feed(chunk(1), 1.0)
    stream.feed(b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n', 2.0)
    stream.feed(b"data: [DONE]\n\n", 3.0)
    assert stream.usage == {"prompt_tokens": 3, "completion_tokens": 1}
    assert stream.ended


def test_usage_is_not_forgotten() -> None:
    """An empty usage after the last count does not undo it."""
    stream = EventStream()
    stream.feed(event({"choices": [], "usage": {"completion_tokens": 1}}), 1.0)
    stream.feed(event({"choices": [], "usage": None}), 2.0)
    assert stream.usage == {"completion_tokens": 1}


# -- load --------------------------------------------------------------------------------------------------------------


class AtOnce:
    """Runs what is submitted at once, as a process would; the first is the busier one."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def submit(self, _: object, url: str, model: str, requests: Sequence[Request], width: int, *__: object) -> Any:
        """Note how much was asked for, and how many at a time."""
        self.asked.append((len(requests), width))
        timings = tuple(Timing(0.0, 0.0, 1.0, request.new_tokens) for request in requests)
        loaded = Loaded(timings, 0.5 / len(self.asked))
        return SimpleNamespace(result=lambda: loaded)


def test_processes_share_the_concurrency() -> None:
    """Processes together have as many requests under way as one would; the busiest of them counts."""
    pool = Pool(2)
    pool.close()
    processes: Any = AtOnce()
    pool._pool = processes
    requests = [Request("completions", {}, number) for number in range(7)]
    loaded = load("nowhere", "m", requests, 3, False, pool=pool)
    assert processes.asked == [(4, 2), (3, 1)]
    assert [timing.asked_tokens for timing in loaded.timings] == list(range(7))
    assert loaded.busy == 0.5
    load("nowhere", "m", requests, 2, False, pool=pool)
    assert processes.asked[2:] == [(4, 1), (3, 1)]  # one for each: shared, too


# -- ledger ------------------------------------------------------------------------------------------------------------


def coded(inputs: int, outputs: int, groups: int) -> Any:
    """The parts of a linear in AWQ's layout, as far as the ledger looks at them."""
    shapes = {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}
    return {
        part: SimpleNamespace(
            shape=shape, parameters=math.prod(shape), bytes=math.prod(shape) * (4, 2)[part == "scales"]
        )
        for part, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "fits"),
    [
        (256, 128, 2, True),  # groups of 128
        (256, 128, 4, True),  # of 64
        (256, 128, 1, True),  # whole rows
        (256, 128, 8, False),  # of 32
        (96, 128, 1, False),
        (256, 192, 2, False),
        (96, 128, 3, False),
    ],
)
def test_linears_that_machete_takes(inputs: int, outputs: int, groups: int, fits: bool) -> None:
    """Machete keeps zero points as 16 bits, of the linears that fit its tiles and groups; others keep four."""
    held_by = {
        one.name: one.bytes for one in held._parts_in_vllm("m", "visual", coded(inputs, outputs, groups), machete=True)
    }
    assert held_by["m.qzeros"] == groups * outputs * 2 // (1 if fits else 4)


def test_vocabulary_is_padded() -> None:
    """In vLLM an embedding of one row less takes as much: rows come by sixty-fours."""
    adapter, whole, less = ADAPTERS["qwen2_5_vl"], *(Checkpoint(shipped("qwen2_5_vl-tiny")) for _ in range(2))
    name = "model.embed_tokens.weight"
    info = whole.tensors[name]
    rows, width = info.shape
    assert rows % held.VOCABULARY == 0
    less.tensors[name] = dataclasses.replace(info, shape=(rows - 1, width))
    assert held.in_vllm(less, adapter).total == held.in_vllm(whole, adapter).total


# -- memory ------------------------------------------------------------------------------------------------------------


def test_what_was_there_before_is_not_the_models() -> None:
    """What the allocator held before loading is taken off the weights, and off what nobody accounts for."""
    ledger = Ledger((Held("x", "visual", "16 bits", 600),), {})
    one = Measured("one", ledger, Record(Reading(512, 100, 2048, 4096), Reading(1536, 730, 2048, 4096), 620))
    assert (one.weights, one.unexplained, one.beyond_model) == (1024, 30, 10)


# -- replies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "excused"), [(TOP, True), (TOP + 1, False)])
def test_near_ties_end_after_the_first_few(place: int, excused: bool) -> None:
    """The other's token must be among the first five of either: the fifth is a near tie, the sixth is none."""
    top = {token: -float(token) for token in range(1, 8)}
    one, other = (dataclasses.replace(reply(said, END), top=(top, top)) for said in (1, place))
    (divergence,) = compare([one], [other]).divergences
    assert divergence.excused == excused


def test_hanging_up_after_some_events() -> None:
    """Who hangs up has read as many pieces with words as were wanted, or all that came; asked for is a long answer."""
    piece = {"choices": [{"delta": {"content": " a"}, "finish_reason": None}]}
    wordless = [{"choices": [{"delta": said}]} for said in ({"content": ""}, {"content": None}, {"role": "assistant"})]
    last = {"choices": [{"delta": {"content": " b"}, "finish_reason": "stop"}]}
    pieces = [b": a comment\n\n", *map(event, [*wordless, *[piece] * 7, *wordless])]
    for ends, how in {(event(last),): "ended by stop", (b"data: [DONE]\n\n",): "done", (): "broke off"}.items():
        with serving(lambda _, ends=ends: Answer([*pieces, *ends])) as scripted:
            server: Any = SimpleNamespace(port=int(scripted.url.split(":")[2].partition("/")[0]))
            early, late, all_of_it = (hang_up(server, {"max_tokens": 2}, wanted) for wanted in (1, 7, 99))
            assert (early, late) == (HungUp(200, 1, ""), HungUp(200, 7, ""))
            assert all_of_it.pieces == 7 + (how == "ended by stop")
            assert all_of_it.ended.endswith(how)
            assert [one.mid_stream for one in (early, late, all_of_it)] == [True, True, False]
            assert all(body == {"stream": True, **UNFINISHED} for body in scripted.bodies)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_last_exception_is_quoted() -> None:
    """Of several exceptions of its own the last one ended the engine."""
    assert telling_lines("ImportError: no flash\nwent on\nValueError: no such layer\n") == ["ValueError: no such layer"]


def test_explanations_end_at_the_next_exception() -> None:
    """What explains another exception is not quoted with the first."""
    log = "ValueError: no such layer\n  in the tower\nRuntimeError: Engine core initialization failed\n  see above\n"
    assert telling_lines(log) == ["ValueError: no such layer", "in the tower"]


def test_quotes_are_short() -> None:
    """Few lines are quoted, the last of a log without an exception, and none is wide."""
    many = [f"line {number}" for number in range(20)]
    assert telling_lines("\n".join(many)) == many[-QUOTED:]
    explained = telling_lines("\n".join(["ValueError: " + "x" * 2 * WIDEST, *(f"  {line}" for line in many)]))
    assert len(explained) == QUOTED
    assert len(explained[0]) == WIDEST


def test_kernels_named_more_than_once() -> None:
    """A kernel that a log names for every linear is named once; the plain one beside it is not lost."""
    chosen = "Using MacheteLinearKernel for AutoAWQMarlinLinearMethod\n"
    config = "config: dtype=torch.float16, quantization=awq_marlin, x\n"
    assert identified(config + 2 * chosen) == ("machete",)
    assert identified(config + chosen + SAYS) == ("machete", "awq")
    assert identified(config) == ("awq",)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_three_rounds_are_enough() -> None:
    """Three rounds give an interval, which is that of the rounds."""
    before, after = [1.0, 1.1, 0.9], [1.3, 1.2, 1.4]
    assert ratio_or_unknown(before, after) == paired_ratio(before, after)


@pytest.mark.parametrize(
    ("found", "tells"),
    [(Interval(0.7, 0.8, 0.9), True), (Interval(1.1, 1.2, 1.3), True), (Interval(0.9, 1.0, 1.1), False)],
)
def test_slower_is_told_as_faster_is(found: Interval, tells: bool) -> None:
    """An interval tells on which side of 1 it lies, on either side."""
    assert found.tells == tells
