"""Pieces of work that take turns find what each would alone, and do take turns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from fixtures.quantizers.activation_aware import engine, pausing, race, trying
from fixtures.quantizers.activation_aware.pausing import Pausing, alone, at_home, in_turn
from fixtures.quantizers.layers import QuantizedLayer
from suites.meta.test_engine_oracle import CASES, Case, case_of, differences


def counting(name: str, steps: int, log: list[str]) -> Pausing[str]:
    """So many pauses, each after a word in the log."""
    for step in range(steps):
        log.append(f"{name}{step}")
        yield
    return name.upper()


def test_each_goes_on_until_it_pauses() -> None:
    """Turns go round, those that have ended are left out, and each result goes by its own name."""
    log: list[str] = []
    found = in_turn({name: counting(name, steps, log) for name, steps in (("a", 1), ("b", 3), ("c", 0), ("d", 2))})
    assert log == ["a0", "b0", "d0", "b1", "d1", "b2"]
    assert found == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert list(found) == ["a", "b", "c", "d"]
    assert in_turn({}) == {}


def test_alone_to_the_end() -> None:
    """By itself a piece of work goes through all its pauses."""
    log: list[str] = []
    assert alone(counting("a", 3, log)) == "A"
    assert log == ["a0", "a1", "a2"]


def test_a_failure_is_everybody_s() -> None:
    """What one raises reaches who asked; nobody goes on without it."""

    def failing() -> Pausing[str]:
        yield
        raise ValueError("activations overflow")

    log: list[str] = []
    with pytest.raises(ValueError, match="overflow"):
        in_turn({"a": counting("a", 9, log), "b": failing()})
    assert len(log) < 9


def test_no_pause_on_a_cpu() -> None:
    """What is there already is waited for by nobody."""
    tensor = torch.arange(3)
    with pytest.raises(StopIteration) as ended:
        next(at_home(tensor))
    assert torch.equal(ended.value.value, tensor)


class Arrived:
    """Stands for the event that says a copy is there: on a CPU it is at once."""

    def synchronize(self) -> None:
        """Return."""


@pytest.fixture(scope="module")
def vl() -> Case:
    """The shipped VL checkpoint and a few samples."""
    return case_of(*CASES[0])


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Races of many small blocks; grows by the inspected module at each attempt."""
    modules: list[int] = []

    def errors(inspected: torch.nn.Module, *of: Any, real: Any = trying.errors) -> Any:
        modules.append(id(inspected))
        return real(inspected, *of)

    monkeypatch.setattr(trying, "errors", errors)
    monkeypatch.setattr(race, "Rule", partial(race.Rule, tokens=32, fewest=2))
    return modules


@pytest.fixture
def by_itself(vl: Case, tried: list[int]) -> list[QuantizedLayer]:
    """The layers that searches find one after the other."""
    layers = vl.fast()
    tried.clear()
    return layers


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Searches pause wherever they would wait for a copy."""
    patch.setattr(pausing, "made_now", lambda _: Arrived())


def test_turns_change_nothing(
    vl: Case, by_itself: list[QuantizedLayer], tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches that take turns find, to the bit, what each finds by itself; and they did take turns."""
    as_on_a_gpu(monkeypatch)
    assert differences(by_itself, vl.fast()) == []
    changes = sum(one != other for one, other in pairwise(tried))
    assert changes > 3 * len(by_itself), "one after the other there are two or three a layer"


def test_swapped_results_are_seen(vl: Case, by_itself: list[QuantizedLayer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that goes to another search makes other layers."""

    def swapped(works: Mapping[str, Pausing[Any]]) -> dict[str, Any]:
        found = in_turn(works)
        return found | {"qkv": found["gate_up"], "gate_up": found["qkv"]}

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(engine, "in_turn", swapped)
    assert differences(by_itself, vl.fast())


@pytest.mark.gpu
def test_at_home_when_it_is_computed() -> None:
    """On a GPU a tensor comes home as it was when that was asked for, however late it is computed; not before."""
    made = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(1 << 31)  # about a second's work before it
    made += 1
    coming = at_home(made)
    next(coming)  # queued
    made += 1
    with pytest.raises(StopIteration) as ended:
        next(coming)
    assert ended.value.value.eq(1).all()


@pytest.mark.gpu
def test_an_unready_copy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait for its event a copy would be read before it is there."""
    monkeypatch.setattr(pausing, "made_now", lambda _: Arrived())
    made = torch.zeros(1 << 20, device="cuda")
    alone(at_home(made))  # pinned memory is there now: taking it may wait for all that is queued
    torch.cuda._sleep(1 << 31)
    made += 1
    assert not alone(at_home(made)).eq(1).all()
