"""The memory meters themselves: NVML, the worker process and what becomes of its failures; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.media import Hearing
from fixtures.engines.loading import load_model
from fixtures.engines.process import session_pids
from fixtures.faults import memory as faults
from fixtures.memory_under_test import SUBJECTS, Lazily
from fixtures.meters import nvml, vram, vram_worker
from fixtures.meters.census import tensors_of
from fixtures.meters.held import Held, Ledger
from fixtures.meters.memory import Measured, Peak, Reading, Record
from fixtures.meters.questions import enlarged, question, sample
from fixtures.meters.vram import Job, MeterError, loading_dtype, measure, telling_line, told
from fixtures.meters.vram_worker import ran_out
from fixtures.subjects import shipped

GIB = 1 << 30
RECORD = Record(
    Reading(0, 0, 2, 620), Reading(700, 690, 720, 1340), 690, {"text": Peak(800, 820, 1500, 30, 16)}, seconds=1.5
)


# -- NVML --------------------------------------------------------------------------------------------------------------


class FakeNvmlError(Exception):
    """NVML's own error."""


def fake_nvml(processes: Mapping[int, int | None], *, used: int = GIB, broken: str = "") -> ModuleType:
    """A module like pynvml, of one card on which these processes hold so many bytes."""
    fake = ModuleType("pynvml")
    asked: list[object] = []

    def handle(which: object) -> object:
        asked.append(which)
        if which not in (0, 3, "GPU-abc"):
            raise FakeNvmlError("Invalid Argument")
        return which

    def start() -> None:
        if broken == "init":
            raise FakeNvmlError("Driver Not Loaded")

    def running(_: object) -> list[Any]:
        if broken == "processes":
            raise FakeNvmlError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes.items()]

    vars(fake).update(
        NVMLError=FakeNvmlError, nvmlMemory_v2=2, nvmlInit=start, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=handle, nvmlDeviceGetHandleByUUID=handle, asked=asked,
        nvmlDeviceGetName=lambda _: b"NVIDIA H200", nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetMemoryInfo=lambda _, version: SimpleNamespace(total=4 * GIB, used=used, version=version),
        nvmlDeviceGetComputeRunningProcesses=running, nvmlDeviceGetGraphicsRunningProcesses=lambda _: [],
    )  # fmt: skip
    return fake


