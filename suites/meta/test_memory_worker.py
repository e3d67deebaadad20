"""A worker that measures memory: it fills its record and is heard, or fails in one line; no GPU is needed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.engines.loading import load_model
from fixtures.engines.process import session_pids
from fixtures.meters import nvml, vram, vram_worker
from fixtures.meters.census import tensors_of
from fixtures.meters.held import Held, Ledger
from fixtures.meters.memory import GIB, Measured, Peak, Reading, Record
from fixtures.meters.vram import Job, MeterError, measure, telling_line, told
from fixtures.meters.vram_worker import ran_out
from fixtures.subjects import shipped

RECORD = Record(
    Reading(0, 0, 2, 620), Reading(700, 690, 720, 1340), 690, {"text": Peak(800, 820, 1500, 30, 16)}, seconds=1.5
)
JOB = Job("/somewhere/vl-3b", "qwen2_5_vl", ("text", "image"))
TINY = Job(str(shipped("qwen2_5_vl-tiny")), "qwen2_5_vl", ("text", "image"), new_tokens=2)


# As it is waited for


def stub(folder: Path, body: str) -> str:
    """An interpreter that ignores what it is to run: a job comes as $3, a result is expected in $4."""
    file = folder / "python-stub"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_worker_is_heard(tmp_path: Path) -> None:
    """A worker gets its job, its progress is passed on, and its record comes back as it was written."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps(RECORD.to_json()))
    told: list[tuple[str, int, int]] = []
    body = f"cp $3 {tmp_path}/job; echo chatter; printf 'progress\\tvl-3b: loading\\t0\\t3\\n'; cp {record} $4"
    found = measure(JOB, lambda *what: told.append(what), python=stub(tmp_path, body))
    assert replace(found, drift=0) == RECORD
    assert told == [("vl-3b: loading", 0, 3)]
    assert Job.from_json(json.loads((tmp_path / "job").read_text())) == JOB


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("printf 'Traceback\\n  File x\\nCheckpointError: it lacks lm_head\\nbye\\n' >&2; exit 1", "it lacks lm_head"),
        ("exit 3", r"\(exit 3\): it said nothing"),
        ("echo '{\"half\": ' > $4", "could not be measured"),
        ("echo '{}' > $4", "could not be measured"),
        ("echo '[]' > $4", "could not be measured"),
        ("kill -9 $$", r"\(exit -9\)"),
    ],
)
def test_worker_that_fails(body: str, said: str, tmp_path: Path) -> None:
    """A worker that fails otherwise than by memory is one line that quotes its error."""
    with pytest.raises(MeterError, match=said) as error:
        measure(JOB, python=stub(tmp_path, body))
    assert "\n" not in str(error.value)
    assert "/somewhere/vl-3b" in str(error.value)


def test_worker_that_hangs(tmp_path: Path) -> None:
    """A worker that does not end is ended, with all that it started."""
    body = f"sleep 600 & echo $$ > {tmp_path}/session; echo 'Error: stuck' >&2; sleep 600"
    with pytest.raises(MeterError, match="was not measured within 1 s: Error: stuck"):
        measure(JOB, timeout=1, python=stub(tmp_path, body))
    assert session_pids(int((tmp_path / "session").read_text())) == frozenset()


