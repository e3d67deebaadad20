"""The shipped Qwen2.5-Omni subject is what the suites take it for: small, whole, trained to hear and to speak."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration

from fixtures.subjects import DIGESTS, batches, reparametrize, shipped
from fixtures.subjects.omni import speech
from fixtures.subjects.omni.architecture import PARAMETER_LIMIT, SPEAKERS
from fixtures.subjects.omni.parallel import attend_to_windows_at_once
from fixtures.subjects.omni.speaking import Spoken, of_one_length, reply_tokens, speak
from fixtures.subjects.omni.train import code_nll, decoder_layers
from fixtures.subjects.samples import OMNI_MODALITIES, answer_entropy, draw
from fixtures.subjects.storage import digests
from suites.meta.test_subjects import round_to_nearest, token_kl

NAME = "qwen2_5_omni-tiny"
HELD_OUT = 64  # samples per modality: three standard deviations of a share of 0.98 are 0.053
SOUND_DIGEST = "1e7f285656be60c6"  # of the first clip of seed 3
SAMPLES_PER_CODE = 480  # of the waveform: two frames of the spectrogram of 240 each
HASTY = {"token2wav_num_steps": 2}  # where only the codes are looked at


def load() -> Qwen2_5OmniForConditionalGeneration:
    return Qwen2_5OmniForConditionalGeneration.from_pretrained(shipped(NAME), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniForConditionalGeneration:
    return load()


@pytest.fixture(scope="module")
def processor() -> object:
    return AutoProcessor.from_pretrained(shipped(NAME))


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((shipped(NAME) / "training" / "record.json").read_text())


@pytest.fixture(scope="module")
def spoken(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> list[Spoken]:
    """Answers to held-out sums, with their stories; all prompts are equally long."""
    return speak(model, processor, draw("text", "evaluation", 16), **HASTY)


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


# What it knows


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_accuracy(modality: str, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Greedy answers to held-out questions are nearly all right."""
    assert batches.accuracy(model.thinker, processor, draw(modality, "evaluation", HELD_OUT)) >= 0.92


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_record(modality: str, record: dict) -> None:
    """The training record says that each modality was learnt well, short of saturation, on many samples."""
    marks = record["held_out"][modality]

    assert 0.96 <= marks["accuracy"] < 1
    assert abs(marks["nll_nats_per_token"] - marks["entropy_nats_per_token"]) < 0.1


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_record_of_speech(modality: str, record: dict) -> None:
    """The training record says that answers of each modality are spoken rightly, alone and in padded batches."""
    marks = record["held_out"][modality]["speech"]

    for case in ("", "_padded"):
        assert marks[f"codes_right{case}"] >= 0.96
        assert abs(marks[f"nll_nats_per_code{case}"] - marks["entropy_nats_per_code"]) < 0.1


@pytest.mark.parametrize(
    ("modality", "entropy"), [("text", 1.0), ("image", 0.3), ("video", 0.3), ("audio", 0.3), ("mixed", 0.3)]
)
def test_entropy(modality: str, entropy: float, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Answers keep real entropy, of text at least 1 nat/token: the generator's, and as the model sees it."""
    drawn = draw(modality, "evaluation", 32)
    losses = batches.answer_nll(model.thinker, processor, drawn)

    assert sum(map(answer_entropy, drawn)) / losses.numel() >= entropy
    assert losses.mean() >= entropy


# What it says


def test_speech_says_the_text(spoken: list[Spoken]) -> None:
    """Greedy codes say the reply that they were spoken for, and end where it ends."""
    assert sum(reply.share_right for reply in spoken) / len(spoken) >= 0.95


def test_speech_depends_on_the_text(spoken: list[Spoken]) -> None:
    """Held against the reply's words in another order, few codes are right."""
    rng = random.Random(0)
    wrong = [speech.share_right(reply.codes, rng.sample(reply.tokens, len(reply.tokens))) for reply in spoken]

    assert sum(wrong) / len(wrong) < 0.3


def test_speech_alone_and_padded(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Answers are spoken rightly with padding in the batch and without, which the talker is handed differently."""
    samples = draw("mixed", "evaluation", 4) + draw("mixed", "evaluation", 4, seed=1)
    image = draw("image", "evaluation", 8)
    alone = [speak(model, processor, part, **HASTY) for part in of_one_length(processor, samples)]
    padded = speak(model, processor, image, **HASTY)

    assert len(of_one_length(processor, image)) > 1
    assert sum(reply.share_right for replies in alone for reply in replies) / 8 >= 0.9
    assert sum(reply.share_right for reply in padded) / 8 >= 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_speech_keeps_entropy(masked: bool, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """The talker is as uncertain of a code as the codec leaves it: more than 0.8 nats."""
    drawn = draw("text", "evaluation", 32)
    losses = code_nll(model, processor, drawn, masked=masked)
    entropy = sum(speech.entropy(reply_tokens(processor, sample.answer)) for sample in drawn) / losses.numel()

    assert entropy > 0.8
    assert abs(losses.mean() - entropy) < 0.1


def test_codec() -> None:
    """A token has three codes, which the token before decides on; saying too little or too much is wrong."""
    tokens = ["2", "5", "Ġfox"]
    codes = speech.pronounce(random.Random(0), tokens)

    assert [len(triple) for triple in speech.triples(tokens)] == [3, 3, 3]
    assert speech.variants("Ġfox", "5") != speech.variants("Ġfox", "55")
    assert max(speech.variants(token, before).stop for token in map(chr, range(300)) for before in ("", "a", "ab")) <= (
        speech.CODES
    )
    assert speech.share_right(codes, tokens) == 1
    assert speech.share_right(codes[:2], tokens) == pytest.approx(2 / 3)
    assert speech.share_right([*codes, 0], tokens) == 3 / 4


def test_waveform(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """From the same noise, codes give a finite waveform of their length; other codes or voices, another one."""
    codes = torch.arange(12)[None]

    def play(codes: Tensor, speaker: str) -> Tensor:
        torch.manual_seed(0)
        voice = model.speaker_map[speaker]
        with torch.no_grad():
            return model.token2wav(codes, conditioning=voice["cond"], reference_mel=voice["ref_mel"])

    wave, *others = play(codes, "Chelsie"), play(codes + 60, "Chelsie"), play(codes, "Ethan")

    assert wave.shape == (12 * SAMPLES_PER_CODE,)
    assert wave.isfinite().all()
    assert 0.02 < wave.std() < 0.5
    for other in others:
        assert (wave - other).std() > 0.1 * wave.std()
    assert torch.equal(play(codes, "Chelsie"), wave)


def test_waveform_of_an_answer(spoken: list[Spoken]) -> None:
    """A spoken answer has a waveform as long as its codes."""
    for reply in spoken:
        assert reply.wave.shape == (SAMPLES_PER_CODE * len(reply.codes),)
        assert reply.wave.isfinite().all()


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


# What it is asked


def test_sound_is_reproducible() -> None:
    """A clip is the same, to the last bit, on every machine and Python version."""
    clip = draw("audio", "evaluation", 1, seed=3)[0].media("audio")[0]

    assert clip.dtype == "float32"
    assert hashlib.sha256(clip.astype("<f4").tobytes()).hexdigest()[:16] == SOUND_DIGEST
