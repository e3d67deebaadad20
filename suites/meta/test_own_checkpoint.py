"""A user's own checkpoint: quantized and verified, or an artifact of somebody else's audited, AutoAWQ's of 2025 too."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.faults.editing import copied
from fixtures.quantizers import Job, calibration
from fixtures.quantizers.__main__ import main

ROOT = Path(__file__).parents[2]
VL = ADAPTERS["qwen2_5_vl"]


def verify(report: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The suites as a user runs them, and the results.json they write."""
    command = [sys.executable, "-m", "pytest", "suites", "--ignore=suites/meta", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "--family", "qwen2_5_vl", "--report", report, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run, json.loads((report / "results.json").read_text())


def failed(results: dict[str, Any]) -> set[str]:
    """Names of the checks that did not pass."""
    return {r["id"].split("::")[1].split("[")[0] for r in results["results"] if r["outcome"] != "passed"}


def judged(results: dict[str, Any]) -> int:
    """How many measurements were held against a bound."""
    return sum(m["bound"] is not None for r in results["results"] for m in r["measurements"])


@pytest.fixture
def mine(tiny_reference: Checkpoint, tmp_path: Path) -> Path:
    """A reference under a name of the user's."""
    return copied(tiny_reference.path, tmp_path / "My-Model")


def test_reference(mine: Path, tmp_path: Path) -> None:
    """``--reference DIR`` quantizes a user's checkpoint and proves the artifact."""
    run, results = verify(
        tmp_path / "report", "--reference", mine, "--cache", tmp_path / "cache", "--modality", "image",
        "--quantizer", "awq",
    )  # fmt: skip
    assert failed(results) == set(), run.stdout
    assert run.returncode == 0
    assert "qwen2_5_vl-My-Model-awq" in run.stdout
    assert {r["modality"] for r in results["results"]} == {None, "image"}
    assert judged(results) > 25


def test_quantized_by_command(mine: Path, tmp_path: Path) -> None:
    """What the quantizing command wrote is proved as an artifact, with calibration samples of the user's."""
    samples = tmp_path / "samples.jsonl"
    questions = [f"Add {n} to 1{n}0 and tell of a heron." for n in range(2, 10)]
    samples.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in questions))
    out = tmp_path / "artifact"
    assert main(["awq", "--reference", str(mine), "--out", str(out), "--calibration", str(samples)]) == 0
    run, results = verify(tmp_path / "report", "--reference", mine, "--artifact", out, "-k", "coverage or roundtrip")
    assert failed(results) == set(), run.stdout
    assert "qwen2_5_vl-My-Model-awq_artifact" in run.stdout
    assert judged(results) > 15


@pytest.fixture(scope="module")
def by_autoawq(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that AutoAWQ made and saved itself, with today's transformers."""
    if find_spec("awq") is None:
        pytest.skip('AutoAWQ is absent: pip install "quantproof[awq-peer]"')
    from fixtures.quantizers.peer_autoawq import save_with_autoawq

    out = tmp_path_factory.mktemp("peer") / "by-autoawq"
    samples = calibration.built_in(VL, per_modality=8)
    save_with_autoawq(Job(HubView(tiny_reference, VL), Recipe("autoawq", Scheme()), samples), out)
    return out


@pytest.mark.parametrize("names", ["in-memory names", "names of transformers 4.51"])
def test_artifact_of_autoawq(names: str, by_autoawq: Path, tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """AutoAWQ's artifact is audited under either naming: its weights hold, and its two real faults are found.

    Its skip list makes transformers 5 quantize the vision tower, and its saver turns sampling on.
    """
    artifact = copied(by_autoawq, tmp_path / "theirs")
    if names != "in-memory names":
        from fixtures.quantizers.peer_autoawq import rename_like_4_51

        rename_like_4_51(artifact)
    stored = Checkpoint(artifact).tensors
    assert ("visual.blocks.0.attn.qkv.weight" in stored) == (names != "in-memory names")
    run, results = verify(
        tmp_path / "report", "--reference", tiny_reference.path, "--artifact", artifact, "--modality", "image"
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert failed(results) == {"test_skip_list_in_transformers", "test_settings"}, run.stdout
    assert "set it to ['visual', 'model.visual', 'lm_head']" in run.stdout
    assert "do_sample: False -> True" in run.stdout
    assert judged(results) > 25
