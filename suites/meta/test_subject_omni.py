"""The shipped Qwen2.5-Omni subject is what the suites take it for: small, whole, and as hard as the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen2_5OmniForConditionalGeneration

from fixtures.subjects import DIGESTS, batches, reparametrize, shipped
from fixtures.subjects.omni.architecture import PARAMETER_LIMIT, SPEAKERS
from fixtures.subjects.omni.parallel import attend_to_windows_at_once
from fixtures.subjects.omni.train import code_nll, decoder_layers
from fixtures.subjects.samples import OMNI_MODALITIES, draw
from fixtures.subjects.storage import digests
from suites.meta.omni_subject import NAME, load, load_processor
from suites.meta.test_subjects import round_to_nearest, token_kl


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniForConditionalGeneration:
    return load()


@pytest.fixture(scope="module")
def processor() -> object:
    return load_processor()


@torch.no_grad()
def logits(model: Qwen2_5OmniForConditionalGeneration, processor: object, modality: str) -> Tensor:
    """Of every answer token of 24 held-out samples, teacher-forced: (token, vocabulary)."""
    batch = batches.encode(processor, draw(modality, "evaluation", 24), answers=True)
    kept = batch.pop("labels")[:, 1:] != batches.IGNORED
    return model.thinker(**batch, use_cache=False).logits[:, :-1][kept]


def quantize(model: Qwen2_5OmniForConditionalGeneration, bits: int) -> None:
    """Round every linear of the decoder layers to nearest, in place."""
    with torch.no_grad():
        for layers in decoder_layers(model).values():
            for linear in layers.modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.copy_(round_to_nearest(linear.weight, bits=bits))


# What ships


def test_digests() -> None:
    """Every shipped file is byte for byte the one that was trained and examined."""
    assert digests(shipped(NAME)) == json.loads(DIGESTS.read_text())[NAME]


def test_size(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """The subject has at most six million parameters and takes at most 15 MB."""
    size = sum(path.stat().st_size for path in shipped(NAME).rglob("*") if path.is_file())

    assert sum(parameter.numel() for parameter in model.parameters()) <= PARAMETER_LIMIT
    assert size <= 15_000_000, f"{size} bytes"


def test_layout() -> None:
    """The checkpoint is stored as on the hub: bfloat16, shards, hub names, all three models and their parts."""
    index = json.loads((shipped(NAME) / "model.safetensors.index.json").read_text())["weight_map"]
    dtypes = set()
    for shard in set(index.values()):
        with safe_open(shipped(NAME) / shard, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping

    assert len(set(index.values())) >= 2
    assert dtypes == {"BF16"}
    assert {".".join(name.split(".")[:2]) for name in index} == {
        "thinker.audio_tower",
        "thinker.lm_head",
        "thinker.model",
        "thinker.visual",
        "talker.codec_head",
        "talker.model",
        "talker.thinker_to_talker_proj",
        "token2wav.code2wav_bigvgan_model",
        "token2wav.code2wav_dit_model",
    }
    assert not [name for name in index if "language_model" in name]
    assert json.loads((shipped(NAME) / "config.json").read_text())["enable_audio_output"] is True


def test_speakers(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """Two speakers come with the checkpoint, each with a voice that token2wav can take."""
    diffusion = model.config.token2wav_config.dit_config

    assert tuple(model.speaker_map) == SPEAKERS
    for speaker in model.speaker_map.values():
        assert speaker["bos_token"] == model.config.talker_config.tts_text_start_token_id
        assert speaker["cond"].shape == (1, diffusion.enc_emb_dim)
        assert speaker["ref_mel"].shape[::2] == (1, diffusion.mel_dim)


# What is hard about the real one


def test_every_part_of_the_real_one(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Grouped queries, an untied head, token2wav's odd width, and Whisper's features are there."""
    text, talker = model.config.thinker_config.text_config, model.config.talker_config
    diffusion = model.config.token2wav_config.dit_config
    vision = model.config.thinker_config.vision_config

    assert text.num_key_value_heads < text.num_attention_heads
    assert talker.num_key_value_heads < talker.num_attention_heads
    assert not torch.equal(model.thinker.lm_head.weight, model.thinker.get_input_embeddings().weight)
    assert all(vision.intermediate_size % group for group in (16, 32, 64, 128))
    assert model.token2wav.code2wav_dit_model.input_embed.proj.in_features % 64
    assert diffusion.num_embeds >= talker.vocab_size
    assert talker.tts_codec_mask_token_id < talker.vocab_size
    assert type(processor.feature_extractor).__name__ == "WhisperFeatureExtractor"


