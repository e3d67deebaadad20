"""Bad input costs one clear line and a non-zero exit: what was wrong, where, what to do; nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.audit import settings
from fixtures.core.checkpoint import INDEX, Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.recipe import Recipe
from fixtures.faults.editing import copied, edit_json, edit_shard, edit_tensor
from fixtures.quantizers import QUANTIZERS, Job, check_recipe, quantize, recipe_for
from fixtures.quantizers import artifact as artifacts
from fixtures.quantizers.__main__ import main
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped

ROOT = Path(__file__).parents[2]


@pytest.fixture
def damaged(tiny_reference: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the shipped reference, to be damaged."""
    return copied(tiny_reference.path, tmp_path / "damaged")


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    """The single line that a failed run says on stderr."""
    assert "Traceback" not in run.stdout + run.stderr, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.strip()]
    return line


def suites(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Pytest in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "suites", "--ignore=suites/meta", "-q", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


BROKEN_REFERENCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda d: [f.unlink() for f in d.glob("model*")], "has neither model.safetensors nor"),
    "wrong family": (lambda d: edit_json(d, "config.json", lambda c: c.update(model_type="llama")), "'llama'"),
    "missing shard": (lambda d: next(d.glob("model-00002*")).unlink(), "which is missing"),
    "truncated shard": (lambda d: _truncate(next(d.glob("model-00001*"))), "is truncated"),
}


@pytest.mark.parametrize("case", BROKEN_REFERENCES)
def test_broken_reference(case: str, damaged: Path) -> None:
    """A reference that is none ends the run before it starts, with one line that names the file."""
    damage, said = BROKEN_REFERENCES[case]
    damage(damaged)
    line = one_line(run := suites("--family", "qwen2_5_vl", "--reference", damaged))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in line
    assert str(damaged) in line


def test_artifact_that_lacks_a_part(tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path) -> None:
    """An artifact whose codes have no scales is refused, naming the linear."""
    artifact = copied(good_artifact, tmp_path / "artifact")
    name = "model.layers.1.mlp.up_proj.scales"
    edit_shard(artifact, name, lambda tensors: tensors.__delitem__(name))
    arguments = ("--family", "qwen2_5_vl", "--reference", tiny_reference.path, "--artifact", artifact)
    line = one_line(run := suites(*arguments))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "model.layers.1.mlp.up_proj: lacks its scales" in line


