"""Models whose memory is measured: loaded as stored, each tensor counted once, faults planted, questions answered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.media import Hearing
from fixtures.engines.loading import load_model
from fixtures.faults import memory as faults
from fixtures.memory_under_test import SUBJECTS, Lazily
from fixtures.meters.census import tensors_of
from fixtures.meters.questions import enlarged, question, sample
from fixtures.meters.vram import loading_dtype
from fixtures.subjects import shipped

# What is measured


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


def test_shared_storage_counts_once() -> None:
    """A head tied to an embedding is one tensor."""
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    assert sum(tensor.nbytes for tensor in tensors_of(nn.Sequential(embedding, head))) == 8 * 4 * 4


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


# Questions


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
