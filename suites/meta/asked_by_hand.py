"""A question as arguments of a command line, and what the engine of the suites answers to it."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fixtures.core.media import read_wav
from fixtures.core.samples import Sample
from fixtures.engines.hf import TransformersEngine

HEARD_AT = 16000  # samples a second


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
