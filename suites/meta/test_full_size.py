"""Full-size subjects: the published shapes, ids and settings, by the code that makes them, cut down to fit a CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.adapters import adapter_named
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.formats import awq_gemm
from fixtures.fresh import in_fresh_process
from fixtures.quantizers import Job, round_to_nearest
from fixtures.quantizers.cache import cached_artifact
from fixtures.quantizers.layers import Progress, silent
from fixtures.subjects import full_size, names, published, real_ids, shipped

NAMES = tuple(published.SIZES)
Made = Callable[[str], Path]


VOCODER = {
    "dit_config": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_attention_channels": 8,
        "enc_res2net_scale": 2,
        "enc_se_channels": 8,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
    },
    "bigvgan_config": {"upsample_initial_channel": 64},
}


@contextmanager
def cut_down() -> Iterator[None]:
    """Published models as they are, but narrow and of two layers: ids, vocabularies and every part stay."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (*_, vocabulary, tied) in published.SIZES.items():
            patch.setitem(published.SIZES, name, (256, 512, 2, 2, 1, vocabulary, tied))
        for name, (*_, width, sections) in published.TALKERS.items():
            patch.setitem(published.TALKERS, name, (128, 2, 1, width, sections))
        vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "fullatt_block_indexes": [1]}
        audio = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
        for settings, small in ((published.VISION, vision), (published.AUDIO, audio)):
            for key, value in small.items():
                patch.setitem(settings, key, value)
        patch.setattr(published, "TALKER_LAYERS", 2)
        patch.setattr(published, "TOKEN2WAV", VOCODER)
        yield


@pytest.fixture
def small() -> Iterator[None]:
    """Subjects made during this test are cut down."""
    with cut_down():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a cut-down subject; every name once."""
    cache = tmp_path_factory.mktemp("cache")
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            with cut_down():
                folders[name] = full_size.full_size(name, cache, "cpu")
        return folders[name]

    return make


def whole(name: str) -> dict[str, Any]:
    """A published config.json as it is written, at full size."""
    return full_size.complete_config(published.published_config(name))


@pytest.mark.parametrize("name", names())
def test_tensors_are_the_hubs(name: str) -> None:
    """Names and shapes of what is written are those of a checkpoint that transformers itself saved."""
    there = Checkpoint(shipped(name))
    assert full_size.tensor_shapes(there.config) == {tensor: info.shape for tensor, info in there.tensors.items()}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2_5_vl-3b", 3.755),
        ("qwen2_5_vl-7b", 8.292),
        ("qwen2_5_vl-72b", 73.411),
        ("qwen2_5_omni-3b", 5.537),
        ("qwen2_5_omni-7b", 10.732),
    ],
)
def test_as_many_parameters_as_published(name: str, billions: float) -> None:
    """A full-size subject has the published number of parameters, a tied head counted once."""
    shapes = full_size.tensor_shapes(published.published_config(name)).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize("name", NAMES)
def test_rotary_sections_fill_the_heads(name: str) -> None:
    """Time, height and width share out half of every decoder's head, or its attention cannot be computed."""
    config = whole(name)
    decoders = [adapter_named(config["model_type"]).text_config(config)]
    decoders += [config["talker_config"]] if "talker_config" in config else []
    for decoder in decoders:
        width = decoder.get("head_dim") or decoder["hidden_size"] // decoder["num_attention_heads"]
        assert sum(decoder["rope_parameters"]["mrope_section"]) == width // 2


@pytest.mark.parametrize("name", NAMES)
def test_tied_where_published(name: str) -> None:
    """The head is tied in VL-3B alone, said both outside and inside the text model's settings."""
    config = whole(name)
    outer = config.get("thinker_config", config)
    assert {outer["tie_word_embeddings"], outer["text_config"]["tie_word_embeddings"]} == {name == "qwen2_5_vl-3b"}