CHOICES: dict[str, tuple[list[str], str]] = {
    "unknown quantizer": (["--quantizer", "aqw"], "unknown quantizer 'aqw'; did you mean 'awq'?"),
    "unknown modality": (["--modality", "vidoe"], "did you mean 'video'?"),
    "unknown family": (["--family", "qwen2_5_lv"], "did you mean 'qwen2_5_vl'?"),
    "audio on VL": (["--family", "qwen2_5_vl", "--modality", "audio"], "unknown modality of qwen2_5_vl 'audio'"),
    "artifact without reference": (["--artifact", "."], "--artifact needs --reference"),
    "reference without family": (["--reference", "."], "--reference needs --family"),
    "missing calibration": (["--calibration", "nowhere.jsonl"], "no such calibration file: nowhere.jsonl"),
    "missing limits": (["--limits", "nowhere.toml"], "limits nowhere.toml cannot be read"),
    "group size dividing nothing": (["--group-size", "100"], "divides no linear of"),
    "unknown device": (["--device", "bogus"], "device 'bogus' cannot be used here"),
    "group size zero": (["--group-size", "0"], "group size 0: must be positive"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_bad_choice(case: str) -> None:
    """A word that means nothing is refused, with the nearest one that does."""
    arguments, said = CHOICES[case]
    line = one_line(run := suites(*arguments))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in line


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", ADAPTERS)
def test_default_recipe(family: str, quantizer: str) -> None:
    """What a quantizer does where nobody says otherwise fits the shipped checkpoints, so that no run need check it."""
    view = HubView(Checkpoint(shipped(f"{family}-tiny")), ADAPTERS[family])
    check_recipe(Job(view, recipe_for(quantizer, None), ()))
    assert Job(view, recipe_for(quantizer, None), ()).to_quantize


def test_artifact_of_another_reference(good_artifact: Path, damaged: Path) -> None:
    """An artifact is refused when its shapes are not the reference's, naming the first that differs."""
    edit_tensor(damaged, "model.layers.0.input_layernorm.weight", lambda norm: norm[:64])
    line = one_line(run := suites("--family", "qwen2_5_vl", "--reference", damaged, "--artifact", good_artifact))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is not an artifact of" in line
    assert "model.layers.0.input_layernorm.weight is 256 there and 64 in the reference" in line


def test_artifact_as_reference(good_artifact: Path) -> None:
    """A quantized checkpoint is refused as a reference."""
    line = one_line(suites("--family", "qwen2_5_vl", "--reference", good_artifact))
    assert "is quantized; pass it as --artifact" in line


def test_gpu_without_gpu() -> None:
    """``-m gpu`` without a usable GPU is an error of one line, not a page of skips."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no usable GPU" in one_line(run)


COMMANDS: dict[str, tuple[list[str], str]] = {
    "unknown quantizer": (["aqw"], "did you mean 'awq'?"),
    "three bits": (["rtn", "--bits", "3"], "stores 4-bit codes"),
    "five bits": (["rtn", "--bits", "5"], "must be one of 2, 3, 4, 8"),
    "group size dividing nothing": (["rtn", "--group-size", "100"], "divides no linear of"),
    "missing calibration": (["awq", "--calibration", "nowhere.jsonl"], "no such calibration file"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_command(case: str, tiny_reference: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quantizing command refuses what it cannot do in one line, and writes nothing."""
    arguments, said = COMMANDS[case]
    out = tmp_path / "out"
    code = main([*arguments, "--reference", str(tiny_reference.path), "--out", str(out)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """An artifact is never written over something that is there."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists; choose another"):
        quantize(tiny_reference, Recipe("rtn"), [], tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_nan_in_the_reference(damaged: Path, tmp_path: Path) -> None:
    """A NaN in a weight stops quantization, naming the layer, and leaves nothing."""

    def plant(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_shard(damaged, "model.layers.1.mlp.up_proj.weight", plant)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of .* weights are NaN"):
        quantize(Checkpoint(damaged), Recipe("rtn"), [], tmp_path / "out")
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["of the system", "of safetensors"],
)
def test_full_disk(
    error: Exception, tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while quantizing is one line, and no half artifact is left."""

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(UserError, match="disk full while writing"):
        quantize(tiny_reference, Recipe("rtn"), [], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(how: signal.Signals, tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Ctrl-C while quantizing, or the end of a cancelled job, leaves nothing behind, and says so."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "fixtures.quantizers",
        "awq",
        "--reference",
        str(tiny_reference.path),
        "--out",
        str(out),
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # until it has begun to write
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
    # A shell says 130 of both: Python ends itself by the signal if that came while some import ran a string of code
    # (every dataclass does), however well it was handled.
    assert process.returncode in (130, -signal.SIGINT)
    assert "interrupted; nothing was written" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_killed_run_is_not_reused(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """What a killed run left half-made is thrown away, and the artifact made anew."""
    made = cached_artifact(tiny_reference, Recipe("rtn"), [], tmp_path)
    half = tmp_path / f".{made.name}.partial-12345"
    made.rename(half)
    (half / INDEX).unlink()
    again = cached_artifact(tiny_reference, Recipe("rtn"), [], tmp_path)
    assert again == made
    assert not half.exists()
    assert Checkpoint(again).quantization is not None


def test_cache_knows_what_differs(tiny_reference: Checkpoint, damaged: Path, tmp_path: Path) -> None:
    """Another reference or recipe is another artifact; the same one is not made twice."""
    first = cached_artifact(tiny_reference, Recipe("rtn"), [], tmp_path / "cache")
    stamp = (first / INDEX).stat().st_mtime_ns
    assert cached_artifact(tiny_reference, Recipe("rtn"), [], tmp_path / "cache") == first
    assert (first / INDEX).stat().st_mtime_ns == stamp
    edit_tensor(damaged, "model.norm.weight", lambda norm: norm * 2)
    assert cached_artifact(Checkpoint(damaged), Recipe("rtn"), [], tmp_path / "cache").name != first.name
    assert json.loads((first / "quantproof" / "recipe.json").read_text())["recipe"]["quantizer"] == "rtn"


def test_calibration_file(tmp_path: Path) -> None:
    """A line of a calibration file that cannot be read is named, with what is wrong with it."""
    from fixtures.quantizers.calibration import from_jsonl

    good = '{"messages": [{"role": "user", "content": "hello"}]}'
    for bad, said in (
        ("{", "Expecting property name"),
        ('{"messages": []}', 'starts with a "user" turn'),
        ('{"message": []}', "lacks 'messages'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}', "no.png"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}', "a.wav"),
        ('{"messages": [{"role": "user", "content": [{"type": "smell", "smell": "a"}]}]}', "'smell'"),
    ):
        file = tmp_path / "samples.jsonl"
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(UserError, match=r"samples\.jsonl:2: ") as caught:
            from_jsonl(file)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no samples"):
        from_jsonl(file)


def _truncate(shard: Path) -> None:
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 100)


@pytest.mark.parametrize("value", ["512", None])
def test_tokenizer_that_reads_no_text(value: str | None, tmp_path: Path) -> None:
    """A tokenizer that only fails when it is used is refused in one line, too; one without a longest text is used."""
    folder = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "mine")
    edit_json(folder, "tokenizer_config.json", lambda stored: stored.update(model_max_length=value))
    read = settings.READERS["tokenizer"]
    if value is None:
        assert read(Checkpoint(folder))["probes"]
        return
    with pytest.raises(CheckpointError, match="mine: its tokenizer reads no text: "):
        read(Checkpoint(folder))
