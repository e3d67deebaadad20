"""The shipped Qwen2.5-VL subject is what the suites take it for: small, whole, trained, hard to quantize."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from fixtures.subjects import DIGESTS, batches, reparametrize, samples, shipped, subject
from fixtures.subjects.architecture import PARAMETER_LIMIT
from fixtures.subjects.samples import MODALITIES, OMNI_MODALITIES, SPLITS, content_of, draw, overlap, split_of
from fixtures.subjects.storage import digests, written_whole

NAME = "qwen2_5_vl-tiny"
HELD_OUT = 96  # samples per modality: three standard deviations of a share of 0.98 are 0.043
TEXT_ANSWER = "2556 the grim ram sat in the odd hill early"  # of the first text of seed 3
PIXEL_DIGEST = "871e011f8f917129"  # of the first image and video of seed 3
EVERY_SPLIT = [(modality, split) for modality in OMNI_MODALITIES for split in SPLITS]


def load(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Qwen2_5_VLForConditionalGeneration, processor: object, modality: str) -> Tensor:
    """Of every answer token of 32 held-out samples, teacher-forced: (token, vocabulary)."""
    batch = batches.encode(processor, draw(modality, "evaluation", 32), answers=True)
    kept = batch.pop("labels")[:, 1:] != batches.IGNORED
    return model(**batch, use_cache=False).logits[:, :-1][kept]


def token_kl(reference: Tensor, other: Tensor) -> float:
    """The mean over tokens of KL(reference || other), in nats."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def round_to_nearest(weight: Tensor, group_size: int = 128, bits: int = 4) -> Tensor:
    """Asymmetric, per group of inputs, and back: the plainest quantizer there is."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).flatten(1)


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    return load(shipped(NAME))


@pytest.fixture(scope="module")
def processor() -> object:
    return AutoProcessor.from_pretrained(shipped(NAME))


# What ships


def test_digests() -> None:
    """Every shipped file is byte for byte the one that was trained and examined."""
    assert digests(shipped(NAME)) == json.loads(DIGESTS.read_text())[NAME]


def test_size(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """The subject has at most four million parameters and takes at most 10 MB."""
    size = sum(path.stat().st_size for path in shipped(NAME).rglob("*") if path.is_file())

    assert sum(parameter.numel() for parameter in model.parameters()) <= PARAMETER_LIMIT
    assert size <= 10_000_000, f"{size} bytes"


def test_unknown_name_lists_those_there_are() -> None:
    """Asking for a subject that does not exist says which do."""
    with pytest.raises(LookupError, match=NAME):
        shipped("qwen2_5_vl-huge")


def test_layout() -> None:
    """The checkpoint is stored as on the hub: bfloat16, shards, hub names, one copy of a tied head."""
    index = json.loads((shipped(NAME) / "model.safetensors.index.json").read_text())["weight_map"]
    dtypes = set()
    for shard in set(index.values()):
        with safe_open(shipped(NAME) / shard, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping

    assert len(set(index.values())) >= 2
    assert dtypes == {"BF16"}
    assert {name.split(".")[0] for name in index} == {"visual", "model"}
    assert not [name for name in index if "language_model" in name or name == "lm_head.weight"]


# What is hard about the real one


def test_every_part_of_the_real_one(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Grouped queries, kernel-sized dimensions, mRoPE and a vision MLP that no group size divides."""
    text, vision = model.config.text_config, model.config.vision_config
    attention = model.model.language_model.layers[0].self_attn

    assert text.num_hidden_layers >= 4
    assert (text.hidden_size % 128, text.intermediate_size % 128) == (0, 0)
    assert attention.head_dim == 64
    assert attention.v_proj.weight.shape != attention.o_proj.weight.shape
    assert sum(text.rope_parameters["mrope_section"]) == attention.head_dim // 2
    assert all(vision.intermediate_size % group for group in (16, 32, 64, 128))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_biases(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Every q, k and v has a bias large enough to be missed; no other linear of the decoder has one."""
    for name, linear in model.model.language_model.named_modules():
        if isinstance(linear, nn.Linear):
            expected = name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
            assert (linear.bias is not None) is expected, name
            assert not expected or linear.bias.abs().mean() > 0.05, name


def test_windows_differ_from_full_attention(model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """Pictures span several windows, and dropping either windowed or full attention changes what is seen."""
    tower = model.model.visual
    batch = batches.encode(processor, draw("image", "evaluation", 4), answers=False)
    pixels, grid = batch["pixel_values"], batch["image_grid_thw"]
    window = model.config.vision_config.window_size // model.config.vision_config.patch_size
    full = tower.fullatt_block_indexes

    assert (grid[:, 1:] > window).any(dim=1).all()
    assert 0 < len(full) < len(tower.blocks)
    with torch.no_grad():
        seen = tower(pixels, grid_thw=grid).pooler_output
        try:
            for wrong in ([], list(range(len(tower.blocks)))):
                tower.fullatt_block_indexes = wrong
                assert (tower(pixels, grid_thw=grid).pooler_output - seen).abs().max() > 0.01, wrong
        finally:
            tower.fullatt_block_indexes = full


def test_lengths_vary(processor: object) -> None:
    """Pictures and videos come in several sizes."""
    images = batches.encode(processor, draw("image", "evaluation", 16), answers=False)["image_grid_thw"]
    videos = batches.encode(processor, draw("video", "evaluation", 16), answers=False)["video_grid_thw"]

    assert len(images.unique(dim=0)) >= 3
    assert len(videos.unique(dim=0)) >= 3
    assert videos[:, 0].min() >= 2


def test_tokenizer_is_qwens(processor: object) -> None:
    """The special tokens, the default system turn and the numbered vision parts are Qwen's."""
    parts = [
        {"type": "image_url", "image_url": "x"},
        {"type": "video"},
        {"type": "text", "text": "Read the digits."},
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True, add_vision_id=True
    )

    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|>"
        "Read the digits.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.tokenizer.eos_token == "<|im_end|>"
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert len(processor.tokenizer("<|im_start|><|vision_end|><tool_call>")["input_ids"]) == 3


# What it knows


@pytest.mark.parametrize("modality", MODALITIES)
def test_accuracy(modality: str, model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """Greedy answers to held-out questions are nearly all right."""
    assert batches.accuracy(model, processor, draw(modality, "evaluation", HELD_OUT)) >= 0.93


@pytest.mark.parametrize("modality", MODALITIES)
def test_record(modality: str) -> None:
    """The training record says that each modality was learnt well, short of saturation, on many samples."""
    marks = json.loads((shipped(NAME) / "training" / "record.json").read_text())["held_out"][modality]

    assert 0.96 <= marks["accuracy"] < 1
    assert abs(marks["nll_nats_per_token"] - marks["entropy_nats_per_token"]) < 0.1


@pytest.mark.parametrize(("modality", "entropy"), [("text", 1.0), ("image", 0.3), ("video", 0.3)])
def test_entropy(modality: str, entropy: float, model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """Answers keep real entropy, of text at least 1 nat/token: the generator's, and as the model sees it."""
    drawn = draw(modality, "evaluation", 64)
    losses = batches.answer_nll(model, processor, drawn)

    assert sum(map(samples.answer_entropy, drawn)) / losses.numel() >= entropy
    assert losses.mean() >= entropy


# What quantizers meet


def test_outliers_preserve_the_function(model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """Adding activation outliers leaves every logit as it was, up to float32 rounding."""
    changed = load(shipped(NAME))
    layers = changed.model.language_model.layers
    reparametrize.add_outliers(layers, factor=32.0, norm_channels=9, mlp_channels=17)

    for modality in MODALITIES:
        torch.testing.assert_close(
            logits(changed, processor, modality), logits(model, processor, modality), rtol=1e-5, atol=1e-5
        )


def test_outliers_are_there(model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """In every decoder layer a few channels' activations stand far out, before attention and in the MLP."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        return lambda _, inputs: peaks.update({name: inputs[0].abs().flatten(0, -2).mean(0)})

    modules = {
        name: module
        for name, module in model.model.language_model.named_modules()
        if name.endswith(("q_proj", "gate_proj", "down_proj"))
    }
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        logits(model, processor, "text")
    finally:
        for hook in hooks:
            hook.remove()

    assert len(peaks) == 12
    for name, peak in peaks.items():
        standing_out = (peak > 16 * peak.median()).sum().item()
        assert 2 <= standing_out <= 64, f"{name}: {standing_out} channels"


def test_round_to_nearest_does_damage(model: Qwen2_5_VLForConditionalGeneration, processor: object) -> None:
    """The plainest 4-bit quantization clearly moves the distributions: a better one has something to save."""
    damaged = load(shipped(NAME))
    with torch.no_grad():
        for layer in damaged.model.language_model.layers:
            for linear in layer.modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(round_to_nearest(linear.weight))

    for modality in MODALITIES:
        assert token_kl(logits(model, processor, modality), logits(damaged, processor, modality)) > 0.02


def test_untied_variant(model: Qwen2_5_VLForConditionalGeneration, processor: object, tmp_path: Path) -> None:
    """The untied variant has a head of its own, unlike the embedding, and gives the very same logits."""
    folder = subject(f"{NAME}_untied", tmp_path)
    untied = load(folder)

    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for modality in MODALITIES:
        torch.testing.assert_close(
            logits(untied, processor, modality), logits(model, processor, modality), rtol=1e-5, atol=1e-5
        )


# What it is asked


def test_drawing_is_reproducible() -> None:
    """A sample is the same, to the last pixel, on every machine and Python version."""
    image = draw("image", "evaluation", 1, seed=3)[0]
    video = draw("video", "evaluation", 1, seed=3)[0]
    pixels = image.media("image")[0].tobytes() + video.media("video")[0].tobytes()

    assert draw("text", "evaluation", 1, seed=3)[0].answer == TEXT_ANSWER
    assert hashlib.sha256(pixels).hexdigest()[:16] == PIXEL_DIGEST


@pytest.mark.parametrize(("modality", "split"), EVERY_SPLIT)
def test_samples_agree_with_themselves(modality: str, split: str) -> None:
    """Each sample's own answer is right, and its content, read back from it, belongs to its split."""
    drawn = draw(modality, split, 100, seed=1)

    assert all(sample.is_right(sample.answer) for sample in drawn)
    assert {split_of(modality, content_of(sample)) for sample in drawn} == {split}
    assert len({content_of(sample) for sample in drawn}) == len({sample.id for sample in drawn}) == 100


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_wrong_answers_are_wrong(modality: str) -> None:
    """A sample's answer is not taken for the answer to another one."""
    first, second = draw(modality, "evaluation", 2)

    assert not first.is_right(second.answer)
    assert not first.is_right("")


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_splits_do_not_overlap(modality: str) -> None:
    """No held-out question is trained or calibrated with."""
    held_out = draw(modality, "evaluation", 300)

    assert not overlap(held_out, draw(modality, "train", 3000))
    assert not overlap(held_out, draw(modality, "calibration", 300))


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_planted_overlap_is_found(modality: str) -> None:
    """The check of the splits sees a held-out question among the training ones, even under another name."""
    held_out, trained = draw(modality, "evaluation", 20), draw(modality, "train", 20)
    planted = replace(held_out[7], id=trained[3].id)

    assert overlap(held_out, [*trained, planted]) == [held_out[7].id]


@pytest.mark.parametrize("arguments", [("smell", "train"), ("text", "test")])
def test_unknown_samples(arguments: tuple[str, str]) -> None:
    """Asking for a modality or a split that does not exist says which do."""
    with pytest.raises(ValueError, match="there are"):
        draw(*arguments, 1)


# How it is made


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    """A checkpoint whose writing fails leaves the one before it in place, and no debris."""
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "old").touch()

    def fail() -> None:
        with written_whole(folder) as temporary:
            (temporary / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "subject",
        "subject/old",
    ]
