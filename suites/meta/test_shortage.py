"""Where memory ran out for vLLM, its failure says what the weights need and what would fit; nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.core.checkpoint import Checkpoint
from fixtures.engines import offline, shortage
from fixtures.engines.process import EngineError
from fixtures.engines.server import Serving, post, start_server
from fixtures.engines.shortage import accounted, room
from fixtures.meters import nvml
from fixtures.meters.fitting import Room
from fixtures.meters.nvml import Card
from suites.meta import fake_vllm

GIB = 1 << 30
CARD = Card("a card", "580.1", 140 * GIB, 20 * GIB)  # 120 GiB free
SHORT = {  # the telling lines of vLLM 0.25.1
    "the allocator": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
    "the share asked for": "ValueError: Free memory on device cuda:0 (1.2/139.8 GiB) on startup is less than desired "
    "GPU memory utilization (0.25, 34.95 GiB). Decrease GPU memory utilization or reduce GPU memory used by others.",
    "the weights fill the share": "ValueError: No available memory for the cache blocks. Try increasing "
    "`gpu_memory_utilization` when initializing the engine.",
    "a KV cache too small": "ValueError: To serve at least one request with the models's max seq len (4096), (0.14 GiB "
    "KV cache is needed, which is larger than the available KV cache memory (0.05 GiB).",
    "warming up": "RuntimeError: CUDA out of memory occurred when warming up sampler with 64 dummy requests.",
}
OTHERWISE = (
    "ValueError: There is no module or parameter named 'blocks.0.attn.proj.weight'",
    "api_server.py: error: argument --gpu-memory-utilization: invalid float value: 'x'",
)


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts cards into this machine; by default as many alike as are asked for."""

    def put(*used: int) -> None:
        free = dict(enumerate(used))
        monkeypatch.setattr(nvml, "card", lambda index=0: replace(CARD, used=free.get(index, CARD.used)))

    put()
    return put


@pytest.mark.parametrize("why", SHORT)
def test_shortage_is_accounted(why: str, tiny_reference: Checkpoint) -> None:
    """However vLLM says that memory ran out, the ledger follows, tower by tower, and what would fit."""
    lines = accounted(tiny_reference, Serving(), [SHORT[why]]).splitlines()[1:]
    assert lines[0] == "  its weights alone need 0.01 GiB"
    assert [line.split()[0] for line in lines[1:-1]] == ["language_model", "KV", "all"]
    assert lines[-1].startswith("  with 35.0 GiB allowed (--gpu-memory-utilization 0.25), 1 GiB of it for context")
    assert "fits: this one in 16 bits" in lines[-1]


@pytest.mark.parametrize("line", OTHERWISE)
def test_other_reasons_are_not(line: str, tiny_reference: Checkpoint) -> None:
    """Where something else failed, nobody is told of memory, whatever words the message has in it."""
    assert accounted(tiny_reference, Serving(), [line]) == ""


def test_the_ledger_is_of_what_was_served(tiny_reference: Checkpoint) -> None:
    """Towers whose media are served are in it, a GPU's part where several share, and weights before they are coded."""

    def said(**settings: object) -> str:
        return accounted(tiny_reference, Serving(**settings), [SHORT["the allocator"]])  # type: ignore[arg-type]

    assert "\n  visual " in said(media=(("image", 1),))
    assert "\n  visual " not in said()
    assert "  its weights alone need 0.01 GiB, before bitsandbytes makes less of them" in said(in_flight=True)
    shared = said(tensor_parallel=2)
    assert "\n  on each of 2 GPUs its weights alone need 0.00 GiB\n" in shared
    assert " on each of 2 GPUs, 1 GiB of it" in shared


def test_room(cards: Callable[..., None]) -> None:
    """What may be taken: the share that was asked for, less where less is free, of the fullest card; no KV cache's."""
    assert room(Serving(memory_share=0.5)) == Room(70 * GIB, "allowed (--gpu-memory-utilization 0.5)")
    assert room(Serving(memory_share=0.9)) == Room(120 * GIB)
    assert room(Serving(memory_share=0.9, kv_bytes=GIB)) == Room(119 * GIB, "free beside its KV cache")
    cards(0, 130 * GIB)
    assert room(Serving(memory_share=0.5, tensor_parallel=2)) == Room(10 * GIB, "free", 2)
    assert room(Serving(kv_bytes=99 * GIB, tensor_parallel=2)) == Room(0, "free beside its KV cache", 2)


def test_without_nvml_the_ledger_is_told(tiny_reference: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody tells what is free, what is needed is said all the same, and no guess of what would fit."""

    def silent(index: int = 0) -> Card:
        raise nvml.NvmlError("no driver")

    monkeypatch.setattr(nvml, "card", silent)
    said = accounted(tiny_reference, Serving(), [SHORT["the allocator"]])
    assert said.splitlines()[1] == "  its weights alone need 0.01 GiB"
    assert "fits" not in said


def test_what_has_no_ledger_is_told(tiny_reference: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose bytes cannot be told costs a line, not a second failure that hides the first."""
    monkeypatch.setitem(tiny_reference.config, "quantization_config", {"quant_method": "bitsandbytes"})
    said = accounted(tiny_reference, Serving(tensor_parallel=2), [SHORT["the allocator"]])
    assert said.strip()
    assert len(said.strip().splitlines()) == 1


# -- where it is said --------------------------------------------------------------------------------------------------


def fake(fault: str) -> tuple[str, ...]:
    """The command of the stand-in that has a fault."""
    return sys.executable, fake_vllm.__file__, fault


def test_a_server_that_does_not_start(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A start that ran out of memory is told with vLLM's words first, then the ledger, and no other likely cause."""
    with pytest.raises(EngineError) as failed:
        start_server(tiny_reference, Serving(), tmp_path, module=fake("is short of memory"))
    said = str(failed.value)
    assert said.index("CUDA out of memory") < said.index("its weights alone need") < said.index("fits: ")
    assert "likely" not in said


def test_a_start_that_failed_otherwise(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A start that failed otherwise is told without a ledger, even where its log lies in a folder named memory."""
    with pytest.raises(EngineError) as failed:
        start_server(tiny_reference, Serving(), tmp_path / "out of memory", module=fake("dies"))
    assert "its weights alone need" not in str(failed.value)


def test_a_server_that_dies_under_load(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A server that ran out of memory as it answered is told so, too."""
    server = start_server(tiny_reference, Serving(), tmp_path, module=fake("is short of memory when asked"))
    with server, pytest.raises(EngineError, match="does not answer") as failed:
        post(server, "chat/completions", {"model": "fake"})
    assert "its weights alone need" in str(failed.value)


def test_a_run_offline(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """An engine without a server says the same when memory ran out."""
    with pytest.raises(EngineError, match="does not run") as failed:
        offline.run(tiny_reference, Serving(), [], tmp_path, worker=fake("is short of memory"))
    assert "its weights alone need" in str(failed.value)


def test_unseen_shortages_are_seen(tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: who recognizes no shortage tells of none, which the checks above would see."""
    monkeypatch.setattr(shortage, "short_of_memory", lambda said: False)
    with pytest.raises(EngineError) as failed:
        start_server(tiny_reference, Serving(), tmp_path, module=fake("is short of memory"))
    assert "its weights alone need" not in str(failed.value)
