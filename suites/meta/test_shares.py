"""One model quantized by several processes: the artifact that one makes, whatever goes wrong in one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.adapters import adapter_for
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.recipe import Recipe
from fixtures.faults.editing import copied, edit_shard
from fixtures.quantizers import Job, calibration, quantize
from fixtures.quantizers.__main__ import main
from fixtures.quantizers.artifact import ShardWriter
from fixtures.quantizers.shares import PASSING, Share, shares
from fixtures.subjects import shipped


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layers", [1, 2, 4, 28, 36, 80])
def test_every_layer_once(layers: int, count: int) -> None:
    """Shares follow one another and hold every layer once, also where there are more shares than layers."""
    assert [layer for share in shares(layers, count) for layer in share] == list(range(layers))
    assert len(shares(layers, count)) == count


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shares_take_about_as_long(count: int) -> None:
    """Of 80 layers no share takes a layer's time more than the mean, though the later ones first run those before."""
    took = [len(share) + PASSING * share.start for share in shares(80, count)]
    assert max(took) - sum(took) / count <= 1 + PASSING  # an end is up to half a layer off, a length up to a layer
    assert len(shares(80, count)[0]) > len(shares(80, count)[-1]), "as if running what comes before cost nothing"


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for the files whose cut depends on who wrote them."""
    files = (file for file in folder.rglob("*") if file.is_file() and "model" not in file.name)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni"])
def test_the_artifact_of_one_process(family: str, kind: str, tmp_path: Path) -> None:
    """Two processes write, tensor by tensor and file by file, what one writes; of Omni the talker, too."""
    devices = ["cpu", "cpu"] if kind == "cpu" else ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]
    reference = Checkpoint(shipped(f"{family}-tiny"))
    samples = calibration.built_in(adapter_for(reference), 2)
    told: list[tuple[str, int, int]] = []
    quantize(reference, Recipe("awq"), samples, tmp_path / "one", device=devices[0])
    quantize(
        reference,
        Recipe("awq"),
        samples,
        tmp_path / "two",
        device=devices[0],
        beside=devices[1:],
        progress=lambda *said: told.append(said),
    )
    one, two = (HubView(each, adapter_for(each)) for each in map(Checkpoint, (tmp_path / "one", tmp_path / "two")))
    assert set(one) == set(two)
    assert "model.layers.0.self_attn.q_proj.qweight" in {name.removeprefix("thinker.") for name in two}
    for name in one:
        assert one.load(name).dtype == two.load(name).dtype, name
        assert torch.equal(one.load(name).view(torch.uint8), two.load(name).view(torch.uint8)), name
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    counted = [done for _, done, _ in told]
    assert counted == sorted(counted)
    assert told[-1][1] == told[-1][2] == {"qwen2_5_vl": 4, "qwen2_5_omni": 7}[family]


def test_a_share_that_fails(tmp_path: Path) -> None:
    """What is wrong with one process's layer is said in one line, the other is ended, and nothing is left."""
    damaged = copied(shipped("qwen2_5_vl-tiny"), tmp_path / "damaged")

    def plant(tensors: dict[str, Any]) -> None:
        tensors["model.layers.3.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_shard(damaged, "model.layers.3.mlp.up_proj.weight", plant)
    reference = Checkpoint(damaged)
    samples = calibration.built_in(adapter_for(reference), 1)
    with pytest.raises(UserError, match=r"model\.layers\.3\..*") as refused:
        quantize(reference, Recipe("awq"), samples, tmp_path / "out", beside=["cpu"])
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("quantizer", "device", "said"),
    [
        ("rtn", "cpu,cpu", "rtn computes on one device, not 2; several are for awq"),
        ("awq", "cpu,cuda:97", "device 'cuda:97' cannot be used here"),
        ("awq", "cpu,", "device '' cannot be used here"),
    ],
)
def test_devices_that_cannot_share(
    quantizer: str, device: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Devices that are not there, or a quantizer that works on one, are refused in one line before any work."""
    reference = str(shipped("qwen2_5_vl-tiny"))
    assert main([quantizer, "--reference", reference, "--out", str(tmp_path / "out"), "--device", device]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_devices_of_one_kind(tmp_path: Path) -> None:
    """A GPU beside a CPU is refused: it would calibrate its share in another dtype."""
    reference = Checkpoint(shipped("qwen2_5_vl-tiny"))
    samples = calibration.built_in(adapter_for(reference), 1)
    with pytest.raises(UserError, match=r"^cpu, cuda:0: devices of one kind are needed"):
        quantize(reference, Recipe("awq"), samples, tmp_path / "out", beside=["cuda:0"])
    assert not list(tmp_path.iterdir())


def test_share_without_a_talker() -> None:
    """Where there are more devices than layers of the talker, who has none of them need not load it."""
    checkpoint = Checkpoint(shipped("qwen2_5_omni-tiny"))
    view = HubView(checkpoint, adapter_for(checkpoint))
    _, talker = view.adapter.decoders(checkpoint.config)
    chosen = [Job(view, Recipe("awq"), (), share=Share(index, 8)).chosen(talker) for index in range(8)]
    assert [bool(layers) for layers in chosen].count(True) == 3  # of three layers
    assert not Job(view, Recipe("awq", towers=("language_model",)), ()).chosen(talker)


def test_shards_of_others_are_adopted(tmp_path: Path) -> None:
    """Shards of two writers become one checkpoint's: every tensor is where the index says, and counted once."""
    for name in ("whole", "a", "b"):
        (tmp_path / name).mkdir()
    tensors = {f"t{number}": torch.full((3,), float(number)) for number in range(9)}
    whole, *parts = (ShardWriter(tmp_path / name, 24) for name in ("whole", "a", "b"))  # two tensors a shard
    whole.add("t0", tensors["t0"])
    for part, numbers in zip(parts, (range(1, 4), range(4, 8)), strict=True):
        part.add_all({f"t{number}": tensors[f"t{number}"] for number in numbers})
        part.flush()
        whole.adopt(part)
        part.folder.rmdir()  # nothing is left there
    whole.add("t8", tensors["t8"])
    whole.finish()
    (tmp_path / "whole" / "config.json").write_text("{}", encoding="utf-8")
    found = Checkpoint(tmp_path / "whole")
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.load(name), tensor) for name, tensor in tensors.items())
    assert whole.total_bytes == 9 * 3 * 4
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 6