# token -> where the config names its id
VL_IDS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
THINKER_IDS = {
    "<|AUDIO|>": "audio_token_index",
    "<|IMAGE|>": "image_token_index",
    "<|VIDEO|>": "video_token_index",
    "<|audio_bos|>": "audio_start_token_id",
    "<|audio_eos|>": "audio_end_token_id",
    "<|vision_bos|>": "vision_start_token_id",
    "<|vision_eos|>": "vision_end_token_id",
    "user": "user_token_id",
    "<|endoftext|>": "pad_token_id",
}
TALKER_IDS = {
    "<tts_pad>": "tts_text_pad_token_id",
    "<tts_text_bos>": "tts_text_start_token_id",
    "<tts_text_eod>": "tts_text_end_token_id",
    "<|IMAGE|>": "image_token_index",
}


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_the_configs_ids(name: str, made: Made) -> None:
    """Every special token is at the id at which the published config looks for it."""
    config = json.loads((made(name) / "config.json").read_text())
    tokenizer = load_processor(Checkpoint(made(name))).tokenizer
    wanted: dict[str, tuple[dict[str, Any], dict[str, str]]] = {"vl": (config, VL_IDS)}
    text = adapter_named(config["model_type"]).text_config(config)
    if "thinker_config" in config:
        wanted = {
            "thinker": (config["thinker_config"], THINKER_IDS),
            "talker": (config["talker_config"], TALKER_IDS),
        }
    for settings, ids in wanted.values():
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == {
            token: settings[key] for token, key in ids.items()
        }
    assert tokenizer.eos_token_id == text["eos_token_id"] == 151645
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == text["bos_token_id"] == 151643
    assert len(tokenizer) == text["vocab_size"]


