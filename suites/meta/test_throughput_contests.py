"""Conditions that fit a format; rounds of theirs that take turns, on one GPU and on several."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import throughput_under_test
from fixtures.core.errors import UserError
from fixtures.core.intervals import UNKNOWN, Interval
from fixtures.core.targets import Target
from fixtures.engines.process import EngineError
from fixtures.meters import rounds
from fixtures.meters.regimes import SINGLE_STREAM, Regime
from fixtures.throughput_under_test import Contest, conditions
from suites import test_throughput
from suites.meta.no_servers import NoServers, card_with, quantized
from suites.meta.scripted import Answer, chunk, ending, serving, whole


@pytest.mark.parametrize(
    ("method", "kernel", "hopper", "names"),
    [
        ("awq", "", True, ["fp16", "machete", "marlin"]),
        ("awq", "", False, ["fp16", "marlin"]),
        ("awq", "awq", True, ["fp16", "awq"]),
        ("awq", "marlin", True, ["fp16", "marlin"]),
        ("bitsandbytes", "", True, ["fp16", "bitsandbytes"]),
        ("bitsandbytes", "marlin", True, ["fp16", "bitsandbytes"]),
    ],
)
def test_conditions(method: str, kernel: str, hopper: bool, names: list[str]) -> None:
    """A format is run by each fast kernel that it and the card have, or by the one that was asked for."""
    found = conditions(quantized(None), quantized(method), kernel, hopper=hopper)
    assert [condition.name for condition in found] == names
    assert {condition.serving(pictures=False).kernel for condition in found[1:]} <= {*names, ""}
    assert found[0].checkpoint.quantization is None


def test_no_kernel_is_known() -> None:
    """A format that vLLM has no kernel for is refused in one line."""
    with pytest.raises(UserError, match="gptq"):
        conditions(quantized(None), quantized("gptq"), "", hopper=True)


def test_servers_cache_nothing() -> None:
    """Every server is started without a cache of prompts or of pictures, and with a KV cache of the same size."""
    for condition in conditions(quantized(None), quantized("awq"), "", hopper=True):
        for pictures in (False, True):
            serving = condition.serving(pictures=pictures)
            assert "--no-enable-prefix-caching" in serving.more
            assert serving.more[serving.more.index("--mm-processor-cache-gb") + 1] == "0"
            assert serving.kv_bytes
            assert serving.eager is pictures


def test_contest_takes_turns_and_keeps_failures() -> None:
    """All conditions run every round, warm-up first, each regime once; servers that are deaf fail every request."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    servers = NoServers()
    compared = conditions(quantized(None), quantized("awq"), "", hopper=True)
    contest = Contest(compared, servers, 1000, None)  # type: ignore[arg-type]
    contest.start(text=True, pictures=False)

    recorded = contest(SINGLE_STREAM)

    assert contest(SINGLE_STREAM) is recorded
    assert recorded.conditions == ("fp16", "machete", "marlin")
    assert [one.number for one in recorded.rounds] == [n for n in range(-1, rounds.COUNTED) for _ in range(3)]
    assert [one.condition for one in recorded.rounds[3:9]] == [*recorded.conditions, *reversed(recorded.conditions)]
    assert recorded.fewest_rounds == rounds.COUNTED
    assert len(recorded.flaws) == recorded.requests == 3 * rounds.COUNTED * SINGLE_STREAM.requests
    assert math.isnan(recorded.ratio("marlin", rounds.tokens_per_second).low)
    assert not recorded.fallbacks(contest.expected)
    assert contest.arrivals("marlin").conditions == ("one_by_one", "together")
    contest.close()
    assert servers.running == [(compared[0].checkpoint, compared[0].serving(pictures=False))]


