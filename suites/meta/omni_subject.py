"""The shipped Qwen2.5-Omni subject, as the tests of it load it."""

from __future__ import annotations

import torch
from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration

from fixtures.subjects import shipped

NAME = "qwen2_5_omni-tiny"


def load() -> Qwen2_5OmniForConditionalGeneration:
    return Qwen2_5OmniForConditionalGeneration.from_pretrained(shipped(NAME), dtype=torch.float32).eval()


def load_processor() -> object:
    return AutoProcessor.from_pretrained(shipped(NAME))
