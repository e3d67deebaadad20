"""The ledger of a checkpoint is, to the byte, what its tensors take once loaded; the rest is counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Scheme
from fixtures.engines import packed
from fixtures.engines.loading import load_by_transformers, load_model
from fixtures.faults.editing import copied, edit_tensor
from fixtures.meters import ledger as command
from fixtures.meters.census import tensors_of
from fixtures.meters.fitting import Room, by_precision, would_fit
from fixtures.meters.held import Held, Ledger, in_vllm, kv_per_token, of_checkpoint, rounding, towers_in_vllm
from fixtures.meters.ledger import predicted
from fixtures.meters.vram import loading_dtype
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.published import published_config

QUANTIZERS = ("", "rtn", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8")
MEDIA = (("image", 1), ("video", 1), ("audio", 1))


@pytest.fixture(scope="module")
def made(selection: Selection) -> Callable[[str, str], Checkpoint]:
    """A tiny reference, or an artifact of it by a quantizer that needs no calibration."""

    def make(family: str, quantizer: str) -> Checkpoint:
        reference = Checkpoint(shipped(f"{family}-tiny"))
        if not quantizer:
            return reference
        if quantizer.startswith("bnb"):
            pytest.importorskip("bitsandbytes")
        return Checkpoint(cached_artifact(reference, recipe_for(quantizer, None), (), selection.cache))

    return make


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAWQ's modules, unpacking in plain torch."""
    try:
        packed.packed_linear()
    except UserError as error:
        pytest.skip(str(error))
    import awq.modules.linear.gemm as gemm

    monkeypatch.setattr(gemm, "awq_ext", None)
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", ADAPTERS)
def test_ledger_is_what_the_model_holds(
    family: str, quantizer: str, made: Callable[[str, str], Checkpoint], request: pytest.FixtureRequest
) -> None:
    """The ledger's bytes are those of the parameters, buffers, scales and tables of the loaded model, exactly."""
    adapter, checkpoint = ADAPTERS[family], made(family, quantizer)
    dtype = loading_dtype(checkpoint)
    if quantizer == "rtn":
        request.getfixturevalue("in_torch")
        model = packed.load_packed(checkpoint, adapter, dtype, "cpu")
    else:
        model = load_by_transformers(checkpoint, adapter, dtype)
    ledger = of_checkpoint(checkpoint, adapter, dtype)
    assert sum(tensor.nbytes for tensor in tensors_of(model)) == ledger.total
    stored = sum(info.bytes for info in checkpoint.tensors.values())
    widened = sum(held.bytes // 2 for held in ledger.held if held.kind == "32 bits")  # Omni's vocoder
    buffers = sum(held.bytes for held in ledger.held if held.kind == "buffers")
    assert ledger.total - widened - buffers == pytest.approx(stored, rel=2e-3)  # JSON stays on the CPU


def test_kinds_by_hand(made: Callable[[str, str], Checkpoint]) -> None:
    """Codes, zero points and scales of a tiny artifact are those counted by hand, tower by tower."""
    adapter = ADAPTERS["qwen2_5_vl"]
    weights = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)  # q, o; k, v; gate, up, down
    awq = of_checkpoint(made("qwen2_5_vl", "rtn"), adapter).by_tower()["language_model"]
    assert (awq["codes"], awq["scales"], awq["zero points"]) == (weights // 2, weights // 128 * 2, weights // 256)
    nf4 = of_checkpoint(made("qwen2_5_vl", "bnb-nf4"), adapter).by_tower()["language_model"]
    assert (nf4["codes"], nf4["scales"], nf4["tables"]) == (weights // 2, weights // 64 * 4, 28 * 16 * 4)
    nested = of_checkpoint(made("qwen2_5_vl", "bnb-nf4-dq"), adapter).by_tower()["language_model"]
    assert nested["scales"] == weights // 64 + weights // 64 // 256 * 4
    assert nested["tables"] == 28 * (16 * 4 + 256 * 4 + 4)  # code books, and the offset


def test_tied_head_counts_once(made: Callable[[str, str], Checkpoint]) -> None:
    """A head tied to the embedding has no bytes of its own."""
    tied = of_checkpoint(made("qwen2_5_vl", ""), ADAPTERS["qwen2_5_vl"])
    own = of_checkpoint(made("qwen2_5_omni", ""), ADAPTERS["qwen2_5_omni"])
    assert [held.name for held in tied.held if "lm_head" in held.name] == []
    assert [held.name for held in own.held if "lm_head" in held.name] == ["thinker.lm_head.weight"]


def test_asked_for_in_32_bits(made: Callable[[str, str], Checkpoint]) -> None:
    """Loaded in 32 bits, plain weights take twice as much, and codes what they took."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], made("qwen2_5_vl", "rtn")
    half, single = (of_checkpoint(artifact, adapter, dtype).by_tower() for dtype in (torch.float16, torch.float32))
    assert single["visual"]["32 bits"] == 2 * half["visual"]["16 bits"]
    assert single["language_model"]["codes"] == half["language_model"]["codes"]


def test_kv_cache_by_hand() -> None:
    """A token's KV cache: a key and a value per layer and key-value head; thinker and talker apart."""
    vl = kv_per_token(ADAPTERS["qwen2_5_vl"], published_config("qwen2_5_vl-3b"))
    assert vl == {"language_model": 2 * 36 * 2 * 128 * 2}
    omni = kv_per_token(ADAPTERS["qwen2_5_omni"], published_config("qwen2_5_omni-7b"))
    assert omni == {"language_model": 2 * 28 * 4 * 128 * 2, "talker": 2 * 24 * 4 * 128 * 2}


def test_towers_in_vllm(made: Callable[[str, str], Checkpoint]) -> None:
    """Of Omni vLLM loads the thinker alone, and no tower whose media are limited to none."""
    adapter, reference = ADAPTERS["qwen2_5_omni"], made("qwen2_5_omni", "")
    towers = {limits: set(in_vllm(reference, adapter, limits).by_tower()) for limits in (MEDIA, MEDIA[:1], ())}
    assert towers[()] == {"language_model", "lm_head"}
    assert towers[MEDIA[:1]] == {"language_model", "lm_head", "visual"}
    assert towers[MEDIA] == {"language_model", "lm_head", "visual", "audio_tower"}
    assert in_vllm(reference, adapter, (("image", 0),)).by_tower().keys() == towers[()]


def test_kernels_in_vllm(made: Callable[[str, str], Checkpoint]) -> None:
    """Machete keeps zero points as 16 bits, Marlin as four; nested scales are multiplied out into 32 bits."""
    adapter = ADAPTERS["qwen2_5_vl"]
    marlin, machete = (
        in_vllm(made("qwen2_5_vl", "rtn"), adapter, (), [kernel]).by_tower()["language_model"]
        for kernel in ("marlin", "Machete")
    )
    assert machete["zero points"] == 4 * marlin["zero points"]
    assert {**machete, "zero points": 0} == {**marlin, "zero points": 0}
    plain, nested = (
        in_vllm(made("qwen2_5_vl", kind), adapter).by_tower()["language_model"] for kind in ("bnb-nf4", "bnb-nf4-dq")
    )
    assert plain == nested


@pytest.mark.parametrize("gpus", [2, 3, 4])
@pytest.mark.parametrize("family", ADAPTERS)
def test_share_of_each_gpu(family: str, gpus: int, made: Callable[[str, str], Checkpoint]) -> None:
    """Of several GPUs each holds its part of every matrix, of two heads of keys one, and the rest whole: ears, too."""
    adapter, reference = ADAPTERS[family], made(family, "")
    view = HubView(reference, adapter)
    parts = {
        name: min(gpus, 2) if "self_attn.k_proj" in name or "self_attn.v_proj" in name else gpus
        for name in view
        if len(view.info(name).shape) == 2  # the patches' kernel has five dimensions, norms and biases one
        and adapter.tower(name) != "audio_tower"  # vLLM takes transformers' module, whose linears know no other GPU
    }
    alone, shared = in_vllm(reference, adapter, MEDIA), in_vllm(reference, adapter, MEDIA, gpus=gpus)
    assert {one.name: one.bytes for one in shared.held} == {
        one.name: math.ceil(one.bytes / parts.get(one.name, 1)) for one in alone.held
    }
    heads = int(adapter.text_config(reference.config)["num_key_value_heads"])
    assert heads == 2
    assert alone.kv_per_token == {name: 2 * size for name, size in shared.kv_per_token.items()}


@pytest.mark.parametrize("kernel", ["marlin", "machete"])
def test_share_of_each_gpu_in_codes(kernel: str, made: Callable[[str, str], Checkpoint]) -> None:
    """Codes, scales and zero points of a linear are shared as the linear is, by either kernel."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], made("qwen2_5_vl", "rtn")
    alone, shared = (in_vllm(artifact, adapter, (), [kernel], gpus).by_tower()["language_model"] for gpus in (1, 2))
    for kind in ("codes", "scales", "zero points"):
        assert shared[kind] * 2 == alone[kind]
    assert shared["buffers"] == alone["buffers"]


def test_vllm_spreads_no_bitsandbytes(made: Callable[[str, str], Checkpoint]) -> None:
    """Of an artifact of bitsandbytes over several GPUs there is no ledger: vLLM refuses to load it."""
    with pytest.raises(UserError, match="vLLM spreads no artifact of bitsandbytes over several GPUs"):
        in_vllm(made("qwen2_5_vl", "bnb-nf4"), ADAPTERS["qwen2_5_vl"], gpus=2)


def test_known_figures_of_vllm() -> None:
    """The published 3B's ledger is within 2 % of what vLLM was seen to load: 5.81 GiB, no vision tower."""
    # the architecture's text model, and the table of rotations of a context of 32768 tokens
    weights = 2 * (151936 * 2048 + 36 * (77070336 + 2048 + 2 * 256 + 2 * 2048) + 2048)
    assert (weights + 4 * 32768 * 128 * 2) / (5.81 * 2**30) == pytest.approx(1, abs=0.02)


def test_large_tensors_fill_blocks() -> None:
    """In vLLM a tensor of 20 MiB and more, of fused linears too, takes a multiple of 2 MiB, a smaller one its bytes."""
    mlp, norm = "model.layers.0.mlp", Held("model.norm.weight", "language_model", "16 bits", 7168)
    # the 7B's codes, 4 bits each: gate and up 32.375 steps of 2 MiB, down 16.1875; half of them on each of two GPUs
    gate, up, down = (
        Held(f"{mlp}.{name}_proj.qweight", "language_model", "codes", 3584 * 18944 // 2)
        for name in ("gate", "up", "down")
    )
    head = Held("lm_head.weight", "lm_head", "16 bits", 20 << 20)
    (beyond,) = rounding([norm, gate, up, down, head])
    assert (beyond.tower, beyond.kind) == ("language_model", "blocks")
    assert beyond.bytes == (0.625 + 0.8125) * (2 << 20)
    (halves,) = rounding([replace(one, bytes=one.bytes // 2) for one in (gate, up, down)])
    assert halves.bytes == 0.8125 * (2 << 20), "half of gate and up is 16.1875 steps, half of down no block of its own"
    assert list(rounding([replace(head, bytes=(20 << 20) - 1)])) == []


def test_blocks() -> None:
    """The allocator's bytes are those of the tensors, each rounded up to 512."""
    ledger = Ledger(tuple(Held(str(size), "visual", "16 bits", size) for size in (1, 512, 513)), {})
    assert (ledger.total, ledger.in_blocks, ledger.of("visual"), ledger.of("talker")) == (1026, 2048, 1026, 0)
    assert ledger.smallest_coded == 0


def test_command_takes_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m fixtures.meters.ledger DIR`` prints a checkpoint's bytes; what is no checkpoint costs one line."""
    assert command.main([str(shipped("qwen2_5_vl-tiny"))]) == 0
    said = capsys.readouterr().out
    assert "in vLLM: 0.009 GB, 0.006 GB without media" in said
    assert "KV cache of the language_model: 2048 bytes a token" in said
    with pytest.raises(SystemExit):
        command.main(["nowhere"])
    assert "no such folder: nowhere" in capsys.readouterr().err


def test_what_would_fit() -> None:
    """With little memory free, 4 bits fit where 16 do not, and a smaller size in full."""
    adapter, config = ADAPTERS["qwen2_5_vl"], published_config("qwen2_5_vl-7b")
    sizes = by_precision(adapter, config)
    assert next(iter(sizes)) == "16 bits"
    assert len(set(sizes.values())) == len(sizes)
    said = would_fit(adapter, config, Room(8 << 30))
    assert said.startswith("with 8.0 GiB free, 1 GiB of it for context and activations, fits: ")
    assert "this one in rtn (6.4 GiB)" in said
    assert "this one in 16 bits" not in said
    assert "qwen2_5_vl-3b in 16 bits (7.0 GiB)" in said
    assert "nothing of this family" in would_fit(adapter, config, Room(1 << 30))


def test_what_would_fit_on_several() -> None:
    """GPUs that share a model hold a part of it each: of two with 9 GiB each, 16 bits fit that one cannot hold."""
    adapter, config = ADAPTERS["qwen2_5_vl"], published_config("qwen2_5_vl-7b")
    said = would_fit(adapter, config, Room(9 << 30, "free", 2))
    assert said.startswith("with 9.0 GiB free on each of 2 GPUs, ")
    assert "this one in 16 bits (7.7 GiB), this one in rtn (3.2 GiB), " in said
    assert "bnb" not in said, "vLLM refuses to share them"
    assert "bnb" in would_fit(adapter, config, Room(9 << 30))
    assert "this one in 16 bits" not in would_fit(adapter, config, Room(9 << 30))


def test_what_would_fit_into_vllm() -> None:
    """What vLLM does not load need not fit: of Omni the talker and the vocoder, towers whose media are not served."""
    adapter, config = ADAPTERS["qwen2_5_omni"], published_config("qwen2_5_omni-7b")
    always = {"language_model", "lm_head"}
    assert towers_in_vllm(adapter, config) == always
    assert towers_in_vllm(adapter, config, [("image", 1), ("audio", 0)]) == {*always, "visual"}
    every = towers_in_vllm(adapter, config, [("video", 1), ("audio", 2)])
    assert every == {*always, "visual", "audio_tower"}
    thinker = {one.tower: one.before for one in predicted(adapter, config, Scheme()) if one.tower in every}
    assert by_precision(adapter, config, towers=every)["16 bits"] == sum(thinker.values())
    assert "this one in 16 bits (16.6 GiB)" in would_fit(adapter, config, Room(18 << 30), every), "8.9 G parameters"
    assert "this one in 16 bits" not in would_fit(adapter, config, Room(18 << 30))


# -- packed weights ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_torch")
def test_packed_model_computes_what_is_stored(made: Callable[[str, str], Checkpoint]) -> None:
    """A model with packed codes gives the logits of the decoded weights, up to 16 bits' rounding."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], made("qwen2_5_vl", "rtn")
    model = packed.load_packed(artifact, adapter, torch.float16, "cpu")
    assert packed.count_packed(model) == 28
    tokens = torch.arange(10, 40)[None]
    with torch.no_grad():
        exact = load_model(artifact, adapter, torch.float32)(tokens).logits
        assert (model(tokens).logits.float() - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.usefixtures("in_torch")
def test_packed_artifact_that_does_not_fit(made: Callable[[str, str], Checkpoint], tmp_path: Path) -> None:
    """A tensor of another shape, and an artifact of another format, are refused in one line."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], made("qwen2_5_vl", "rtn")
    broken = copied(artifact.path, tmp_path / "broken")
    edit_tensor(broken, "model.norm.weight", lambda norm: norm[:-1].contiguous())
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[255\], not \[256\]"):
        packed.load_packed(Checkpoint(broken), adapter, torch.float16, "cpu")
    nf4 = made("qwen2_5_vl", "bnb-nf4")
    with pytest.raises(UserError, match="is no AWQ artifact"):
        packed.load_packed(nf4, adapter, torch.float16, "cpu")


@pytest.mark.usefixtures("in_torch")
def test_packed_artifact_that_lacks_a_tensor(made: Callable[[str, str], Checkpoint]) -> None:
    """A tensor that the artifact lacks is named; nothing is made up."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], Checkpoint(made("qwen2_5_vl", "rtn").path)
    artifact.tensors = {name: info for name, info in artifact.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match=r"lacks model\.language_model\.norm\.weight"):
        packed.load_packed(artifact, adapter, torch.float16, "cpu")
    artifact.tensors["model.made_up.weight"] = artifact.tensors["model.embed_tokens.weight"]
    with pytest.raises(UserError, match=r"does not know model\.made_up\.weight"):
        packed.load_packed(artifact, adapter, torch.float16, "cpu")
