"""Models that answers are recorded of: loaded once as long as they are tiny, and one at a time where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures import engines_under_test
from fixtures.engines_under_test import TINY, TOGETHER, Recordings

LARGE = 10 * TINY


class Loads:
    """Stands for the engine: counts what is loaded, and what is in memory then."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.together: list[list[str]] = []

    def ask(self, recordings: Recordings, names: Sequence[str], parameters: int) -> None:
        """Ask for models of one size, in this order."""
        for name in names:
            checkpoint: Any = SimpleNamespace(digest=name, parameters=parameters)
            adapter: Any = None
            assert recordings.engine(checkpoint, adapter, torch.float32) == name
            self.together.append([str(engine) for engine in recordings._loaded.values()])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """What is loaded from now on."""
    loads = Loads()

    def load(checkpoint: Any, *_: object) -> str:
        loads.loaded.append(checkpoint.digest)
        return str(checkpoint.digest)

    monkeypatch.setattr(engines_under_test, "TransformersEngine", load)
    return loads


@pytest.fixture
def recordings(tmp_path: Path) -> Recordings:
    """Recordings of no answers yet."""
    return Recordings(tmp_path, "cpu", lambda _: (), lambda *_: None)


def test_tiny_ones_stay(recordings: Recordings, loads: Loads) -> None:
    """Tiny models that are asked in turn, modality by modality, are loaded once each."""
    loads.ask(recordings, ["reference", "artifact", "rounded"] * 5, 10)
    assert loads.loaded == ["reference", "artifact", "rounded"]


def test_those_longest_unasked_go(recordings: Recordings, loads: Loads) -> None:
    """Of more tiny models than are kept, the one that nobody asked for longest gives way."""
    others = [f"artifact {n}" for n in range(TOGETHER)]
    loads.ask(recordings, [word for other in others for word in ("reference", other)], 10)
    assert loads.loaded == ["reference", *others]
    assert max(map(len, loads.together)) == TOGETHER
    assert "artifact 0" not in loads.together[-1]


def test_large_ones_are_alone(recordings: Recordings, loads: Loads) -> None:
    """A model that is not tiny shares the memory with no other, neither those before it nor those after."""
    loads.ask(recordings, ["tiny 1", "tiny 2"], 10)
    loads.ask(recordings, ["large 1", "large 2", "large 1"], LARGE)
    loads.ask(recordings, ["tiny 1", "tiny 2"], 10)
    assert loads.together[2:] == [["large 1"], ["large 2"], ["large 1"], ["tiny 1"], ["tiny 1", "tiny 2"]]
