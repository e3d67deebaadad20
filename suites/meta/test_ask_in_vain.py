"""Asking by hand in vain: bad input costs one line, Ctrl-C one word, and nothing a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.__main__ import main
from fixtures.engines.asking import Listener, TransformersAnswerer
from fixtures.engines.loading import load_processor
from fixtures.faults.editing import copied, edit_json
from fixtures.subjects import shipped

ROOT = Path(__file__).parents[2]
MODEL = ["--model", str(shipped("qwen2_5_vl-tiny"))]
OTHER = str(shipped("qwen2_5_omni-tiny"))
WRONG: dict[str, tuple[list[str], str]] = {
    "missing file": ([*MODEL, "--image", "nowhere.png", "x"], "nowhere.png: no such file"),
    "missing video": ([*MODEL, "--video", "nowhere.gif", "x"], "nowhere.gif: no such file"),
    "audio for VL": ([*MODEL, "--audio", "a.wav", "x"], "qwen2_5_vl does not take audio; it takes text, image, video"),
    "no image": ([*MODEL, "--image", __file__, "x"], "not an image"),
    "no sound": (["--model", OTHER, "--audio", __file__, "x"], "not a WAV file"),
    "not a checkpoint": (["--model", str(ROOT), "x"], "not a checkpoint"),
    "no folder": (["--model", "nowhere", "x"], "no such folder: nowhere"),
    "empty prompt": ([*MODEL, " "], "the prompt is empty"),
    "too many tokens": ([*MODEL, "--max-new-tokens", "2048", "x"], "more than the 2048 that qwen2_5_vl-tiny takes"),
    "no tokens": ([*MODEL, "--max-new-tokens", "0", "x"], "must be at least 1"),
    "long prompt": ([*MODEL, "word " * 4000], "the model takes"),
    "unknown engine": ([*MODEL, "--engine", "vlm", "x"], "did you mean 'vllm'?"),
    "unknown device": ([*MODEL, "--device", "bogus", "x"], "device 'bogus' cannot be used here"),
    "cold": ([*MODEL, "--temperature", "-1", "x"], "must be 0 (greedy) or more"),
    "two families": ([*MODEL, "--compare", OTHER, "x"], "not qwen2_5_vl"),
    "speech of VL": ([*MODEL, "--speak", "x.wav", "x"], "does not speak"),
    "kernel of hf": ([*MODEL, "--kernel", "marlin", "x"], "--kernel is for --engine vllm"),
    "comparing chance": ([*MODEL, "--compare", OTHER, "--temperature", "1", "x"], "needs greedy answers"),
}


# What is wrong


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be asked costs one line that says why, and exit code 2, before anything is loaded."""
    arguments, said = WRONG[case]
    assert main(["ask", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_bad_input_of_a_process(tmp_path: Path) -> None:
    """A broken checkpoint has no traceback in a process of its own either."""
    broken = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "broken")
    edit_json(broken, "config.json", lambda config: config.update(model_type="llama"))
    command = [sys.executable, "-m", "fixtures.engines", "ask", "--model", str(broken), "x"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "'llama'" in line


def test_processor_is_the_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint without its processor is refused in one line."""
    broken = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "broken")
    for file in broken.glob("*processor*"):
        file.unlink()
    assert main(["ask", "--model", str(broken), "x"]) == 2
    assert "has no processor that loads" in capsys.readouterr().err
    assert load_processor(Checkpoint(shipped("qwen2_5_vl-tiny")))


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without vLLM, or without a GPU, its engine says so, with the command that would help, and exits with 2."""
    missing = {"vllm"}
    monkeypatch.setattr("fixtures.engines.served.find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for said in ("pip install 'quantproof[vllm]'", "needs an NVIDIA GPU"):
        assert main(["ask", *MODEL, "--engine", "vllm", "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        missing.clear()


# Interrupted


def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C ends it with one word and code 130."""
    image = tmp_path / "never.png"
    os.mkfifo(image)
    command = [sys.executable, "-m", "fixtures.engines", "ask", *MODEL, "--image", str(image), "x"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed() -> None:  # whoever runs the tests in the background ignores Ctrl-C, and so would all that they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **piped) as process:  # type: ignore[call-overload]
        writer = None
        while writer is None and process.poll() is None:  # until it reads there, for something that never comes
            with suppress(OSError):
                writer = os.open(image, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert writer is not None
    os.close(writer)
    assert (process.returncode, out) == (130, "")
    assert err.split() == ["interrupted"]


def test_interrupted_answer(
    tiny_reference: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of an answer keeps what was said, and ends as cleanly; the memory is given back."""
    closed: list[bool] = []
    put: Callable[..., None] = Listener.put

    def interrupted(self: Listener, tokens: torch.Tensor) -> None:
        put(self, tokens)
        if len(self.tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Listener, "put", interrupted)
    monkeypatch.setattr(TransformersAnswerer, "close", lambda _: closed.append(True))
    assert main(["ask", *MODEL, "--device", "cpu", "Add 1 to 1234 and tell of a cat."]) == 130
    out, err = capsys.readouterr()
    assert out
    assert err.splitlines()[-1] == "interrupted"
    assert closed == [True]
