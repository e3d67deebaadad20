"""AutoAWQ as an oracle: our packing, decoding and rounding are its own, and its artifacts come through whole."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fixtures.adapters import adapter_for
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.pseudo_quantize import Quantized, Scheme, pseudo_quantize_tensor
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.formats import awq_gemm
from fixtures.quantizers import Job, autoawq_compat, calibration, peer_autoawq, quantize
from fixtures.quantizers.activation_aware.capture import decoder_calls
from fixtures.subjects import shipped

try:
    autoawq_compat.import_awq()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

from awq.modules.linear import WQLinear_GEMM, gemm
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm

SHAPES = [
    (256, 128, 128),
    (512, 256, 64),
    (128, 64, 32),
    (384, 32, 128),
    (96, 160, 32),
    (64, 288, 64),
]  # in, out, group
EVERY_CODE = set(range(16))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized_linear(in_features: int, out_features: int, group_size: int) -> Quantized:
    """A random weight, quantized by us, with all the codes and many zero points in it."""
    weight = normal(out_features, in_features) + 0.5 * normal(out_features, 1, seed=1)
    return pseudo_quantize_tensor(weight, Scheme(4, group_size), scale_dtype=torch.float16)


def packed_by_autoawq(quantized: Quantized, bias: Tensor | None = None) -> WQLinear_GEMM:
    """AutoAWQ's module for the same codes, zero points and scales."""
    out_features, in_features = quantized.codes.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.weight.data = quantized.weight
    if bias is not None:
        linear.bias.data = bias
    scales, zeros = (tensor.float().t().contiguous() for tensor in (quantized.scales, quantized.zeros))
    packed = WQLinear_GEMM.from_linear(linear, 4, quantized.scheme.group_size, scales=scales, zeros=zeros)
    return packed.cpu()  # it puts the zero points onto a GPU if there is one