@pytest.fixture
def with_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Puts a fake NVML in place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*args: Any, **kwargs: Any) -> ModuleType:
        fake = fake_nvml(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def test_card(with_nvml: Callable[..., ModuleType]) -> None:
    """A card tells its name, driver and memory."""
    with_nvml({})
    assert nvml.card() == nvml.Card("NVIDIA H200", "580.1", 4 * GIB, GIB)
    assert nvml.card().free == 3 * GIB


def test_bytes_by_process(with_nvml: Callable[..., ModuleType]) -> None:
    """Own processes are added up, others' apart from them."""
    with_nvml({10: 5, 11: 7, 12: 100})
    assert nvml.process_bytes({10, 11}) == 12
    assert nvml.bytes_of_others({10, 11}) == 100
    assert nvml.bytes_of_others({10, 11, 12}) == 0


def test_ours_are_all_that_the_run_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own processes are the one that runs it and all below it; another run's are strangers."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setenv(nvml.RUN, str(os.getpid()))
        assert {os.getpid(), child.pid} <= nvml.ours()
        assert os.getppid() not in nvml.ours()
        monkeypatch.setenv(nvml.RUN, str(child.pid))
        assert nvml.ours() == {os.getpid(), child.pid}
        assert child.stdin is not None
        child.stdin.close()
    monkeypatch.setenv(nvml.RUN, str(child.pid))  # which has ended
    assert os.getpid() in nvml.ours()


@pytest.mark.parametrize(
    ("processes", "broken"), [({}, ""), ({99: 7}, ""), ({10: None}, ""), ({10: 5, 11: None}, ""), ({}, "processes")]
)
def test_bytes_that_nvml_does_not_tell(
    processes: Mapping[int, int | None], broken: str, with_nvml: Callable[..., ModuleType]
) -> None:
    """Where NVML knows no own process, or hides one's bytes, the answer is None, never 0 or a part."""
    with_nvml(processes, broken=broken)
    assert nvml.process_bytes({10, 11}) is None


def test_others_that_nvml_does_not_tell(with_nvml: Callable[..., ModuleType]) -> None:
    """Another process whose bytes are hidden makes others' bytes unknown."""
    with_nvml({10: 5, 99: None})
    assert nvml.bytes_of_others({10}) is None


@pytest.mark.parametrize(("visible", "physical"), [("", 0), ("3", 3), ("3,0", 3), ("GPU-abc", "GPU-abc")])
def test_visible_devices(
    visible: str, physical: int | str, with_nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first card is the first one that CUDA sees, which NVML by itself does not know."""
    fake = with_nvml({})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.card()
    assert fake.asked == [physical]


def test_no_such_card(with_nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is not there, and an NVML that does not start, cost one line."""
    with_nvml({})
    with pytest.raises(nvml.NvmlError, match="Invalid Argument"):
        nvml.card(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(nvml.NvmlError, match="there is no GPU 1"):
        nvml.card(1)
    with_nvml({}, broken="init")
    with pytest.raises(nvml.NvmlError, match="does not start"):
        nvml.card()


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pynvml the command that installs it is named."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlError, match="pip install nvidia-ml-py"):
        nvml.card()


# -- the worker process ------------------------------------------------------------------------------------------------


def stub(folder: Path, body: str) -> str:
    """An interpreter that ignores what it is to run: a job comes as $3, a result is expected in $4."""
    file = folder / "python-stub"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


JOB = Job("/somewhere/vl-3b", "qwen2_5_vl", ("text", "image"))


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


TINY = Job(str(shipped("qwen2_5_vl-tiny")), "qwen2_5_vl", ("text", "image"), new_tokens=2)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_worker_without_a_gpu() -> None:
    """The real worker, in a real process, says in one line what is missing."""
    with pytest.raises(MeterError, match=r"could not be measured \(exit 1\): \w*Error: .*(NVML|CUDA)"):
        measure(TINY)


def test_telling_line() -> None:
    """The last error is quoted, or else the last line, or that there is none."""
    assert telling_line("a\nValueError: one\nRuntimeError: two\nbye") == "RuntimeError: two"
    assert telling_line("a\nb\n\n") == "b"
    assert telling_line("") == "it said nothing"


def test_out_of_memory_is_recognized() -> None:
    """Memory that ran out is known by its error, however it was wrapped."""
    bottom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    wrapped = CheckpointError("does not load")
    wrapped.__cause__ = RuntimeError("loading")
    wrapped.__cause__.__context__ = bottom
    assert ran_out(bottom)
    assert ran_out(wrapped)
    assert not ran_out(CheckpointError("does not load"))


# -- questions ---------------------------------------------------------------------------------------------------------


def test_questions_are_large() -> None:
    """A picture has 448 x 448 pixels, a video 8 such frames, a sound 3 seconds."""
    heard = Hearing(16000, 400, 480000)
    picture, video, sound = (sample(modality, heard) for modality in ("image", "video", "audio"))
    assert picture.media("image")[0].size == (448, 448)
    assert video.media("video")[0].shape == (8, 448, 448, 3)
    assert sound.media("audio")[0].shape == (48000,)
    short = Hearing(16000, 400, 9600)
    assert sample("audio", short).media("audio")[0].shape == (9600,)
    frames = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 255)])
    bigger = enlarged({"type": "video", "video": frames}, None)["video"]
    assert [int(frame.mean()) for frame in bigger] == [0, 0, 0, 0, 255, 255, 255, 255]
    assert enlarged({"type": "image", "image": Image.new("RGB", (3, 5))}, None)["image"].size == (448, 448)


