"""Pieces of work that take turns find what each would alone, and do take turns."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from fixtures.quantizers.activation_aware import engine, pausing, race, trying
from fixtures.quantizers.activation_aware.judging import Tokens
from fixtures.quantizers.activation_aware.pausing import Pausing, alone, at_home, in_turn
from fixtures.quantizers.activation_aware.race import Rule
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
    other = counting("a", 9, log)
    with pytest.raises(ValueError, match="overflow"):
        in_turn({"a": other, "b": failing()})
    assert len(log) < 9
    with pytest.raises(StopIteration):
        next(other)  # it was closed


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


def changes(tried: list[int]) -> int:
    """How often an attempt is at another module than the one before it."""
    return sum(one != other for one, other in pairwise(tried))


@pytest.fixture
def by_itself(vl: Case, tried: list[int]) -> tuple[list[QuantizedLayer], int]:
    """The layers that searches find one after the other, and the changes of module on the way."""
    layers, before = vl.fast(), changes(tried)
    tried.clear()
    return layers, before


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Searches pause wherever they would wait for a copy."""
    patch.setattr(pausing, "made_now", lambda _: Arrived())


def test_turns_change_nothing(
    vl: Case, by_itself: tuple[list[QuantizedLayer], int], tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches that take turns find, to the bit, what each finds by itself; and they did take turns."""
    layers, before = by_itself
    as_on_a_gpu(monkeypatch)
    assert differences(layers, vl.fast()) == []
    assert changes(tried) > 1.5 * before  # settling's races, which take none, are among both


def _one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "in_turn", lambda works: {name: alone(work) for name, work in works.items()})


def _no_pause_for_a_block(patch: pytest.MonkeyPatch) -> None:
    def only_for_the_order(tensor: torch.Tensor, real: Any = at_home) -> Pausing[torch.Tensor]:
        return tensor.cpu() if tensor.is_floating_point() else (yield from real(tensor))

    patch.setattr(race, "at_home", only_for_the_order)


@pytest.mark.parametrize(
    "plant", [_one_after_the_other, _no_pause_for_a_block], ids=lambda plant: plant.__name__.strip("_")
)
def test_turns_not_taken_are_seen(
    plant: Any, vl: Case, by_itself: tuple[list[QuantizedLayer], int], tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Races that do not let others go on while they wait change modules as often as without turns."""
    layers, before = by_itself
    as_on_a_gpu(monkeypatch)
    plant(monkeypatch)
    assert differences(layers, vl.fast()) == []
    assert changes(tried) <= 1.5 * before


def test_swapped_results_are_seen(
    vl: Case, by_itself: tuple[list[QuantizedLayer], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that goes to another search makes other layers."""

    def swapped(works: Mapping[str, Pausing[Any]]) -> dict[str, Any]:
        found = in_turn(works)
        return found | {"qkv": found["gate_up"], "gate_up": found["qkv"]}

    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(engine, "in_turn", swapped)
    assert differences(by_itself[0], vl.fast())


def test_a_waiting_race_holds_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a race waits for a block's errors only the next block is kept on the GPU for it, not that one, too."""
    as_on_a_gpu(monkeypatch)
    blocks: list[weakref.ref[Any]] = []

    def draw(*of: Any, real: Any = race._draw) -> Any:
        found = real(*of)
        blocks.append(weakref.ref(found[2]))
        return found

    monkeypatch.setattr(race, "_draw", draw)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(4096, 8, generator=generator)
    errors = 1 + 0.01 * torch.rand(2, len(inputs), generator=generator)

    def attempt(candidates: Sequence[int], panel: Tokens) -> torch.Tensor:
        return errors[list(candidates), : len(panel)]

    racing = race.racing(Tokens(inputs, inputs), attempt, 2, Rule(tokens=64))  # type: ignore[arg-type]
    held = []
    with suppress(StopIteration):
        while True:
            next(racing)
            held.append(sum(block() is not None for block in blocks))
    assert len(held) > 4
    assert max(held) == 1


@pytest.fixture
def late() -> torch.Tensor:
    """Zeros on a GPU, which is busy for about a second before it makes ones of them."""
    made = torch.zeros(1 << 20, device="cuda")
    alone(at_home(made))  # pinned memory is there now: taking it may wait for all that is queued
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)
    made += 1
    return made


@pytest.mark.gpu
def test_at_home_when_it_is_computed(late: torch.Tensor) -> None:
    """On a GPU a tensor comes home as it was when that was asked for, however late it is computed; not before."""
    coming = at_home(late)
    next(coming)  # queued
    late += 1
    with pytest.raises(StopIteration) as ended:
        next(coming)
    assert ended.value.value.eq(1).all()


@pytest.mark.gpu
def test_an_unready_copy_is_seen(late: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait for its event a copy would be read before it is there."""
    monkeypatch.setattr(pausing, "made_now", lambda _: Arrived())
    assert not alone(at_home(late)).eq(1).all()