def rounded_by_autoawq(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """AutoAWQ's dequantized weight, scales and zero points."""
    state = SimpleNamespace(group_size=scheme.group_size, zero_point=scheme.zero_point, w_bit=scheme.bits)
    weight, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(state, weight)
    return weight, scales, zeros


# -- layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_features", "out_features", "group_size"), SHAPES)
def test_packing(in_features: int, out_features: int, group_size: int) -> None:
    """The same codes pack to the same bits as in AutoAWQ."""
    quantized = quantized_linear(in_features, out_features, group_size)
    ours, theirs = awq_gemm.encode(quantized), packed_by_autoawq(quantized)

    assert set(quantized.codes.unique().tolist()) == EVERY_CODE
    assert quantized.zeros.unique().numel() > 1
    for part in awq_gemm.PARTS:
        assert ours[part].dtype == getattr(theirs, part).dtype
        assert torch.equal(ours[part], getattr(theirs, part)), part


@pytest.mark.parametrize(("in_features", "out_features", "group_size"), SHAPES)
def test_decoding(in_features: int, out_features: int, group_size: int) -> None:
    """Any words, zero points and scales decode to the weights that AutoAWQ reads in them, bit for bit."""
    rng, groups = torch.Generator().manual_seed(0), in_features // group_size
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, (rows, out_features // 8), generator=rng, dtype=torch.int64).to(torch.int32)
        for rows in (in_features, groups)
    )
    scales = torch.rand(groups, out_features, generator=rng).half()
    ours = awq_gemm.decode({"qweight": qweight, "qzeros": qzeros, "scales": scales}, Scheme(4, group_size))
    theirs = dequantize_gemm(qweight, qzeros, scales, 4, group_size)  # [in, out], float16

    assert set(ours.codes.unique().tolist()) == EVERY_CODE
    assert torch.equal(ours.weight.half(), theirs.t())


@pytest.mark.filterwarnings("ignore:Using naive")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_forward(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAWQ's linear computes what our decoded weight computes, within float16's precision."""
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)  # its kernel runs on GPUs alone
    monkeypatch.setattr(gemm, "awq_ext", None)
    quantized, x = quantized_linear(256, 128, 64), normal(2, 5, 256, seed=2).half()
    bias = normal(128, seed=3).half().float() if with_bias else None
    output = packed_by_autoawq(quantized, bias)(x).double()

    weight, added = quantized.weight.double(), 0.0 if bias is None else bias.double()
    expected = x.double() @ weight.t() + added
    rounding = 2.0**-10 * (x.double().abs() @ weight.abs().t() + expected.abs())
    assert ((output - expected).abs() <= rounding).all()
    assert ((output - x.double() @ weight.roll(1, 0).t() - added).abs() > rounding).any(), "any weight would pass"


# -- rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding(bits: int, group_size: int) -> None:
    """Where a group holds both signs, scales, zero points and weights are AutoAWQ's, bit for bit."""
    weight, scheme = normal(64, 512), Scheme(bits, group_size)
    grouped = weight.reshape(64, -1, group_size)
    assert (grouped.amin(-1) < 0).all()
    assert (grouped.amax(-1) > 0).all()

    ours, (rounded, scales, zeros) = pseudo_quantize_tensor(weight, scheme), rounded_by_autoawq(weight, scheme)
    assert torch.equal(ours.scales, scales)
    assert torch.equal(ours.zeros.float(), zeros)
    assert torch.equal(ours.weight, rounded)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_rounding_single_sign(sign: int) -> None:
    """Where a group holds one sign, our weights stay within half a scale, while AutoAWQ's are off by whole offsets."""
    weight, scheme = sign * (1 + torch.rand(64, 256, generator=torch.Generator().manual_seed(0))), Scheme(4, 128)
    ours, (rounded, scales, _) = pseudo_quantize_tensor(weight, scheme), rounded_by_autoawq(weight, scheme)
    half_steps = ours.scales.repeat_interleave(128, 1) / 2

    assert ((ours.weight - weight).abs() <= half_steps * (1 + 1e-5)).all()
    assert (rounded - weight).abs().max() > 0.9  # weights of 1 to 2
    assert scales.max() / 2 < 0.034


# -- quantizing ------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """One run of AutoAWQ: its own object, and the artifact that we wrote from it."""

    job: Job
    peer: Any
    artifact: HubView


@pytest.fixture(scope="module")
def job() -> Job:
    """The shipped subject with a sample of every modality."""
    reference = Checkpoint(shipped("qwen2_5_vl-tiny"))
    adapter = adapter_for(reference)
    samples = calibration.built_in(adapter, per_modality=1)
    recipe = Recipe("autoawq", Scheme(4, 128), calibration.digest(samples))
    return Job(HubView(reference, adapter), recipe, samples)


@pytest.fixture(scope="module")
def made(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The job carried out once, with AutoAWQ's object kept."""
    peer, out = peer_autoawq.run_autoawq(job), tmp_path_factory.mktemp("autoawq") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_autoawq, "run_autoawq", lambda _job: peer)
        quantize(job.reference.checkpoint, job.recipe, job.samples, out)
    return Made(job, peer, HubView(Checkpoint(out), job.reference.adapter))


def decoded(view: HubView, linear: str, scheme: Scheme) -> Tensor:
    """A linear's weight in an artifact, by its hub name."""
    weight: Tensor = awq_gemm.load(view.checkpoint, view.stored_module(linear, [f"{linear}.qweight"]), scheme).weight
    return weight


def to_quantize(job: Job) -> list[str]:
    """Hub names of the linears that must come out quantized."""
    assert job.to_quantize
    return sorted(job.to_quantize)


def test_artifact_holds_what_autoawq_made(made: Made) -> None:
    """Every quantized linear of the peer's artifact decodes to what AutoAWQ's own module holds, bit for bit."""
    job, scheme = made.job, made.job.recipe.scheme
    modules = {
        job.reference.adapter.hub_name(name): module
        for name, module in made.peer.model.named_modules()
        if isinstance(module, WQLinear_GEMM)
    }
    assert sorted(modules) == sorted(to_quantize(job))
    for name, module in modules.items():
        theirs = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, scheme.group_size).cpu()
        assert torch.equal(decoded(made.artifact, name, scheme).half(), theirs.t()), name
        assert not torch.equal(theirs.t(), job.reference.load(f"{name}.weight").half()), f"{name} was not quantized"


def test_artifact_keeps_the_rest(made: Made) -> None:
    """Beside the quantized weights the peer's artifact differs from the reference in the folded norms alone."""
    reference, tensors = made.job.reference, made.peer.model.state_dict()
    weights = {f"{name}.weight" for name in to_quantize(made.job)}
    folded = set()
    for name in set(reference) - weights:
        assert made.artifact.info(name).dtype == reference.info(name).dtype, name
        if not torch.equal(made.artifact.load(name), reference.load(name)):
            folded.add(name)
    in_memory = {reference.adapter.hub_name(name): tensor.cpu() for name, tensor in tensors.items()}
    for name in folded:
        assert torch.equal(made.artifact.load(name), in_memory[name].to(reference.load(name).dtype)), name
    layers = range(len(reference.adapter.decoder_layers(reference.checkpoint.config)))
    norms = ("input_layernorm", "post_attention_layernorm")
    assert folded == {f"model.layers.{layer}.{norm}.weight" for layer in layers for norm in norms}


def test_scales_fold_exactly(job: Job) -> None:
    """AutoAWQ's search leaves the function of the model as it was, until weights are rounded."""
    peer = peer_autoawq.run_autoawq(job, export_compatible=True, apply_clip=False)
    reference, adapter = job.reference.checkpoint, job.reference.adapter
    model = load_model(reference, adapter, torch.float32)
    with torch.no_grad():
        for batch in calibration.batches(adapter, load_processor(reference), job.samples):
            before, after = (m(**batch, use_cache=False).logits for m in (model, peer.model.cpu().float()))
            assert (after - before).norm() < 5e-3 * before.norm()  # on a GPU it computes in float16
    (decoder,) = adapter.decoders(reference.config)
    for scaled, layer in zip(decoder.modules(peer.model), decoder.modules(model), strict=True):
        up = [one.get_parameter("mlp.up_proj.weight") for one in (scaled, layer)]
        assert not torch.equal(*up), "nothing was scaled"


def test_calibration(made: Made) -> None:
    """AutoAWQ's search sees what the model computes for every token of every sample, each linear in its own copy."""
    job, reference, adapter = made.job, made.job.reference.checkpoint, made.job.reference.adapter
    model = load_model(reference, adapter, torch.float32)
    batches = calibration.batches(adapter, load_processor(reference), job.samples)
    layer = adapter.decoders(reference.config)[0].modules(model)[0]
    attended: list[Tensor] = []
    attention = layer.get_submodule("self_attn")
    hook = attention.register_forward_hook(lambda _module, _args, output: attended.append(output[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    hook.remove()

    quantizer = SimpleNamespace(calls=decoder_calls(layer, [partial(model, **batch) for batch in batches]))
    peer = autoawq_compat.quantizer_class()
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    seen = peer._get_input_feat(quantizer, layer, linears)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    assert sum(call.hidden.shape[:-1].numel() for call in made.peer.quantizer.calls) == tokens
    assert set(adapter.modalities) == {sample.modality for sample in job.samples}
    assert {name: tuple(x.shape) for name, x in seen.items()} == {
        name: (tokens, linear.in_features) for name, linear in linears.items()
    }
    assert len({x.data_ptr() for x in seen.values()}) == len(seen)
    with torch.no_grad():
        output = peer._module_forward(quantizer, seen["self_attn.q_proj"], attention, {"position_embeddings": ()})
    torch.testing.assert_close(output, torch.cat(attended))


@pytest.mark.parametrize("names", ["transformers_5", "transformers_4_51"])
def test_saved_by_autoawq(names: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact that AutoAWQ saved itself is read as the one that we wrote, whichever names it gives its tensors."""
    job, out = made.job, tmp_path / "saved"
    monkeypatch.setattr(peer_autoawq, "run_autoawq", lambda _job: copy.deepcopy(made.peer))
    peer_autoawq.save_with_autoawq(job, out)
    if names == "transformers_4_51":
        peer_autoawq.rename_like_4_51(out)
    saved = Checkpoint(out)
    view = HubView(saved, job.reference.adapter)

    renamed = [stored for hub, stored in view.stored.items() if stored != hub]
    assert bool(renamed) == (names == "transformers_5")
    assert saved.quantization is not None
    assert saved.quantization["modules_to_not_convert"] == ["visual"]
    scheme = awq_gemm.scheme_of(saved.quantization)
    assert scheme == job.recipe.scheme
    for name in to_quantize(job):
        assert torch.equal(decoded(view, name, scheme), decoded(made.artifact, name, scheme)), name
    model = load_model(saved, job.reference.adapter, torch.float32)  # nothing missing, nothing left over
    ours = load_model(made.artifact.checkpoint, job.reference.adapter, torch.float32)
    for name, tensor in ours.state_dict().items():  # it stores float16, we the reference's dtype
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=2**-7, atol=1e-7)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "message"),
    [(Scheme(4, -1), "needs a group size"), (Scheme(4, 512), r"layers\.0\.self_attn\.q_proj: 256 inputs do not split")],
    ids=["per_row", "indivisible"],
)
def test_what_autoawq_cannot_do(scheme: Scheme, message: str, job: Job, tmp_path: Path) -> None:
    """A scheme that AutoAWQ cannot carry out is refused in a line that says why, and nothing is written."""
    with pytest.raises(UserError, match=message):
        quantize(job.reference.checkpoint, Recipe("autoawq", scheme), job.samples, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_absent(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AutoAWQ the user is told how to install it."""
    monkeypatch.setitem(sys.modules, "awq", None)
    autoawq_compat.import_awq.cache_clear()
    with pytest.raises(UserError, match=r'pip install "quantproof\[awq-peer\]"'):
        quantize(job.reference.checkpoint, job.recipe, job.samples, tmp_path / "out")
    assert not list(tmp_path.iterdir())
