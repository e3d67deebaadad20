"""Checkpoints and servers that are none: for what is started when, and what ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import settings_under_test
from fixtures.meters import nvml


def quantized(method: str | None, digest: str = "d") -> Any:
    """A checkpoint as far as choosing kernels looks at it."""
    given = {"quant_method": method} if method else None
    return SimpleNamespace(quantization=given, path="somewhere", digest=digest)


class NoServers:
    """Servers that never answer, and a note of what was wanted of them."""

    def __init__(self, alive: bool = True) -> None:
        self.alive = alive
        self.running: list[Any] = []

    def several(self, wanted: list[Any]) -> list[Any]:
        """Pretend that they run."""
        self.running += [one for one in wanted if one not in self.running]
        return [
            SimpleNamespace(
                url="http://127.0.0.1:9/v1",
                model="nobody",
                pids=frozenset,
                alive=lambda: self.alive,
                why_dead=lambda: "  | CUDA out of memory",
                started=SimpleNamespace(kernels=(serving.kernel or "fp16",)),
            )
            for _, serving in wanted
        ]

    def stop(self, checkpoint: Any, serving: Any) -> None:
        """Pretend that it ended."""
        self.running = [one for one in self.running if one != (checkpoint, serving)]


class Counting(NoServers):
    """Servers that never answer, and how many were started at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[int] = []

    def several(self, wanted: list[Any]) -> list[Any]:
        """Count those that do not run yet."""
        before = len(self.running)
        found = super().several(wanted)
        self.starts.append(len(self.running) - before)
        return found


def card_with(free: int, monkeypatch: pytest.MonkeyPatch, total: int = 0, cores: int = 100) -> None:
    """A first card of which so many bytes are free, on a machine on which so many engines start side by side."""
    monkeypatch.setattr(nvml, "card", lambda index=0: SimpleNamespace(free=free, total=total))
    monkeypatch.setattr(settings_under_test, "at_once", lambda: cores)