def test_whole_card_tells_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others took of the card while the worker ran is in the record."""
    used = iter([GIB, 3 * GIB])
    monkeypatch.setattr(vram, "_used_by_all", lambda: next(used))
    record = tmp_path / "record.json"
    record.write_text(json.dumps(RECORD.to_json()))
    assert measure(JOB, python=stub(tmp_path, f"cp {record} $4")).drift == 2 * GIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_worker_without_a_gpu() -> None:
    """The real worker, in a real process, says in one line what is missing."""
    with pytest.raises(MeterError, match=r"could not be measured \(exit 1\): \w*Error: .*(NVML|CUDA)"):
        measure(TINY)


def test_measuring_needs_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML the parent knows nothing of the card, and says so by None."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert vram._used_by_all() is None
    assert issubclass(MeterError, UserError)


def test_telling_line() -> None:
    """The last error is quoted, or else the last line, or that there is none."""
    assert telling_line("a\nValueError: one\nRuntimeError: two\nbye") == "RuntimeError: two"
    assert telling_line("a\nb\n\n") == "b"
    assert telling_line("") == "it said nothing"


# As it measures


class FakeGpu:
    """Stands in for torch's allocator and NVML while the worker runs on a CPU."""

    def __init__(self, processes_told: bool) -> None:
        self.told = processes_told
        self.held = 0

    def grow(self, by: int) -> None:
        """Allocate so much more."""
        self.held += by

    def put(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module | Exception) -> None:
        """Take the place of the real ones; loading gives this model, or fails."""

        def load(*_: object) -> nn.Module:
            if isinstance(model, Exception):
                raise model
            self.grow(sum(tensor.nbytes for tensor in tensors_of(model)))
            return model

        def stats() -> dict[str, int]:
            held = {"allocated": self.held, "requested": self.held, "reserved": self.held + 2}
            return {f"{what}_bytes.all.current": size for what, size in held.items()}

        def card() -> nvml.Card:
            return nvml.Card("a card", "1", 100 * GIB, 7 + (self.held + 622 if self.context else 0))

        self.context = False
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "memory_stats", stats)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.held + 50)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: self.held + 60)
        monkeypatch.setattr(nvml, "card", card)
        monkeypatch.setattr(nvml, "process_bytes", self.process_bytes)
        monkeypatch.setattr(nvml, "bytes_of_others", lambda _: 5)
        monkeypatch.setattr(vram_worker, "DEVICE", "cpu")
        monkeypatch.setattr(vram_worker, "load", load)

    def process_bytes(self, _: object) -> int | None:
        """Of this process; asked for once the context is there."""
        self.context = True
        return self.held + 622 if self.told else None


@pytest.mark.parametrize("told", [True, False])
def test_worker_fills_its_record(
    told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context, the weights and each modality's peak are in the record, by process or by the card's change."""
    checkpoint = Checkpoint(TINY.checkpoint)
    model = load_model(checkpoint, ADAPTERS["qwen2_5_vl"], torch.float32)
    FakeGpu(told).put(monkeypatch, model)
    record = vram_worker.measure(TINY)
    size = sum(tensor.nbytes for tensor in tensors_of(model))
    assert (record.in_model, record.loaded.requested, record.loaded.card) == (size, size, size + 622)
    assert (record.context.allocated, record.context.card, record.context.outside) == (0, 622, 620)
    assert {name: (peak.allocated, peak.new_tokens) for name, peak in record.peaks.items()} == {
        "text": (size + 50, 2),
        "image": (size + 50, 2),
    }
    assert (record.per_process, record.others, record.failed) == (told, 5 if told else 7, "")
    assert "progress\tqwen2_5_vl-tiny in float16: answering image\t2\t3" in capsys.readouterr().out


def test_worker_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory that runs out is a record with what was being done, and an exit of 0; another error is none."""
    files = [tmp_path / "job", tmp_path / "result"]
    files[0].write_text(json.dumps(TINY.to_json()))
    FakeGpu(True).put(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert vram_worker.main(list(map(str, files))) == 0
    record = Record.from_json(json.loads(files[1].read_text()))
    assert (record.failed, record.loaded, record.free) == (
        "out of memory while loading",
        record.context,
        100 * GIB - 629,
    )
    FakeGpu(True).put(monkeypatch, CheckpointError("it lacks lm_head"))
    assert vram_worker.main(list(map(str, files))) == 1


def test_out_of_memory_is_recognized() -> None:
    """Memory that ran out is known by its error, however it was wrapped."""
    bottom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    wrapped = CheckpointError("does not load")
    wrapped.__cause__ = RuntimeError("loading")
    wrapped.__cause__.__context__ = bottom
    assert ran_out(bottom)
    assert ran_out(wrapped)
    assert not ran_out(CheckpointError("does not load"))


# Its record


def test_record_survives_json() -> None:
    """A record comes back from JSON as it was; one with a strange entry does not."""
    assert Record.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD
    with pytest.raises(TypeError):
        Record.from_json({**RECORD.to_json(), "strange": 1})


def test_told_by_hand() -> None:
    """Measured by hand, a checkpoint's bytes are told beside its ledger's."""
    said = told(Measured("vl", Ledger((Held("x", "visual", "16 bits", 3 << 20),), {}), RECORD))
    assert "predicted weights                        3.000 MiB" in said
    assert said[-1] == ", by NVML's count of the process, 2 s"
    with pytest.raises(SystemExit):
        vram.main(["nowhere"])
