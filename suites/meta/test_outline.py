"""A reference without its layers, and the layers one by one: the same model, in the memory of one layer."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures.adapters import adapter_for
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults.editing import copied, edit_json
from fixtures.fresh import in_fresh_process
from fixtures.quantizers import Job, _activation_aware, _arrived, activation_aware, calibration, recipe_for
from fixtures.quantizers.activation_aware import capture, engine, load_outline, load_whole, outline, quantize_layers
from fixtures.quantizers.layers import Progress, silent
from fixtures.subjects import shipped


def view_of(folder: Path) -> HubView:
    """A checkpoint by its hub names."""
    checkpoint = Checkpoint(folder)
    return HubView(checkpoint, adapter_for(checkpoint))


def saved_again(family: str, folder: Path) -> Path:
    """A shipped checkpoint whose config names a dtype for each part, as transformers writes it when it saves."""
    saved = copied(shipped(f"{family}-tiny"), folder / "saved")

    def name_dtypes(config: dict[str, Any]) -> None:
        parts = [part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)]
        assert len(parts) > 1
        for part in parts:
            part["dtype"] = "bfloat16"

    edit_json(saved, "config.json", name_dtypes)
    return saved


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_family = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni"])
saved_or_not = pytest.mark.parametrize("saved", [False, True], ids=["shipped", "saved again"])


@every_dtype
@every_family
@saved_or_not
def test_outline_and_layers_are_the_model(family: str, dtype: torch.dtype, saved: bool, tmp_path: Path) -> None:
    """What an outline loads, buffers and the layers that come one by one are what transformers' own loading gives."""
    reference = view_of(saved_again(family, tmp_path) if saved else shipped(f"{family}-tiny"))
    adapter, config = reference.adapter, reference.checkpoint.config
    whole = load_model(reference.checkpoint, adapter, dtype)
    model = load_outline(reference, dtype)
    decoder = adapter.decoders(config)[0]
    wanted, buffers = whole.state_dict(), dict(whole.named_buffers())
    seen = set()

    def compare(found: Iterator[tuple[str, torch.Tensor]], among: dict[str, torch.Tensor]) -> None:
        for name, tensor in found:
            if not tensor.is_meta:
                assert tensor.dtype == among[name].dtype, name
                assert torch.equal(tensor, among[name]), name
                seen.add(name)

    home = outline.home_of(model)
    compare(iter(model.state_dict().items()), wanted)
    compare(adapter.answering(model).named_buffers(), dict(adapter.answering(whole).named_buffers()))
    path = next(path for path in decoder.paths if path in dict(model.named_modules()))
    for layer, module, stored in outline.resident_layers(decoder.modules(model), decoder.layers, reference, home):
        compare(((f"{path}.{layer.index}.{name}", t) for name, t in module.state_dict().items()), wanted)
        assert all(torch.equal(tensor, reference.load(layer.prefix + name)) for name, tensor in stored.items())
    inside = next(name for name, module in whole.named_modules() if module is adapter.answering(whole))
    missing = {name for name in wanted if name.startswith(inside)} - seen
    assert {adapter.hub_name(name) for name in missing} <= {f"{adapter.head}.weight"}
    assert buffers, "no model has rotary embeddings?"


def check_whole(reference: HubView, dtype: torch.dtype) -> None:
    """A model that a thread reads is what transformers' own loading gives: tensors, buffers, settings and voices."""
    wanted, found = load_model(reference.checkpoint, reference.adapter, dtype), load_whole(reference, dtype)()
    for one, other in (
        (dict(wanted.named_parameters()), dict(found.named_parameters())),
        (dict(wanted.named_buffers()), dict(found.named_buffers())),
        (wanted.state_dict(), found.state_dict()),  # tied heads, too
    ):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype, name
            assert not other[name].is_meta, name
            if not name.startswith("token2wav."):  # filters computed in 16 bits; nobody hears it
                assert torch.equal(tensor, other[name]), name
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert getattr(found, "speaker_map", {}).keys() == getattr(wanted, "speaker_map", {}).keys()
    assert not found.training


@every_dtype
@every_family
@saved_or_not
def test_whole_model_read_by_a_thread(family: str, dtype: torch.dtype, saved: bool, tmp_path: Path) -> None:
    """It is the one that transformers loads."""
    check_whole(view_of(saved_again(family, tmp_path) if saved else shipped(f"{family}-tiny")), dtype)


