"""The load generator against a real server: what it counts is what was asked, and a prefix cache is seen to help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.server import Server, Serving
from fixtures.meters.load import load, pool_of, run
from fixtures.meters.regimes import Regime, requests_of
from fixtures.meters.rounds import Recorded, Round
from fixtures.serving_under_test import Servers
from fixtures.throughput_under_test import MORE

pytestmark = pytest.mark.gpu

ASKED = Regime("asked", 160, 24, 8, 16, stream=True)


@pytest.fixture(scope="module")
def both(servers: Servers, tiny_reference: Checkpoint) -> Iterator[list[Server]]:
    """A server that caches nothing, as throughput is measured on, and one that caches prefixes."""
    plain = {"max_model_len": 256, "memory_share": 0.1, "kv_bytes": 1 << 30, "eager": True}
    caching = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
    wanted = [(tiny_reference, Serving(**plain, more=more)) for more in (MORE, caching)]  # type: ignore[arg-type]
    yield servers.several(wanted)
    for one in wanted:
        servers.stop(*one)


def flaws(server: Server, vocabulary: int, *, stream: bool, seeds: tuple[str, ...]) -> list[str]:
    """What is wrong with rounds of requests, by their seeds."""
    rounds = []
    for number, seed in enumerate(seeds):
        timings = run(server.url, server.model, requests_of(ASKED, vocabulary, seed), ASKED.concurrency, stream)
        rounds.append(Round("fp16", number, tuple(timings)))
    return Recorded(ASKED, ("fp16",), tuple(rounds), {}).flaws


@pytest.fixture(scope="module")
def vocabulary(tiny_reference: Checkpoint) -> int:
    """How many tokens the tiny model knows."""
    return int(ADAPTERS["qwen2_5_vl"].text_config(tiny_reference.config)["vocab_size"])


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_what_is_asked_is_counted(both: list[Server], vocabulary: int, stream: bool) -> None:
    """Every request of a real server is a measurement: all tokens asked, prompts whole, nothing from a cache."""
    assert flaws(both[0], vocabulary, stream=stream, seeds=("a", "b", "a")) == []


def test_processes_share_a_load(both: list[Server], vocabulary: int) -> None:
    """Four processes streaming at 64 keep up, and lose nothing."""
    regime = Regime("many", 16, 64, 64, 128, stream=True)
    with pool_of(4) as pool:
        found = load(
            both[0].url, both[0].model, requests_of(regime, vocabulary, "many"), 64, stream=True, pool=pool
        ).timings
    assert [timing.problem for timing in found] == [""] * 128


def test_a_prefix_cache_is_caught(both: list[Server], vocabulary: int) -> None:
    """A server that has answered the same prompts before is caught using its cache."""
    found = flaws(both[1], vocabulary, stream=True, seeds=("a", "a"))
    assert found
    assert all("came from a cache" in flaw for flaw in found)
