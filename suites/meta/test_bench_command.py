"""The bench as a command: runs side by side, each in a process of its own, taken up again, and extrapolated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.bench import command
from fixtures.bench.comparison import Spread
from fixtures.bench.extrapolation import Line, extrapolated, table
from fixtures.bench.judging import Judged
from fixtures.bench.losses import GroupLosses
from fixtures.bench.measuring import Made, Task
from fixtures.bench.telling import COLUMNS, Bench, lines, run_of
from fixtures.bench.telling import table as side_by_side
from fixtures.core.errors import UserError
from fixtures.core.peak import peak_memory
from fixtures.core.results import Run
from fixtures.subjects import shipped
from reports import store

REFERENCE = shipped("qwen2_5_vl-tiny")


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command, its work done in this process: no fresh one to wait for."""
    monkeypatch.setattr(command, "in_fresh_process", lambda progress, work, *args: work(*args, progress=progress))

    def run(*arguments: str) -> int:
        given = ["--reference", str(REFERENCE), "--tokens", "2x32", "--out", str(tmp_path / "bench"), *arguments]
        return command.main(given)

    return run


def test_side_by_side(here: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantizers take turns; each is a row, one that is absent with the command that installs it; and it can go on."""
    asked = ("--only", "awq", "--only", "rtn", "--only", "llm-compressor", "--held-out", "1", "--judged-layers", "1")
    absent = "No module named" if not _installed() else ""
    assert here(*asked, "--runs", "1") == 0
    first = capsys.readouterr()
    assert first.err.index("run 1 of 1, awq") < first.err.index("run 1 of 1, rtn")
    if absent:
        assert "pip install llmcompressor" in first.out
    results = tmp_path / "bench" / "results.json"
    once = store.load(results)
    (result,) = once.results
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in result.tables[0].rows}
    assert rows["awq"]["runs"] == rows["rtn"]["runs"] == 1
    assert rows["awq"]["loss of RTN's, median"] < 1 == rows["rtn"]["loss of RTN's, median"]
    assert rows["rtn"]["worst"] < 1
    assert rows["awq"]["mean token KL, nats"] > 0
    took = timedelta(seconds=once.about["seconds"])
    assert datetime.fromisoformat(once.about["started"]) + took <= datetime.now(UTC), "when it ended is no start"
    assert once.about["machine"]
    assert once.about["versions"]["torch"]

    assert here(*asked, "--runs", "2") == 0
    again = capsys.readouterr()
    assert "run 1 of 2, awq" not in again.err
    assert "run 2 of 2, awq" in again.err
    twice = store.load(results)
    assert [row[1] for row in twice.results[0].tables[0].rows[:2]] == [2, 2]
    assert not list((tmp_path / "bench" / "artifacts").glob(".again-*"))


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("llmcompressor") is not None


def test_fresh_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run has a process of its own, whose peak is not that of whoever started it."""
    ballast = torch.ones(1 << 28)  # 1 GiB in this process
    out = tmp_path / "bench"
    asked = ["--reference", str(REFERENCE), "--tokens", "2x32", "--only", "rtn", "--runs", "1", "--no-judge"]
    assert command.main([*asked, "--out", str(out)]) == 0
    (made,) = Bench.from_json(json.loads((out / "bench.json").read_text())).made
    assert made.peaks["memory"] < peak_memory() - ballast.nbytes / 2
    assert "not judged" in capsys.readouterr().out


@pytest.mark.parametrize(("fails", "code"), [("rtn", 0), ("awq", 1)])
def test_failure_is_a_row(fails: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that fails is a row with one line, whatever it raised; only ours makes the bench fail."""
    read = "0" * 64

    def work(_progress: Any, _work: Any, task: Task) -> Made:
        if task.quantizer == fails:
            raise RuntimeError("CUDA error\nand a page of traceback")
        return Made(task.quantizer, {"search": 1.0}, 1.0, {"memory": 1}, 1, read)

    monkeypatch.setattr(command, "in_fresh_process", work)
    asked = ["--reference", str(REFERENCE), "--tokens", "2x32", "--only", "awq", "--only", "rtn", "--no-judge"]
    assert command.main([*asked, "--out", str(tmp_path / "bench")]) == code
    (result,) = store.load(tmp_path / "bench" / "results.json").results
    notes = {str(row[0]): row[-1] for row in result.tables[0].rows}
    assert notes[fails] == "RuntimeError: CUDA error"
    assert result.outcome == ("failed" if code else "passed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--reference DIR is what to quantize"),
        (["--reference", "nowhere"], "no such folder: nowhere"),
        (["--tokens", "128"], "write texts by tokens, such as 128x512"),
        (["--tokens", "0x512"], "write texts by tokens"),
        (["--tokens", "2x5"], "the chat template alone takes"),
        (["--tokens", "2x32", "--calibration", "a.jsonl"], "give one"),
        (["--calibration", "nowhere.jsonl"], "no such calibration file"),
        (["--only", "bnb-nf4"], "bnb-nf4 has another format"),
        (["--only", "awk"], "did you mean 'awq'"),
        (["--runs", "0"], "must be at least 1"),
        (["--device", "tpu"], "device 'tpu' cannot be used here"),
        (["--extrapolate", "80"], "two benches that differ in layers"),
        (["--extrapolate", "80", "--of", "a.json", "b.json"], "cannot read a.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked for wrongly costs one line and exit code 2, and nothing has run."""
    reference = (
        [] if not arguments or {"--reference", "--extrapolate"} & {*arguments} else ["--reference", str(REFERENCE)]
    )
    assert command.main([*reference, *arguments, "--out", str(tmp_path / "bench")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bench" / "artifacts").exists()


@pytest.mark.parametrize("change", ["reference", "calibration", "versions"])
def test_other_runs_are_not_mixed_in(change: str, tmp_path: Path) -> None:
    """A folder with runs of another reference, calibration set or version is refused, as is one that is broken."""
    kept = Bench({"reference": "a", "calibration": ["b"], "versions": {"torch": "2"}})
    (tmp_path / "bench.json").write_text(json.dumps(kept.to_json()))
    assert command.opened(tmp_path, kept).subject == kept.subject
    with pytest.raises(UserError, match=f"with another {change}; choose another --out"):
        command.opened(tmp_path, Bench({**kept.subject, change: "other"}))
    (tmp_path / "bench.json").write_text('{"subject": 3}')
    with pytest.raises(UserError, match="is not a bench"):
        command.opened(tmp_path, kept)


def test_finding_outlives_its_artifacts(
    here: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where artifacts were left behind nothing is judged anew, and what was found of them stays."""
    read = Made("rtn", {"search": 1.0}, 1.0, {"memory": 1}, 1, "")
    monkeypatch.setattr(command, "in_fresh_process", lambda *_: read)
    asked = ("--only", "rtn", "--runs", "1")
    assert here(*asked, "--no-judge") == 0
    file = tmp_path / "bench" / "bench.json"
    kept = Bench.from_json(json.loads(file.read_text()))
    kept.judged = Judged((GroupLosses("t", 0, "qkv", {"rtn": 1.0}),), {"rtn": 0.5}, {}, 1, 1)
    file.write_text(json.dumps(kept.to_json()))
    assert here(*asked) == 0
    assert "not judged: the artifact of rtn is not in" in capsys.readouterr().err
    assert Bench.from_json(json.loads(file.read_text())).judged == kept.judged


def test_random_weights_are_said() -> None:
    """Whoever reads a KL of random weights is told that it says little."""
    judged = Judged((), {"awq": 1.0}, {}, 100, 10)
    about = {"name": "n", "calibration": "c", "device": "d", "weights": " (random)"}
    assert "on 10 held-out tokens (random)" in lines(Bench({}, about, judged=judged))[-1]


# -- more layers -----------------------------------------------------------------------------------------------


def deep(
    layers: int,
    *seconds: float,
    peak: int = 2 * 10**9,
    on: str = "memory",
    by: str = "awq",
    talker: int = 0,
    **subject: Any,
) -> Run:
    """A bench of a model of so many layers, one run for each of the seconds."""
    peaks = {"memory": 10**9, on: peak}
    made = [Made(by, {"search": s - 1, "load": 1.0}, s, peaks, 1, "") for s in seconds]
    depths = [layers, talker] if talker else [layers]
    about = {"name": "n", "family": "f", "size": "s", "layers": depths, "calibration": "c", "device": "d"}
    found = {"group size": 128, "device": "d", "versions": {}, **subject}
    return run_of(Bench(found, {**about, "weights": ""}, made), "bench", Path(), datetime.now(UTC))


def test_extrapolation() -> None:
    """Two depths give what a layer takes and what is apart from layers, over every pair of runs."""
    found = {line.quantity: line for line in extrapolated([deep(4, 14.0, 15.0), deep(2, 10.0)], 80)}
    assert found["seconds"].per_layer == Spread(2.25, 2.0, 2.5)
    assert found["seconds"].constant == Spread(5.5, 5.0, 6.0)
    assert found["seconds"].at == Spread(185.5, 166.0, 205.0)
    assert found["load"].at.mean == 1
    assert found["search"].at.mean == pytest.approx(184.5)
    assert table(list(found.values()), 80).rows[0][:2] == ("awq", "seconds")


def test_memory_of_many_layers() -> None:
    """Our engine holds three layers on a GPU, of however many; on a CPU, and with a talker, memory is a line."""

    def peak(*depths: int, **more: Any) -> Line:
        held = {1: 18, 2: 20, 4: 21}
        runs = [deep(depth, 1.0 * depth, peak=held[depth] * 10**9, **more) for depth in depths]
        (found,) = (line for line in extrapolated(runs, 80) if line.quantity == "peak")
        return found

    known, unknown = peak(2, 4, on="allocator"), peak(1, 2, on="allocator")
    assert (known.at.mean, known.per_layer.mean) == (21, 0)
    assert math.isnan(unknown.at.mean)
    assert str(unknown) == f"awq, peak: {table([unknown], 80).rows[0][4]}"
    assert "bench one of 3 or more" in unknown.said
    assert peak(2, 4, on="memory").at.mean == pytest.approx(59)
    assert peak(2, 4, on="allocator", talker=24).at.mean == pytest.approx(59)
    assert peak(2, 4, on="allocator", by="autoawq").at.mean == pytest.approx(59)


def test_noise_is_not_extrapolated() -> None:
    """Where more layers took less time, no number is told of many: it would be negative, or a matter of luck."""
    found = {line.quantity: line for line in extrapolated([deep(2, 20.0), deep(4, 14.0)], 80)}
    assert math.isnan(found["seconds"].at.mean)
    assert "noise, run again" in str(found["seconds"])
    assert found["load"].at.mean == 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (deep(2, 1.0), "both have 2 layers"),
        (deep(4, 1.0, device="another"), "differ in device"),
        (deep(4), "no quantizer ran in both"),
        (Run({}), "a results.json of a bench is needed"),
    ],
    ids=["same-depth", "other-device", "no-runs", "no-bench"],
)
def test_what_cannot_be_extrapolated(other: Run, said: str) -> None:
    """Two benches that differ in something else than layers, or in nothing, say nothing of a layer."""
    with pytest.raises(UserError, match=said):
        extrapolated([deep(2, 1.0), other], 80)


def test_table_of_no_numbers() -> None:
    """A comparison that is no number reads so in the table, not as one that was never made."""
    groups = (GroupLosses("t", 0, "qkv", {"awq": math.nan, "rtn": 1.0}),)
    made = [Made(name, {"search": 1.0}, 1.0, {"memory": 1}, 1, "") for name in ("awq", "rtn")]
    bench = Bench({}, {}, made, judged=Judged(groups, {"awq": 1.0, "rtn": math.nan}, {}, 1, 1))
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in side_by_side(bench).rows}
    assert rows["awq"]["loss of RTN's, median"] == rows["rtn"]["worst"] == rows["rtn"]["mean token KL, nats"] == "nan"
    assert rows["rtn"]["groups where awq's is no larger"] == "0% of 1"