def test_a_server_that_ends_under_load_says_why() -> None:
    """A load that a server did not outlive is no measurement: its log says why, not every request that it broke off."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    compared = conditions(quantized(None), quantized("awq"), "", hopper=True)
    contest = Contest(compared, NoServers(alive=False), 1000, None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"ended under the load single_stream on marlin\n  \| CUDA out of memory"):
        contest(SINGLE_STREAM)


@pytest.mark.parametrize("cards", [1, 2])
def test_nobody_spins_beside_a_round(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where engines spread over GPUs, another server's round waits until the workers of the last have come to rest."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    log: list[object] = []

    def loading(url: str, *of: Any, real: Any = throughput_under_test.load, **how: Any) -> Any:
        log.append(url)
        return real(url, *of, **how)

    class Several(NoServers):
        def several(self, wanted: list[Any]) -> list[Any]:
            found = zip(super().several(wanted), wanted, strict=True)
            return [SimpleNamespace(**{**vars(one), "url": f"{one.url}/{how.kernel}"}) for one, (_, how) in found]

    monkeypatch.setattr(throughput_under_test, "load", loading)
    compared = conditions(quantized(None), quantized("awq"), "marlin", hopper=True, tensor_parallel=cards)
    contest = Contest(compared, Several(), 1000, None, pause=log.append)  # type: ignore[arg-type]
    contest(Regime("few", 5, 3, 2, 4))
    rest = [throughput_under_test.SPINNING] if cards > 1 else []
    one, other = dict.fromkeys(entry for entry in log if isinstance(entry, str))
    wanted = [*rest, one, *rest, other, other, *rest, one]  # there and back
    assert log[: len(wanted)] == wanted
    assert all(second > 1 for second in rest)
    before = len(log)
    contest.arrivals("marlin")
    assert len([entry for entry in log[before:] if not isinstance(entry, str)]) <= len(rest), "one server's alone"


def scaling(servers: NoServers, monkeypatch: pytest.MonkeyPatch, free: int = 80 << 30, **more: Any) -> Any:
    """A contest over two GPUs whose servers run, and what ``one_and_all`` makes of it where so much memory is free."""
    card_with(free, monkeypatch)
    compared = conditions(quantized(None), quantized("awq"), "marlin", hopper=True, tensor_parallel=2)
    contest = Contest(compared, servers, 1000, more.pop("pool", None), weights=lambda _: 7 << 30, **more)  # type: ignore[arg-type]
    contest.start(text=True, pictures=True)
    return throughput_under_test.one_and_all(contest)


def test_on_one_gpu_and_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several GPUs each condition is run on one, too, by servers of its own, which end; those on all go on."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    servers, rests = NoServers(), []  # type: ignore[var-annotated]
    fixture = scaling(servers, monkeypatch, pause=rests.append)
    assert [serving.eager for _, serving in servers.running] == [True, True, False, False]

    both = next(fixture)
    recorded = both(Regime("few", 5, 3, 2, 4))

    assert recorded.conditions == ("fp16 on 1", "marlin on 1", "fp16 on 2", "marlin on 2")
    assert test_throughput.pairs(both.names) == [("fp16 on 1", "fp16 on 2"), ("marlin on 1", "marlin on 2")]
    assert [serving.tensor_parallel for _, serving in servers.running] == [2, 2, 1, 1], "pictures' ended"
    assert not recorded.fallbacks(both.expected)
    assert (both.cards, both.weights_of(Target("qwen2_5_vl", "7b", "rtn"))) == (2, "qwen2_5_vl-7b-tp2")
    assert rests, "rounds on two GPUs are apart"
    assert list(fixture) == []
    assert [serving.tensor_parallel for _, serving in servers.running] == [2, 2]


def test_large_loads_are_shared_on_one_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger loads come from several processes here, too."""
    pools: list[object] = []

    def loading(*_: Any, pool: object, **__: Any) -> Any:
        pools.append(pool)
        return SimpleNamespace(timings=(), busy=0.0)

    monkeypatch.setattr(throughput_under_test, "load", loading)
    next(scaling(NoServers(), monkeypatch, pool="several", pause=lambda _: None))(Regime("many", 5, 3, 64, 64))
    assert set(pools) == {"several"}