def test_questions_are_answered() -> None:
    """A loaded model answers in every modality of its family with as many tokens as asked for, end of turn or not."""
    adapter = ADAPTERS["qwen2_5_vl"]
    checkpoint = Checkpoint(shipped("qwen2_5_vl-tiny"))
    ask = question(checkpoint, adapter, load_model(checkpoint, adapter, torch.float32), 3)
    found = {modality: ask(modality) for modality in adapter.modalities}
    assert {new for _, new in found.values()} == {3}
    assert found["video"][0] > found["image"][0] > found["text"][0] > 0


# -- values and faults -------------------------------------------------------------------------------------------------


def test_told_by_hand() -> None:
    """Measured by hand, a checkpoint's bytes are told beside its ledger's."""
    said = told(Measured("vl", Ledger((Held("x", "visual", "16 bits", 3 << 20),), {}), RECORD))
    assert "predicted weights                        3.000 MiB" in said
    assert said[-1] == ", by NVML's count of the process, 2 s"
    with pytest.raises(SystemExit):
        vram.main(["nowhere"])


def test_record_survives_json() -> None:
    """A record comes back from JSON as it was; one with a strange entry does not."""
    assert Record.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD
    with pytest.raises(TypeError):
        Record.from_json({**RECORD.to_json(), "strange": 1})


def test_looked_at_when_needed() -> None:
    """Reference and artifact are measured when a check looks, so that a failure is the check's."""
    looked: list[str] = []
    both = Lazily(lambda name: looked.append(name) or name.upper())  # type: ignore[func-returns-value]
    assert (len(both), list(both), looked) == (2, list(SUBJECTS), [])
    assert (both["artifact"], looked) == ("ARTIFACT", ["artifact"])
    with pytest.raises(KeyError):
        both["other"]


def test_bitsandbytes_are_loaded_as_stored() -> None:
    """A reference is loaded in float16, an artifact of bitsandbytes in the 16 bits that it is stored in."""
    reference = Checkpoint(shipped("qwen2_5_vl-tiny"))
    assert loading_dtype(reference) == torch.float16
    reference.config["quantization_config"] = {"quant_method": "bitsandbytes"}
    stored = {info.dtype for info in reference.tensors.values()}
    assert loading_dtype(reference) == (torch.bfloat16 if "BF16" in stored else torch.float16)


class WQLinear_GEMM(nn.Linear):  # noqa: N801 - AutoAWQ's name
    """A stand-in for AutoAWQ's module."""


def test_faults_are_planted() -> None:
    """A planted copy is held by the model, in sight of its census or not; an unknown fault is refused."""
    model = nn.Sequential(WQLinear_GEMM(8, 8, bias=False), WQLinear_GEMM(4, 8, bias=False))
    before = sum(tensor.nbytes for tensor in tensors_of(model))
    faults.plant("every copy kept", model)
    assert sum(tensor.nbytes for tensor in tensors_of(model)) == before
    assert [module.__dict__["_kept"][0].numel() for module in model] == [64, 32]
    faults.plant("copy registered", model)
    assert sum(tensor.nbytes for tensor in tensors_of(model)) == before + 2 * 32
    with pytest.raises(LookupError, match="no fault 'imaginary'"):
        faults.plant("imaginary", model)
    with pytest.raises(LookupError, match="nothing in this model is stored as codes"):
        faults.plant("one copy kept", nn.Sequential(nn.Linear(2, 2)))


def test_shared_storage_counts_once() -> None:
    """A head tied to an embedding is one tensor."""
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    assert sum(tensor.nbytes for tensor in tensors_of(nn.Sequential(embedding, head))) == 8 * 4 * 4


def test_measuring_needs_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML the parent knows nothing of the card, and says so by None."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert vram._used_by_all() is None
    assert issubclass(MeterError, UserError)