@pytest.mark.parametrize(
    "fault",
    [
        lambda found, up, gate: found | {up: found[gate], gate: found[up]},
        lambda found, up, gate: {name: tensor for name, tensor in found.items() if name != up},
        lambda found, up, gate: found | {up: found[up].double()},
    ],
    ids=["swapped", "left out", "another dtype"],
)
def test_a_tensor_read_wrongly_is_seen(fault: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor in another's place, in none or in another dtype, and the model is not the one."""

    def read(*of: Any, real: Callable[..., dict[str, Any]] = outline._read_all) -> dict[str, Any]:
        found = real(*of)
        up = next(name for name in found if name.endswith("layers.1.mlp.up_proj.weight"))
        return fault(found, up, up.replace("up_proj", "gate_proj"))

    monkeypatch.setattr(outline, "_read_all", read)
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.(up|gate)_proj"):
        check_whole(view_of(shipped("qwen2_5_vl-tiny")), torch.float32)


def test_a_model_that_is_given_up_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nobody can ask for it, the thread ends after the tensor at hand."""
    begun, given_up = threading.Event(), threading.Event()
    read: list[str] = []

    def load(view: HubView, hub: str, real: Callable[..., Any] = HubView.load) -> Any:
        read.append(hub)
        begun.set()
        given_up.wait(60)
        return real(view, hub)

    monkeypatch.setattr(HubView, "load", load)
    before = set(threading.enumerate())
    coming = load_whole(view_of(shipped("qwen2_5_vl-tiny")), torch.float32)
    assert begun.wait(60)
    del coming
    given_up.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert len(read) == 1


def leave(read: Path, progress: Progress = silent) -> None:
    """In a fresh process: end while a model is read that could still be asked for; which tensors goes to a file."""

    def load(view: HubView, hub: str, real: Callable[..., Any] = HubView.load) -> Any:
        with read.open("a") as file:
            print(hub, file=file)
        threading.main_thread().join(5)
        return real(view, hub)

    read.touch()
    HubView.load = load  # type: ignore[assignment, method-assign]
    sys.last_value = load_whole(view_of(shipped("qwen2_5_vl-tiny")), torch.float32)  # type: ignore[assignment]


def test_a_program_that_ends_reads_no_further(tmp_path: Path) -> None:
    """After Ctrl-C a traceback may hold on to who asked; the interpreter waits for the tensor at hand, for no more."""
    in_fresh_process(silent, leave, tmp_path / "read")
    assert len((tmp_path / "read").read_text().splitlines()) <= 1


def test_samples_are_read_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples become batches once, waiting for the architecture alone, and the batches are those of any caller."""
    reference = view_of(shipped("qwen2_5_vl-tiny"))
    samples = calibration.built_in(reference.adapter, 1)
    wanted = calibration.batches(reference.adapter, load_processor(reference.checkpoint), samples)
    loading, read = threading.Event(), list[Any]()

    def load(*of: Any, real: Callable[..., Any] = activation_aware.load_outline) -> Any:
        loading.set()
        return real(*of)

    def batches(*of: Any, real: Callable[..., Any] = calibration.batches) -> Any:
        assert loading.wait(60), "the model is not loaded before the samples are read"
        read.append(real(*of))
        return read[-1]

    monkeypatch.setattr(activation_aware, "load_outline", load)
    monkeypatch.setattr(calibration, "batches", batches)
    layers = _activation_aware(Job(reference, recipe_for("awq", None), samples))
    next(layers)
    layers.close()  # type: ignore[attr-defined]
    assert len(read) == 1
    for one, other in zip(read[0], wanted, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_sample_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the thread that reads is raised where the batches are asked for."""

    def failing(*_: Any) -> Any:
        raise UserError("sample 3 has no text")

    monkeypatch.setattr(calibration, "batches", failing)
    reference = view_of(shipped("qwen2_5_vl-tiny"))
    layers = _activation_aware(Job(reference, recipe_for("awq", None), calibration.built_in(reference.adapter, 1)))
    with pytest.raises(UserError, match="sample 3"):
        next(layers)


def test_no_room_beside_the_search() -> None:
    """A model for which there was no room beside another's search is read once that search is done."""

    def full() -> None:
        raise torch.OutOfMemoryError

    assert _arrived(full, lambda: lambda: "late") == "late"
    assert _arrived(lambda: "early", lambda: lambda: "late") == "early"
    assert _arrived(None, lambda: lambda: "late") == "late"


def quantizing(model: nn.Module, reference: HubView, chosen: range | None = None) -> Iterator[Any]:
    """The engine at work on an outline of the shipped VL checkpoint."""
    (decoder,) = reference.adapter.decoders(reference.checkpoint.config)
    samples = calibration.built_in(reference.adapter, 2)
    processor = load_processor(reference.checkpoint)
    feeds = calibration.feeds(reference.adapter, model, processor, decoder, samples)
    to_quantize = Job(reference, Recipe("awq"), ()).to_quantize
    return quantize_layers(model, reference, decoder, to_quantize, Scheme(), feeds, chosen)


def most_in_memory(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """While the shipped VL checkpoint is quantized: the most layers held, fetched or loaded, and sets of features."""
    reference = view_of(shipped("qwen2_5_vl-tiny"))
    model = load_outline(reference, torch.float32)
    fetched: list[weakref.ref[Any]] = []
    features: list[weakref.ref[Any]] = []
    most = [0, 0]

    def fetch(*of: Any, real: Callable[..., Any] = outline._fetch) -> Any:
        found = real(*of)
        fetched.append(weakref.ref(found["mlp.down_proj.weight"][1].untyped_storage()))
        return found

    def listen(*of: Any, real: Callable[..., Any] = capture.layer_features) -> Any:
        found = real(*of)
        features.append(weakref.ref(found))
        look()
        return found

    def look() -> None:
        weights = [p for n, p in model.named_parameters() if ".layers." in n and n.endswith("down_proj.weight")]
        most[0] = max(most[0], sum(not weight.is_meta for weight in weights))
        most[1] = max(most[1], sum(ref() is not None for ref in features))

    monkeypatch.setattr(outline, "_fetch", fetch)
    monkeypatch.setattr(engine, "layer_features", listen)
    for at, _ in enumerate(quantizing(model, reference)):
        look()
        towers = [name for name, p in model.named_parameters() if not p.is_meta and ".layers." not in name]
        assert towers == [], f"layer {at}: what feeds the decoder is still there"
    assert len(fetched) == 4
    assert all(parameter.is_meta for parameter in model.parameters())
    return most[0], most[1]


def test_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, one of them is loaded, and one layer's activations are held."""
    assert most_in_memory(monkeypatch) == (1, 1)


def test_layers_that_stay_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are not dropped after their turn would be counted."""
    real = nn.Module.to

    def keep(module: nn.Module, *of: Any) -> Any:
        return module if of == ("meta",) and hasattr(module, "mlp") else real(module, *of)

    monkeypatch.setattr(nn.Module, "to", keep)
    with pytest.raises(AssertionError):
        assert most_in_memory(monkeypatch) == (1, 1)


def test_a_run_that_is_given_up_ends(tmp_path: Path) -> None:
    """Closing the engine after its first layer leaves no thread that reads on."""
    reference = view_of(shipped("qwen2_5_vl-tiny"))
    layers = quantizing(load_outline(reference, torch.float32), reference)
    next(layers)
    layers.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda tensors: tensors.update(stray=torch.ones(2)), "does not know stray"),
        (lambda tensors: tensors.update({"model.layers.1.input_layernorm.weight": torch.ones(3)}), "another shape"),
    ],
    ids=["lacking", "stray", "shape"],
)
def test_incomplete_references(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    """A tensor missing, left over or of another shape is named before anything is loaded."""
    mine = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "mine")
    tensors: dict[str, Any] = {}
    for shard in mine.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (mine / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load_outline(view_of(mine), torch.float32)


def some_layers(chosen: range) -> list[Any]:
    """Some layers of the shipped VL checkpoint, quantized."""
    reference = view_of(shipped("qwen2_5_vl-tiny"))
    return list(quantizing(load_outline(reference, torch.float32), reference, chosen))


def test_layers_before_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share is calibrated on what the layers before it answer: were they left out, its scales would be others."""
    real = some_layers(range(2, 4))
    monkeypatch.setattr(engine, "pass_on", lambda layer, calls: None)
    left_out = some_layers(range(2, 4))
    assert [layer.record["layer"] for layer in real] == [2, 3]
    for one, other in zip(real, left_out, strict=True):
        assert any(not torch.equal(scale, other.scales[name]) for name, scale in one.scales.items())


def test_layers_after_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share reads no layer behind its last one."""
    fetched: list[int] = []
    real = outline._fetch

    def fetch(*of: Any) -> Any:
        fetched.append(of[-1].index)
        return real(*of)

    monkeypatch.setattr(outline, "_fetch", fetch)
    assert [layer.record["layer"] for layer in some_layers(range(1, 2))] == [1]
    assert fetched == [0, 1]