@pytest.mark.parametrize("name", NAMES)
def test_any_id_decodes(name: str, made: Made) -> None:
    """Whatever id a model of random weights emits, it is told by text of its own; a text is read as it always was."""
    tokenizer = load_processor(Checkpoint(made(name))).tokenizer
    vocabulary = len(tokenizer)
    ids = [700, 5000, 151642, 151665 + 20, vocabulary - 1]
    assert len({tokenizer.decode([number]) for number in ids} - {""}) == len(ids)
    assert tokenizer.decode([5000]) == " w5000"
    text = "the user saw a red 7, then w5000 and héllo"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    small = load_processor(Checkpoint(shipped(f"{name.split('-')[0]}-tiny"))).tokenizer
    assert tokenizer.tokenize(text) == small.tokenize(text)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_published(name: str, made: Made) -> None:
    """Processor and generation settings are the published ones, as transformers reads them."""
    processor = load_processor(Checkpoint(made(name)))
    for part in (processor.image_processor, processor.video_processor):
        assert (part.size["shortest_edge"], part.size["longest_edge"]) == (3136, 12845056)
        assert (part.patch_size, part.merge_size, part.temporal_patch_size) == (14, 2, 2)
    if name.startswith("qwen2_5_omni"):
        ears = processor.feature_extractor
        assert (ears.feature_size, ears.sampling_rate, ears.chunk_length, ears.n_samples) == (128, 16000, 300, 4800000)
    generation = json.loads((made(name) / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([151645, 151643], 151643)
    chat = processor.apply_chat_template([{"role": "user", "content": "7"}], tokenize=False, add_generation_prompt=True)
    assert processor.tokenizer(chat)["input_ids"][0] == 151644


@pytest.mark.parametrize("name", NAMES)
def test_subject_loads_and_computes(name: str, made: Made) -> None:
    """A subject is a normal checkpoint: stored in bfloat16, in hub names, nothing missing, its logits finite."""
    checkpoint = Checkpoint(made(name))
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config["dtype"] == "bfloat16"
    adapter = adapter_named(checkpoint.model_type)
    model = load_model(checkpoint, adapter, torch.float32)
    ids = load_processor(checkpoint).tokenizer("red 7", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = adapter.answering(model)(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_voices_fit_the_vocoder(made: Made) -> None:
    """Omni's speakers have voices of the vocoder's width, and a first token that the talker knows."""
    config = json.loads((made("qwen2_5_omni-3b") / "config.json").read_text())
    voices = torch.load(made("qwen2_5_omni-3b") / "spk_dict.pt", weights_only=True)
    diffusion = config["token2wav_config"]["dit_config"]
    assert sorted(voices) == ["Chelsie", "Ethan"]
    for voice in voices.values():
        assert voice["cond"].shape == (1, diffusion["enc_emb_dim"])
        assert (voice["ref_mel"].ndim, voice["ref_mel"].shape[-1]) == (3, diffusion["mel_dim"])
        assert voice["bos_token"] == config["talker_config"]["tts_text_start_token_id"]


def test_fewer_layers_of_the_published_width() -> None:
    """A model cut to some layers has those layers as published, and everything beside them."""
    whole_shapes = full_size.tensor_shapes(published.published_config("qwen2_5_vl-72b"))
    shapes = full_size.tensor_shapes(published.published_config(published.cut("qwen2_5_vl-72b", 2)))
    kept = {name for name in whole_shapes if ".layers." not in name or name.split(".")[2] in {"0", "1"}}
    assert shapes == {name: whole_shapes[name] for name in kept}
    layer = [shape for name, shape in shapes.items() if name.startswith("model.layers.1.")]
    assert sum(torch.Size(shape).numel() for shape in layer) / 1e9 == pytest.approx(0.878, abs=0.001)


@pytest.mark.usefixtures("small")
def test_cut_subject_is_made_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--layers`` makes a checkpoint of its own name, which loads and is known to be random; too many are refused."""
    asked = ["qwen2_5_vl-72b", "--layers", "1", "--cache", str(tmp_path)]
    assert full_size.main([*asked, "--device", "cpu"]) == 0
    folder = tmp_path / "subjects" / "qwen2_5_vl-72b-1-layers"
    assert capsys.readouterr().out.strip() == str(folder)
    made = Checkpoint(folder)
    adapter = adapter_named(made.model_type)
    assert adapter.decoders(made.config)[0].layer_count == 1
    load_model(made, adapter, torch.float32)  # nothing missing, nothing left over
    assert full_size.is_random(folder)
    assert not full_size.is_random(shipped("qwen2_5_vl-tiny"))
    assert full_size.main(["qwen2_5_vl-72b", "--layers", "3", "--cache", str(tmp_path), "--device", "cpu"]) == 2
    assert "--layers 3: qwen2_5_vl-72b has 1 to 2" in capsys.readouterr().err
    assert full_size.main([*asked, "--drop"]) == 0
    assert not folder.exists()


@pytest.mark.parametrize("name", ["qwen2_5_vl-3b", "qwen2_5_vl-7b"])
def test_residual_stream_stays_far_from_float16s_end(name: str) -> None:
    """At the published width a layer adds so little that the deepest model stays finite in float16."""
    hidden, intermediate, layers, *_ = published.SIZES[name]
    rng = torch.Generator().manual_seed(0)
    state = torch.randn(8, hidden, generator=rng)
    weights = [torch.randn(intermediate, hidden, generator=rng) * full_size.STD for _ in range(2)]
    inner = torch.nn.functional.silu(state @ weights[0].T) * (state @ weights[1].T)
    added = inner @ (torch.randn(intermediate, hidden, generator=rng) * full_size.STD)
    # as if every block of every layer added the same vector; and what lies between is not near the end either
    assert 2 * layers * added.abs().max() < 65504 / 50
    assert inner.abs().max() < 65504 / 1000


@pytest.mark.usefixtures("small")
def test_made_once_and_anew_for_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject is found again, and made anew when what decides its content has changed."""
    folder = full_size.full_size("qwen2_5_vl-3b", tmp_path, "cpu")
    cache, stamp = folder.parents[1], (folder / "config.json").stat().st_mtime_ns
    assert full_size.full_size("qwen2_5_vl-3b", cache, "cpu") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    monkeypatch.setitem(published.TEXT, "rms_norm_eps", 1e-5)
    assert full_size.found("qwen2_5_vl-3b", cache) is None
    monkeypatch.setattr(full_size, "_make", lambda *_: folder.mkdir())
    full_size.full_size("qwen2_5_vl-3b", cache, "cpu")
    assert list(folder.iterdir()) == []  # of the former recipe nothing is left


def test_drop(tmp_path: Path) -> None:
    """Dropping a subject removes it and its artifacts, and nothing of others."""
    mine = [tmp_path / "subjects" / "qwen2_5_vl-3b", tmp_path / "qwen2_5_vl-3b-rtn-0123"]
    others = [tmp_path / "subjects" / "qwen2_5_vl-7b", tmp_path / "qwen2_5_vl-tiny-rtn-0123"]
    for folder in mine + others:
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1234")
    assert full_size.drop("qwen2_5_vl-3b", tmp_path) == 8
    assert [folder.exists() for folder in mine + others] == [False, False, True, True]


def test_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that cannot hold a subject is one line before anything is written, saying what can be dropped."""
    (tmp_path / "subjects" / "qwen2_5_omni-3b").mkdir(parents=True)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 8 << 30}))
    code = full_size.main(["qwen2_5_vl-7b", "--cache", str(tmp_path), "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert "qwen2_5_vl-7b takes 16.6 GB" in line
    assert "full_size qwen2_5_omni-3b --drop" in line
    assert not (tmp_path / "subjects" / "qwen2_5_vl-7b").exists()


@pytest.mark.usefixtures("small")
def test_interrupted_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject that could not be finished is not there, and what a killed run left is removed."""
    left_over = tmp_path / "subjects" / ".qwen2_5_vl-3b.partial-1"
    left_over.mkdir(parents=True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(real_ids, "write_side_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        full_size.full_size("qwen2_5_vl-3b", tmp_path, "cpu")
    assert full_size.found("qwen2_5_vl-3b", tmp_path) is None
    assert not [entry for entry in (tmp_path / "subjects").iterdir() if entry.is_dir()]


WRONG_IDS = {
    "two words at one id": ({"a": 5}, {}),
    "a word beyond the vocabulary": ({"a": real_ids.FIRST_ADDED}, {}),
}


@pytest.mark.parametrize("case", WRONG_IDS)
def test_impossible_ids(case: str) -> None:
    """Ids that cannot be given are refused, not quietly given to somebody else."""
    words, added = WRONG_IDS[case]
    tokenizer = {"model": {"vocab": {"a": 0, "b": 5}}, "added_tokens": []}
    with pytest.raises(ValueError, match="take the ids of other tokens"):
        real_ids.with_real_ids(tokenizer, 151936, words, added)


# -- work in a process of its own -----------------------------------------------------------------------------------


def shout(what: str, progress: Progress = silent) -> tuple[str, int]:
    """Works in a fresh process: tells progress, and who it is."""
    progress(what, 1, 2)
    return what.upper(), os.getpid()


def stumble(error: BaseException | None, progress: Progress = silent) -> None:
    """Fails in a fresh process: by an error, or for good."""
    if error is None:
        os._exit(9)
    raise error


def test_fresh_process_answers_and_tells() -> None:
    """Work in a fresh process is done elsewhere, returns its result, and its progress is heard here."""
    heard: list[tuple[str, int, int]] = []
    said, pid = in_fresh_process(lambda *told: heard.append(told), shout, "aha")
    assert (said, heard) == ("AHA", [("aha", 1, 2)])
    assert pid != os.getpid()


def test_fresh_process_fails_clearly() -> None:
    """An error in a fresh process is raised here as what it is; a process that dies is said to have died."""
    with pytest.raises(UserError, match="no room"):
        in_fresh_process(silent, stumble, UserError("no room"))
    with pytest.raises(UserError, match=r"stumble died in its process \(exit code 9"):
        in_fresh_process(silent, stumble, None)


def test_checkpoint_travels(tiny_reference: Checkpoint) -> None:
    """A checkpoint that has been read from can be sent to another process, its known digest with it."""
    import pickle

    tensor = next(iter(tiny_reference.tensors))
    here = tiny_reference.load(tensor)
    digest = tiny_reference.digest
    there = pickle.loads(pickle.dumps(tiny_reference))
    assert vars(there)["digest"] == digest
    assert torch.equal(there.load(tensor), here)


# -- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_rounding_is_the_same_on_a_gpu(tiny_reference: Checkpoint) -> None:
    """RTN on a GPU gives the CPU's codes, scales and zero points, bit for bit."""
    view = HubView(tiny_reference, adapter_named(tiny_reference.model_type))
    job = Job(view, Recipe("rtn"), ())
    on_cpu, on_gpu = (
        list(round_to_nearest.quantize_layers(view, job.layers, job.to_quantize, Scheme(), device))
        for device in ("cpu", "cuda")
    )
    compared = 0
    for here, there in zip(on_cpu, on_gpu, strict=True):
        for name, quantized in here.quantized.items():
            packed = awq_gemm.encode(there.quantized[name])
            assert all(torch.equal(part, packed[what].cpu()) for what, part in awq_gemm.encode(quantized).items())
            compared += 1
    assert compared == 28


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", ["rtn", "bnb-nf4"])
def test_artifact_of_a_subject_from_a_gpu(quantizer: str, made: Made, tmp_path: Path) -> None:
    """A subject made on a GPU is quantized there, in a process of its own, from whose memory nothing stays."""
    reference = Checkpoint(made("qwen2_5_vl-3b"))
    folder = in_fresh_process(silent, cached_artifact, reference, Recipe(quantizer), (), tmp_path, device="cuda")
    assert Checkpoint(folder).quantization is not None
