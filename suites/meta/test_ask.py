"""Asking by hand: the answer is the engine's, streamed; two are compared token by token; bad input costs one line."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint, TensorInfo
from fixtures.core.media import read_wav
from fixtures.core.samples import Sample
from fixtures.engines import ways
from fixtures.engines.__main__ import difference, main, ratio, speed
from fixtures.engines.asking import Listener, Question, Told, TransformersAnswerer
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import compute_dtype, load_processor, runs_by_library
from fixtures.engines.speech import SpeechEngine
from fixtures.engines.ways import way_to_run
from fixtures.faults.awq_codes import all_scales_off
from fixtures.faults.editing import copied, edit_json
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw

ROOT = Path(__file__).parents[2]
VL, OMNI = ADAPTERS["qwen2_5_vl"], ADAPTERS["qwen2_5_omni"]
HEARD_AT = 16000  # samples a second


@pytest.fixture(scope="module")
def vl() -> TransformersEngine:
    """The shipped VL as the engine of the suites."""
    return TransformersEngine(Checkpoint(shipped("qwen2_5_vl-tiny")), VL, torch.float32)


@pytest.fixture(scope="module")
def omni() -> TransformersEngine:
    """The shipped Omni as the engine of the suites."""
    return TransformersEngine(Checkpoint(shipped("qwen2_5_omni-tiny")), OMNI, torch.float32)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ's library is not looked for: the weights are decoded by us."""
    monkeypatch.setattr(ways, "runs_by_library", lambda _: False)


def on_disk(sample: Sample, folder: Path) -> tuple[list[str], Sample]:
    """A sample as arguments of a command line, its media in files, and as what those files hold."""
    arguments, parts = [], []
    for number, part in enumerate(sample.content):
        file = folder / f"{number}"
        match part["type"]:
            case "image":
                part["image"].save(file := file.with_suffix(".png"))
            case "video":
                file.mkdir()
                for frame, pixels in enumerate(part["video"]):
                    Image.fromarray(pixels).save(file / f"{frame}.png")
            case "audio":
                write_wav(file := file.with_suffix(".wav"), part["audio"])
                part = {**part, "audio": read_wav(file, HEARD_AT)}
            case "text":
                arguments.append(part["text"])
        if part["type"] != "text":
            arguments += [f"--{part['type']}", str(file)]
        parts.append(part)
    return arguments, replace(sample, content=tuple(parts))


def write_wav(file: Path, waveform: np.ndarray) -> None:  # type: ignore[type-arg]
    """16-bit PCM."""
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, HEARD_AT, 0, "NONE", ""))
        out.writeframes((waveform * 32767).astype("<i2").tobytes())


def greedy(engine: TransformersEngine, sample: Sample) -> tuple[list[int], str]:
    """What the engine of the suites says to a sample: tokens and text."""
    (tokens,) = engine.greedy([sample])
    return tokens, engine.processor.tokenizer.decode(tokens, skip_special_tokens=True)


# -- one answer ------------------------------------------------------------------------------------------------------


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