def test_decoder_linears_fit_the_kernels(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """Every linear of a decoder layer has an input that groups of 128 divide, and outputs in 64s."""
    for layers in decoder_layers(model).values():
        linears = {name: linear for name, linear in layers.named_modules() if isinstance(linear, nn.Linear)}
        assert len(linears) == 7 * len(layers)
        assert not [name for name, linear in linears.items() if linear.in_features % 128 or linear.out_features % 64]


def test_biases(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """The audio tower's k has no bias where q and v have; the decoders' q, k and v all have one worth missing."""
    for layer in model.thinker.model.audio_tower.layers:
        assert layer.self_attn.k_proj.bias is None
        assert layer.self_attn.q_proj.bias.abs().mean() > 0.05
        assert layer.self_attn.v_proj.bias.abs().mean() > 0.05
    for layers in decoder_layers(model).values():
        for name, linear in layers.named_modules():
            if isinstance(linear, nn.Linear):
                expected = name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
                assert (linear.bias is not None) is expected, name
                assert not expected or linear.bias.abs().mean() > 0.05, name


def test_windows_of_sound(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Clips span several windows of the audio tower, and other windows hear something else."""
    tower = model.thinker.model.audio_tower
    batch = batches.encode(processor, draw("audio", "evaluation", 4), answers=False)
    inputs = {name: batch[name] for name in ("input_features", "feature_attention_mask")}
    window = tower.n_window

    assert (inputs["feature_attention_mask"].sum(-1) > 2 * window).all()
    with torch.no_grad():
        heard = model.thinker.get_audio_features(**inputs).last_hidden_state
        try:
            tower.n_window = 10 * window
            assert (model.thinker.get_audio_features(**inputs).last_hidden_state - heard).abs().max() > 0.01
        finally:
            tower.n_window = window


def test_all_windows_at_once(processor: object) -> None:
    """The attention that training on a GPU uses sees and hears what transformers' own does."""
    model = load()
    before = logits(model, processor, "mixed")
    attend_to_windows_at_once(model.thinker.model.visual, model.thinker.model.audio_tower)

    torch.testing.assert_close(logits(model, processor, "mixed"), before, rtol=1e-5, atol=1e-4)


def test_media_keep_their_size(processor: object) -> None:
    """The processor alone, told nothing, leaves videos as small as they are, and counts a second to a patch."""
    batch = batches.encode(processor, draw("video", "evaluation", 8), answers=False)
    audio = batches.encode(processor, draw("audio", "evaluation", 8), answers=False)

    assert batch["video_grid_thw"][:, 1:].max() <= 6
    assert batch["video_second_per_grid"].tolist() == [1.0] * 8
    assert set(audio["feature_attention_mask"].sum(-1).tolist()) <= {64, 96, 128}


def test_tokenizer_is_qwens(processor: object) -> None:
    """The special tokens, the default system turn and the numbered parts are Qwen2.5-Omni's."""
    parts = [
        {"type": "image_url", "image_url": "x"},
        {"type": "audio_url", "audio_url": "x"},
        {"type": "audio"},
        {"type": "video"},
        {"type": "text", "text": "Name the notes."},
    ]
    turn = [{"role": "user", "content": parts}]
    settings = {"add_generation_prompt": True, "add_vision_id": True, "add_audio_id": True}

    assert processor.apply_chat_template(turn, tokenize=False, **settings) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <|vision_bos|><|IMAGE|><|vision_eos|>"
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>"
        "Video 1: <|vision_bos|><|VIDEO|><|vision_eos|>"
        "Name the notes.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.tokenizer.eos_token == "<|im_end|>"
    assert (processor.image_token, processor.audio_token) == ("<|IMAGE|>", "<|AUDIO|>")
    assert len(processor.tokenizer("<|im_start|><tts_text_bos><tts_text_eod>")["input_ids"]) == 3


# What quantizers meet


def test_outliers_preserve_the_function(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Adding activation outliers to both decoders leaves every logit and every code's likelihood as it was."""
    changed = load()
    for layers in decoder_layers(changed).values():
        reparametrize.add_outliers(layers, factor=32.0, norm_channels=9, mlp_channels=17)
    drawn = draw("audio", "evaluation", 16)

    torch.testing.assert_close(
        logits(changed, processor, "audio"), logits(model, processor, "audio"), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        code_nll(changed, processor, drawn, masked=True),
        code_nll(model, processor, drawn, masked=True),
        rtol=1e-5,
        atol=1e-4,
    )


@contextmanager
def watched(layers: nn.ModuleList) -> Iterator[dict[str, Tensor]]:
    """The mean magnitude of each channel that the first linear of a block reads: name -> (channel,)."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        return lambda _, inputs: peaks.update({name: inputs[0].abs().flatten(0, -2).mean(0)})

    names = ("q_proj", "gate_proj", "down_proj")
    hooks = [
        module.register_forward_pre_hook(watch(name)) for name, module in layers.named_modules() if name.endswith(names)
    ]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("decoder", ["thinker", "talker"])
def test_outliers_are_there(decoder: str, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """In every decoder layer a few channels' activations stand out, before attention and in the MLP."""
    layers = decoder_layers(model)[decoder]
    with watched(layers) as peaks:
        code_nll(model, processor, draw("text", "evaluation", 8), masked=True)

    assert len(peaks) == 3 * len(layers)
    for name, peak in peaks.items():
        standing_out = (peak > 4 * peak.median()).sum().item()
        assert 2 <= standing_out <= len(peak) // 4, f"{name}: {standing_out} channels"


def test_round_to_nearest_does_damage(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """The plainest 4-bit quantization clearly moves answers and speech; 8 bits hardly do."""
    four, eight = load(), load()
    quantize(four, 4)
    quantize(eight, 8)

    for modality in OMNI_MODALITIES:
        reference = logits(model, processor, modality)
        assert token_kl(reference, logits(four, processor, modality)) > 0.01
        assert token_kl(reference, logits(eight, processor, modality)) < 0.001
    drawn = draw("text", "evaluation", 24)
    losses = {bits: code_nll(other, processor, drawn, masked=False).mean() for bits, other in ((4, four), (8, eight))}
    unharmed = code_nll(model, processor, drawn, masked=False).mean()
    assert losses[4] > unharmed + 0.1
    assert abs(losses[8] - unharmed) < 0.02
