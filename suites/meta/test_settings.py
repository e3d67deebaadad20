"""Settings of vLLM: their servers are their own, start side by side where there is room, and end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import settings_under_test
from fixtures.engines.process import EngineError
from fixtures.meters import nvml, rounds
from fixtures.meters.nvml import NvmlError
from fixtures.meters.regimes import SINGLE_STREAM, Regime
from fixtures.meters.settings import SETTINGS, Setting
from fixtures.options import SELECTION
from fixtures.serving_under_test import pytest_collection_modifyitems
from fixtures.settings_under_test import UnderSettings
from fixtures.throughput_under_test import Contest, conditions
from suites.meta.no_servers import Counting, NoServers, card_with, quantized


def contest_of(servers: NoServers, weights: int = 0) -> Contest:
    """FP16 and Marlin, with weights of so many bytes each."""
    compared = conditions(quantized(None), quantized("awq"), "marlin", hopper=True)
    return Contest(compared, servers, 1000, None, weights=lambda _: weights)  # type: ignore[arg-type]


def under_settings(servers: NoServers, contest: Contest | None = None) -> UnderSettings:
    """A contest under every setting."""
    return UnderSettings(contest or contest_of(servers), servers, SETTINGS)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_have_servers_of_their_own(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a setting every condition has a server with its flags, which ends; as vLLM starts, those that are there."""
    card_with(0, monkeypatch)
    servers = NoServers()
    contest = contest_of(servers)
    contest.start(text=True, pictures=True)
    text = contest.servers_of(pictures=False)
    with under_settings(servers, contest)(setting) as under:
        own = [serving for checkpoint, serving in servers.running if (checkpoint, serving) not in text]
        assert under.names == contest.names
        if setting.flags:
            assert [serving.more[-len(setting.flags) :] for serving in own] == [setting.flags] * 2, "and no other's"
            before = list(servers.running)
            under.start(text=True, pictures=False)
            assert servers.running == before, "those are the ones that it asks"
        else:
            assert under is contest
    assert [one for one in servers.running if not one[1].media] == text
    assert len({setting.flags for setting in SETTINGS}) == len(SETTINGS)


OF_A_SETTING = 2 * (5 + 1 + 2) << 30  # weights, KV cache, what is beside them, of two conditions


@pytest.mark.parametrize(
    ("room", "cores", "together"), [(0, 9, 1), (2, 9, 2), (2.9, 9, 2), (3, 9, 3), (9, 99, 5), (9, 9, 4), (9, 1, 1)]
)
def test_servers_of_settings_start_together(
    room: float, cores: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers of settings to come start beside those of the first, as many as there is room for; each starts once."""
    total = 140 << 30  # a tenth of which vLLM wants free as it starts
    card_with(int(room * OF_A_SETTING + total / 10), monkeypatch, total, cores)
    servers = Counting()
    contest = contest_of(servers, weights=5 << 30)
    contest.start(text=True, pictures=True)
    under = under_settings(servers, contest)
    with under(SETTINGS[1]):
        assert servers.starts[-1] == 2 * together
    for number, setting in enumerate(SETTINGS[2:], 1):
        begun = len(servers.starts)
        with under(setting):
            assert (len(servers.starts) > begun) == (number % together == 0), "at their turn, or before"
    assert sum(servers.starts) == 4 + 2 * 5
    assert len(servers.running) == 2


def test_where_nvml_is_silent_settings_start_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without knowing how much is free, no server is started ahead of time."""

    def silent(index: int = 0) -> None:
        raise NvmlError("NVML does not start")

    monkeypatch.setattr(nvml, "card", silent)
    servers = Counting()
    with under_settings(servers)(SETTINGS[1]):
        assert servers.starts == [2]


def run_of(settings: list[Setting]) -> Any:
    """What a fixture is told of a run with tests of some settings, and of something else."""
    params: list[Any] = [{"setting": setting, "target": of} for of in ("rtn", "nf4") for setting in settings]
    tests = [SimpleNamespace(callspec=SimpleNamespace(params=one)) for one in [{"regime": SINGLE_STREAM}, *params]]
    return SimpleNamespace(session=SimpleNamespace(items=[SimpleNamespace(), *tests]))


@pytest.mark.parametrize("asked", [SETTINGS, SETTINGS[1:2], (*SETTINGS[3:5], SETTINGS[1])])
def test_only_what_a_run_asks_for_is_started(asked: tuple[Setting, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers start for the settings that a run measures, each once; those that never had their turn end with it."""
    card_with(1 << 50, monkeypatch)
    servers = Counting()
    fixture = settings_under_test.under.__wrapped__(run_of(list(asked)), contest_of(servers), servers)
    under = next(fixture)
    first = next(setting for setting in asked if setting.flags)
    with under(first):
        assert servers.starts == [2 * sum(bool(setting.flags) for setting in asked)]
    assert list(fixture) == []
    assert servers.running == []


@pytest.mark.parametrize("alone", [False, True])
def test_a_setting_that_does_not_start_fails_its_own_check(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one setting's servers do not start, all others are measured; alone, a failing start is not tried again."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
    card_with(0 if alone else 1 << 50, monkeypatch)
    tried: list[int] = []

    class Picky(NoServers):
        def several(self, wanted: list[Any]) -> list[Any]:
            if any("--enforce-eager" in serving.more for _, serving in wanted):
                tried.append(len(wanted))
                raise EngineError("it does not start eagerly")
            return super().several(wanted)

    def measured(setting: Setting) -> int:
        with under(setting) as contest:
            return contest(Regime("few", 5, 3, 2, 4)).fewest_rounds

    servers = Picky()
    under = under_settings(servers)
    for setting in SETTINGS:
        if setting.name == "eager":
            with pytest.raises(EngineError, match="does not start eagerly"):
                measured(setting)
        else:
            assert measured(setting) == rounds.COUNTED
    assert tried == ([2] if alone else [10, 2]), "with all five, then for itself"
    assert len(servers.running) == 2


@pytest.mark.parametrize("asked", [False, True])
def test_settings_are_measured_where_asked_for(asked: bool) -> None:
    """Minutes of other settings are collected with --every-setting alone."""
    marked: Any = SimpleNamespace(get_closest_marker=lambda name: name == "every_setting" or None)
    config: Any = SimpleNamespace(
        stash={SELECTION: SimpleNamespace(tensor_parallel=1)},
        option=SimpleNamespace(quantizer=None, every_setting=asked),
    )
    items = [marked]
    pytest_collection_modifyitems(config, items)
    assert items == [marked] * asked