def test_says_how_an_artifact_runs(
    good_artifact: Path, tiny_reference: Checkpoint, decoded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """An artifact whose library is not used says that our dequantization decoded it; a reference does not."""
    for folder, said in ((good_artifact, True), (tiny_reference.path, False)):
        assert main(["ask", "--model", str(folder), "--device", "cpu", "Add 1 to 1234 and tell of a cat."]) == 0
        err = capsys.readouterr().err
        assert ("decoded by our reference dequantization" in err) is said
        assert ("awq 4-bit g128" in err) is said


def test_library_of_an_artifact(good_artifact: Path, tiny_reference: Checkpoint) -> None:
    """A reference needs no library; an artifact runs by its own exactly where that is installed."""
    assert not runs_by_library(tiny_reference)
    assert runs_by_library(Checkpoint(good_artifact)) is (find_spec("gptqmodel") is not None)


def test_answers_by_the_librarys_kernels(
    tiny_reference: Checkpoint, selection: Selection, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bitsandbytes artifact answers as its library's modules do, and names them."""
    pytest.importorskip("bitsandbytes", reason='bitsandbytes is absent: pip install "quantproof[bnb]"')
    artifact = Checkpoint(cached_artifact(tiny_reference, recipe_for("bnb-nf4", None), [], selection.cache))
    (sample,) = draw("text", "evaluation", 1)
    tokens, text = greedy(TransformersEngine(artifact, VL, torch.bfloat16, kernels=True), sample)
    prompt, count = sample.content[0]["text"], str(len(tokens))
    assert main(["ask", "--model", str(artifact.path), "--device", "cpu", "--max-new-tokens", count, prompt]) == 0
    out, err = capsys.readouterr()
    assert out == f"{text}\n"
    assert "the library's kernels (Linear4bit)" in err


def test_best_way_of_awq(good_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ runs by GPTQModel's kernels, else packed by AutoAWQ's on a GPU, else decoded; on GPUs packed in float16."""
    artifact = Checkpoint(good_artifact)
    for gptqmodel, autoawq, device, load, dtype in (
        (True, True, "cuda", ways.load_by_transformers, torch.float16),
        (True, True, "cpu", ways.load_by_transformers, torch.float32),
        (False, True, "cuda", ways.load_packed, torch.float16),
        (False, True, "cpu", ways.load_model, torch.float32),
        (False, False, "cuda", ways.load_model, torch.float32),
    ):
        monkeypatch.setattr(ways, "runs_by_library", lambda _, there=gptqmodel: there)
        monkeypatch.setattr(ways, "_has_autoawq", lambda there=autoawq: there)
        way = way_to_run(artifact, device)
        assert (way.load, way.dtype) == (load, dtype)


def test_sixteen_bits_on_a_gpu() -> None:
    """A large checkpoint computes in 16 bits on a GPU, an artifact of mostly integer tensors too; on a CPU in 32."""

    def computed(device: str, **tensors: tuple[str, int]) -> torch.dtype:
        infos = {name: TensorInfo(dtype, (count,), "model.safetensors") for name, (dtype, count) in tensors.items()}
        checkpoint = Checkpoint(shipped("qwen2_5_vl-tiny"))
        checkpoint.tensors = infos
        return compute_dtype(checkpoint, device)

    codes = {f"codes{number}": ("I32", 10**9) for number in range(3)}
    awq = {**codes, "scales": ("F16", 10**7), "embedding": ("BF16", 10**8)}
    assert computed("cuda", **awq) == torch.bfloat16
    assert computed("cpu", **awq) == torch.float32
    assert computed("cuda", codes=("U8", 10**10), absmax=("F32", 10**6), head=("F16", 10**8)) == torch.float16
    assert computed("cuda", weights=("BF16", 10**6)) == torch.float32  # small: exact


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


# -- two answers -----------------------------------------------------------------------------------------------------


def test_compares_two(
    tiny_reference: Checkpoint,
    good_artifact: Path,
    tmp_path: Path,
    decoded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``--compare`` shows both answers, and names the first token at which a damaged artifact leaves the good one."""
    broken = copied(good_artifact, tmp_path / "broken")
    all_scales_off(4.0)(broken)
    good, bad = (TransformersEngine(Checkpoint(folder), VL, torch.float32) for folder in (good_artifact, broken))
    for sample in draw("text", "evaluation", 8):
        (left, left_text), (right, right_text) = greedy(good, sample), greedy(bad, sample)
        if left != right:
            break
    place = next(n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    prompt = sample.content[0]["text"]
    count = str(min(len(left), len(right)))  # the engine cuts what does not end
    arguments = ["ask", "--model", str(good_artifact), "--device", "cpu", "--max-new-tokens", count, prompt]
    assert main([*arguments, "--compare", str(broken)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0::2][:2] == [f"== {good_artifact.name}", "== broken"]
    assert left_text.startswith(lines[1])
    assert right_text.startswith(lines[3])
    decode = good.processor.tokenizer.decode
    assert lines[4] == (
        f"first different at token {place + 1}: {decode([left[place]])!r} and {decode([right[place]])!r}; "
        f"same before it: {place}"
    )
    assert err.count("tokens/s, first token") == 2
    assert "of the first's speed" in err

    assert main([*arguments, "--compare", str(copied(good_artifact, tmp_path / "same"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"the same, all {count} tokens"


def test_says_where_answers_part() -> None:
    """The first difference is that of tokens, even where one answer begins with the other; speeds are compared."""
    told = {
        name: Told("", tokens, 9, 0.5, seconds)
        for name, tokens, seconds in (("a", (7, 8, 9), 1.0), ("longer", (7, 8, 9, 4), 6.0), ("other", (7, 1, 9), 1.0))
    }
    tokenizer = SimpleNamespace(decode=lambda tokens: f"<{tokens[0]}>")
    assert difference(told["a"], told["a"], tokenizer) == "the same, all 3 tokens"
    assert difference(told["a"], told["other"], tokenizer).startswith("first different at token 2: '<8>' and '<1>'")
    assert difference(told["longer"], told["a"], tokenizer).startswith("first different at token 4: '<4>' and nothing")
    assert ratio(told["a"], told["longer"]) == "2 and 0.5 tokens/s: 0.25 of the first's speed"
    alone = Told("", (7,), 9, 0.5, 0.0)
    assert math.isnan(alone.tokens_per_second)
    assert "too short" in speed(alone)
    assert "too short" in ratio(told["a"], alone)


# -- what is wrong ---------------------------------------------------------------------------------------------------

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


def test_processor_is_the_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint without its processor is refused in one line."""
    broken = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "broken")
    for file in broken.glob("*processor*"):
        file.unlink()
    assert main(["ask", "--model", str(broken), "x"]) == 2
    assert "has no processor that loads" in capsys.readouterr().err
    assert load_processor(Checkpoint(shipped("qwen2_5_vl-tiny")))
