"""Asking by hand: the answer is the engine's in every modality, said as it comes, timed, and spoken on demand."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines.__main__ import main
from fixtures.engines.asking import Listener, Question, TransformersAnswerer
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.speech import SpeechEngine
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites.meta.asked_by_hand import greedy, on_disk

ROOT = Path(__file__).parents[2]
VL, OMNI = ADAPTERS["qwen2_5_vl"], ADAPTERS["qwen2_5_omni"]


@pytest.fixture(scope="module")
def vl() -> TransformersEngine:
    """The shipped VL as the engine of the suites."""
    return TransformersEngine(Checkpoint(shipped("qwen2_5_vl-tiny")), VL, torch.float32)


@pytest.fixture(scope="module")
def omni() -> TransformersEngine:
    """The shipped Omni as the engine of the suites."""
    return TransformersEngine(Checkpoint(shipped("qwen2_5_omni-tiny")), OMNI, torch.float32)


@pytest.mark.parametrize("modality", VL.modalities)
def test_streams_the_greedy_answer(
    modality: str, vl: TransformersEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed of a prompt and its files is what the engine of the suites answers to the same sample."""
    arguments, sample = on_disk(draw(modality, "evaluation", 1)[0], tmp_path)
    tokens, text = greedy(vl, sample)
    assert main(["ask", "--model", str(shipped("qwen2_5_vl-tiny")), *arguments, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{text}\n"
    assert f"{len(tokens)} of answer" in err
    assert all(word in err for word in ("reference", "tokens/s", "first token after", "weights", "resident"))


@pytest.mark.parametrize("modality", OMNI.modalities)
def test_streams_omnis_answer(
    modality: str, omni: TransformersEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Omni's text answer is the engine's in every modality, sound and several media at once included."""
    arguments, sample = on_disk(draw(modality, "evaluation", 1)[0], tmp_path)
    assert main(["ask", "--model", str(shipped("qwen2_5_omni-tiny")), *arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{greedy(omni, sample)[1]}\n"


def test_as_a_user_runs_it(vl: TransformersEngine) -> None:
    """The command of the documentation works in a process of its own: answer on stdout, all else on stderr."""
    (sample,) = draw("text", "evaluation", 1)
    prompt = sample.content[0]["text"]
    command = [sys.executable, "-m", "fixtures.engines", "ask", "--model", str(shipped("qwen2_5_vl-tiny")), prompt]
    run = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, greedy(vl, sample)[1] + "\n"), run.stderr


def test_comes_piece_by_piece(vl: TransformersEngine) -> None:
    """An answer is said as it comes, not at its end, and is timed."""
    (sample,) = draw("text", "evaluation", 1)
    tokens, text = greedy(vl, sample)
    pieces: list[str] = []
    answerer = TransformersAnswerer(Checkpoint(shipped("qwen2_5_vl-tiny")), VL, "cpu")
    told = answerer.ask(Question(sample, len(tokens) + 8), pieces.append)
    answerer.close()
    assert len(pieces) > len(tokens) // 2
    assert "".join(pieces) == told.text == text
    assert told.tokens == tuple(tokens)
    assert told.first > 0
    assert told.tokens_per_second > 0


def test_new_tokens_are_counted(vl: TransformersEngine, capsys: pytest.CaptureFixture[str]) -> None:
    """``--max-new-tokens`` cuts the answer where it says."""
    (sample,) = draw("text", "evaluation", 1)
    prompt = sample.content[0]["text"]
    assert main(["ask", "--model", str(shipped("qwen2_5_vl-tiny")), prompt, "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == vl.processor.tokenizer.decode(greedy(vl, sample)[0][:3], skip_special_tokens=True)
    assert "3 of answer" in err


def test_temperature_samples(tiny_reference: Checkpoint) -> None:
    """A temperature makes the answers differ from draw to draw, and none does not."""
    (sample,) = draw("text", "evaluation", 1)
    answerer = TransformersAnswerer(tiny_reference, VL, "cpu")
    for temperature, several in ((0.0, False), (5.0, True)):
        said = {answerer.ask(Question(sample, 8, temperature), lambda _: None).tokens for _ in range(4)}
        assert (len(said) > 1) is several


def test_never_says_half_a_character() -> None:
    """A character of several tokens is said once it is whole; what never becomes one, at the end."""

    def decode(tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode(errors="replace")

    pieces: list[str] = []
    listener = Listener(SimpleNamespace(decode=decode), pieces.append)
    spoken = "aé漢b".encode() + b"\xe6\xbc"
    listener.put(torch.zeros(1, 5))  # the prompt
    for byte in spoken:
        listener.put(torch.tensor([byte]))
    assert pieces == ["a", "é", "漢", "b"]
    listener.end()
    assert pieces[4:] == ["\ufffd"]
    assert (listener.prompt_tokens, listener.tokens) == (5, list(spoken))


def test_speaks(omni: TransformersEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--speak`` writes what Omni says aloud, the vocoder's samples of its codec tokens, into a WAV file."""
    (sample,) = draw("text", "evaluation", 1)
    arguments = ["ask", "--model", str(shipped("qwen2_5_omni-tiny")), "--device", "cpu"]
    assert main([*arguments, "--speak", str(tmp_path / "said.wav"), sample.content[0]["text"]]) == 0
    speech = SpeechEngine(omni.model, OMNI, omni.processor)
    take = speech.take(sample)
    said = (speech.waveform(take.codes).clamp(-1, 1) * 32767).to(torch.int16).numpy()
    with wave.open(str(tmp_path / "said.wav")) as file:
        assert file.getframerate() == 24_000
        np.testing.assert_allclose(np.frombuffer(file.readframes(len(said) + 1), "<i2"), said, atol=1)
    assert f"{len(take.codes)} codec tokens" in capsys.readouterr().err