def test_scaling_wants_room_on_the_first_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first card has no room for servers on one GPU, scaling is skipped, saying how much it would take."""
    needed = 2 * (7 + 6 + 2) << 30
    with pytest.raises(pytest.skip.Exception) as skipped:
        next(scaling(NoServers(), monkeypatch, free=needed - 1))
    try:
        assert next(scaling(NoServers(), monkeypatch, free=needed))
    except pytest.skip.Exception:
        pytest.fail("skipped although there is room")
    assert "on one GPU fp16, marlin need 30.0 GiB beside what is there, and 30.0 are free" in str(skipped.value)


def test_undecided_rounds_are_followed_by_more() -> None:
    """Rounds that leave a bound undecided are followed by more of other numbers, up to a most; decided ones by none."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    contest = Contest(conditions(quantized(None), quantized("awq"), "marlin", hopper=True), NoServers(), 1000, None)  # type: ignore[arg-type]
    regime = Regime("few", 5, 3, 2, 4)
    assert contest(regime, lambda _: True).fewest_rounds == rounds.COUNTED
    assert contest(regime, lambda found: found.fewest_rounds > rounds.COUNTED).fewest_rounds == 2 * rounds.COUNTED
    recorded = contest(regime, lambda _: False)
    assert recorded.fewest_rounds == rounds.MOST
    assert [one.number for one in recorded.counted("marlin")] == list(range(rounds.MOST))
    assert contest(regime) is recorded


@pytest.mark.parametrize(
    ("interval", "decided"),
    [
        pytest.param(Interval(1.1, 1.3, 1.59), True, id="within"),
        pytest.param(Interval(1.7, 1.8, 1.9), True, id="beyond"),
        pytest.param(Interval(1.1, 1.3, 1.63), False, id="on both sides"),
        pytest.param(UNKNOWN, True, id="nothing measured"),
    ],
)
def test_what_is_decided(interval: Interval, decided: bool) -> None:
    """An interval decides when all of it lies on one side of the bound; one of NaN would not get better by more."""
    assert interval.beside(1.6) == decided


def test_base_is_kept_for_the_next_of_its_reference() -> None:
    """FP16's servers go on for another artifact of the same reference, and end for one of another."""
    servers, kept = NoServers(), []  # type: ignore[var-annotated]
    for base in (quantized(None, "reference"), quantized(None, "reference"), quantized(None, "other")):
        contest = Contest(conditions(base, quantized("awq"), "", hopper=True), servers, 1000, None, kept=kept)  # type: ignore[arg-type]
        contest.start(text=True, pictures=True)
        contest.close()
        assert [checkpoint.digest for checkpoint, _ in servers.running] == [base.digest] * 2


def test_contest_against_a_server_that_answers() -> None:
    """Of a server that answers all that is asked, streamed or whole, every round is a measurement."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

    def obliging(body: dict[str, Any]) -> Answer:
        count, prompt = body["max_tokens"], len(body["prompt"])
        if not body["stream"]:
            return whole(count, prompt)
        return Answer([*(chunk(n + 1, prompt=prompt) for n in range(count)), ending(count, prompt)])

    class Obliging(NoServers):
        def several(self, wanted: list[Any]) -> list[Any]:
            return [SimpleNamespace(**{**vars(one), "url": server.url}) for one in super().several(wanted)]

    with serving(obliging) as server:
        contest = Contest(conditions(quantized(None), quantized("awq"), "marlin", hopper=True), Obliging(), 1000, None)  # type: ignore[arg-type]
        for regime in (Regime("s", 5, 3, 2, 4, stream=True), Regime("w", 5, 3, 2, 4)):
            recorded = contest(regime)
            assert (recorded.flaws, recorded.requests) == ([], 2 * rounds.COUNTED * 4)
            assert recorded.ratio("marlin", rounds.tokens_per_second).point > 0
        assert len({json.dumps(body) for body in server.bodies}) < len(
            server.bodies
        )  # two conditions, the same prompts
        together = contest.arrivals("marlin")
    assert together.flaws == []
    assert together.ratio("together", rounds.mean_of(rounds.ttft)).point > 0
