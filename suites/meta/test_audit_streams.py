"""The audit that streams says what the plain one says, of good artifacts and damaged ones, and holds little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.audit import __main__ as command
from fixtures.audit import comparing, folding, roundtrip, streaming
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import LinearError, audit_linears
from fixtures.audit.streaming import Job, Stream
from fixtures.core.checkpoint import Checkpoint, Need
from fixtures.core.errors import CheckpointError
from fixtures.faults import awq_codes, bnb, tensors
from fixtures.faults.editing import copied, edit_tensor
from fixtures.fresh import in_fresh_process
from fixtures.options import Selection
from fixtures.quantizers import quantize, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.quantizers.layers import Progress, silent
from suites.meta.plain_audit import assert_same, plain_audit

KINDS = ("rtn", *(("bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8") if find_spec("bitsandbytes") else ()))
FAULTS = (
    awq_codes.wrong_nibble_order,
    awq_codes.scale_off(0.01),
    awq_codes.all_scales_off(-0.66),
    awq_codes.end_codes_moved,
    awq_codes.zero_scale,
    awq_codes.nan_scale,
    awq_codes.rows_not_folded,
    awq_codes.all_zero_weights,
    tensors.norm_not_folded,
)
BNB_FAULTS = (
    pytest.param("bnb-nf4", bnb.flipped_code, id="code flipped"),
    pytest.param("bnb-nf4", bnb.absmax_off(-0.5), id="absmax halved"),
    pytest.param("bnb-nf4", bnb.absmax_is(0.0), id="absmax 0"),
    pytest.param("bnb-nf4-dq", bnb.nested_absmax_off(0.02), id="nested absmax off"),
    pytest.param("bnb-nf4-dq", bnb.nibbles_swapped, id="nibbles swapped"),
    pytest.param("bnb-int8", bnb.lowest_code, id="lowest code"),
    pytest.param("bnb-int8", bnb.row_scale_is(0.0), id="row scale 0"),
)


def assert_same_audit(pair: Pair) -> None:
    """Every quantized linear, all of them."""
    wanted = plain_audit(pair)
    found = {error.name: error for error in audit_linears(pair)}
    assert found.keys() == wanted.keys() == pair.quantized
    for name, error in found.items():
        assert_same(error, wanted[name])
        assert error.repacked


@pytest.mark.parametrize("elements", [1, 5000, 1 << 18])
def test_awq_as_by_definition(
    elements: int, tiny_reference: Checkpoint, good_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A searched artifact, scales folded and weights clipped, is judged as by definition, however it is cut."""
    monkeypatch.setitem(streaming.PART, "cpu", elements)
    assert_same_audit(Pair(tiny_reference, Checkpoint(good_artifact)))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_as_by_definition(
    kind: str, tiny_reference: Checkpoint, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts of every other quantizer are judged as by definition."""
    monkeypatch.setitem(streaming.PART, "cpu", 5000)
    artifact = cached_artifact(tiny_reference, recipe_for(kind, None), (), selection.cache)
    assert_same_audit(Pair(tiny_reference, Checkpoint(artifact)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_as_by_definition(
    fault: Callable[[Path], None], tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path
) -> None:
    """A damaged artifact gets the very numbers that the definition gives it."""
    damaged = copied(good_artifact, tmp_path / "damaged")
    fault(damaged)
    assert_same_audit(Pair(tiny_reference, Checkpoint(damaged)))


@pytest.mark.skipif(len(KINDS) == 1, reason="bitsandbytes is absent")
@pytest.mark.parametrize(("kind", "fault"), BNB_FAULTS)
def test_faults_of_tables_as_by_definition(
    kind: str, fault: Callable[[Path], None], tiny_reference: Checkpoint, selection: Selection, tmp_path: Path
) -> None:
    """So does a damaged one of bitsandbytes."""
    good = cached_artifact(tiny_reference, recipe_for(kind, None), (), selection.cache)
    damaged = copied(good, tmp_path / "damaged")
    fault(damaged)
    assert_same_audit(Pair(tiny_reference, Checkpoint(damaged)))


def test_torn_packing_is_caught(
    tiny_reference: Checkpoint, good_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that do not survive packing are noticed in whichever part they are."""
    from fixtures.formats import awq_gemm

    pack = awq_gemm.pack
    monkeypatch.setattr(awq_gemm, "pack", lambda codes: pack(codes) ^ 1)
    assert not any(error.repacked for error in audit_linears(Pair(tiny_reference, Checkpoint(good_artifact))))


# Streams


def jobs(checkpoint: Checkpoint, made: list[str]) -> Iterator[Job[str]]:
    """One for each tensor, which says its name when it is made."""
    for name in checkpoint.tensors:
        yield Job([Need(checkpoint, name)], lambda tensors, name=name: made.append(name) or name)  # type: ignore[misc]


def test_results_come_in_order(tiny_reference: Checkpoint) -> None:
    """Results come in the jobs' order, each made when it is taken, and every byte is counted."""
    made: list[str] = []
    stream = Stream()
    taken = stream.take(jobs(tiny_reference, made))
    assert next(taken) == next(iter(tiny_reference.tensors))
    assert len(made) == 1
    assert [made[0], *taken] == list(tiny_reference.tensors) == made
    assert stream.bytes == tiny_reference.bytes


def test_what_is_read_is_what_is_loaded(tiny_reference: Checkpoint, good_artifact: Path) -> None:
    """Bytes read into memory of their own are those that the library maps, in whole and in part."""
    for checkpoint in (tiny_reference, Checkpoint(good_artifact)):
        for name, info in checkpoint.tensors.items():
            whole = checkpoint.load(name)
            assert torch.equal(checkpoint.read(name), whole)
            part = slice(info.parameters // 3, info.parameters // 2)
            assert torch.equal(checkpoint.read(name, part), whole.reshape(-1)[part])


def test_file_cut_short_is_refused(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A file that lost its end after its header was read is refused in one line, when its turn comes."""
    folder = copied(tiny_reference.path, tmp_path / "cut")
    checkpoint = Checkpoint(folder)
    shard = folder / next(iter(checkpoint.tensors.values())).shard
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="has become shorter while it was read"):
        list(Stream().take(jobs(checkpoint, [])))


@pytest.mark.parametrize("at", [0, 6, 7, 200])
def test_changes_are_found_in_every_part(
    at: int, tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element is found to differ wherever the tensor is cut, and once."""
    monkeypatch.setattr(comparing, "AT_A_TIME", 7)
    name = "visual.merger.mlp.0.bias"
    damaged = copied(good_artifact, tmp_path / "damaged")
    edit_tensor(damaged, name, lambda bias: bias + (torch.arange(len(bias)) == at))
    pair = Pair(tiny_reference, Checkpoint(damaged))
    one = [comparing.Compared(name, name)]
    (change,) = comparing.differences(pair.reference, pair.artifact, one)
    assert (change.name, change.elements) == (name, 1)
    assert float(change.what.removeprefix("largest difference ")) == pytest.approx(1, rel=0.01)


# Memory

LAYERS = (4, 16)


def hoarding(linears: Iterator[LinearError]) -> Iterator[LinearError]:
    """A fault: every linear's weight is kept."""
    kept = []
    target = folding.Unfolded.target

    def keeping(self: folding.Unfolded, begin: int, end: int) -> Tensor:
        kept.append(target(self, begin, end))
        return kept[-1]

    folding.Unfolded.target = keeping  # type: ignore[method-assign]
    try:
        yield from linears
    finally:
        folding.Unfolded.target = target  # type: ignore[method-assign]


def peak_growth(reference: Path, artifact: Path, faulty: bool, progress: Progress = silent) -> int:
    """In a fresh process: by how many bytes its peak grows while it audits a second time."""
    pair = Pair(Checkpoint(reference), Checkpoint(artifact))

    def audit() -> Iterator[LinearError]:
        return roundtrip.audit_linears(pair, progress)

    next(audit())  # what is imported and allocated once
    before = peak()
    for _ in hoarding(audit()) if faulty else audit():
        pass
    return peak() - before


def peak() -> int:
    """The most bytes that this process ever had in memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise LookupError("no VmHWM")


@pytest.fixture(scope="module")
def deep(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    """References of few and of many layers, all linears of one size, with artifacts."""
    from fixtures.subjects.full_size import write_random

    made = {}
    for layers in LAYERS:
        folder = tmp_path_factory.mktemp(f"layers{layers}")
        config: dict[str, Any] = deepcopy(dict(tiny_reference.config))
        text = config.get("text_config", config)
        text.update(num_hidden_layers=layers, hidden_size=512, intermediate_size=2048, num_attention_heads=8)
        text.update(layer_types=["full_attention"] * layers, max_window_layers=layers)
        config["vision_config"]["out_hidden_size"] = 512
        (folder / "reference").mkdir()
        write_random(folder / "reference", config)
        for file in tiny_reference.path.iterdir():
            if not (folder / "reference" / file.name).exists() and "safetensors" not in file.name and file.is_file():
                (folder / "reference" / file.name).write_bytes(file.read_bytes())
        quantize(Checkpoint(folder / "reference"), recipe_for("rtn", None), (), folder / "artifact")
        made[layers] = folder / "reference", folder / "artifact"
    return made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("faulty", [False, True], ids=["streamed", "hoarded"])
def test_memory_is_that_of_a_linear(faulty: bool, deep: dict[int, tuple[Path, Path]]) -> None:
    """Four times the layers take no more memory, by less than a linear or two; keeping every weight does."""
    growth = [in_fresh_process(silent, peak_growth, *deep[layers], faulty) for layers in LAYERS]
    linear = 512 * 2048 * 4  # bytes of the largest, decoded
    assert (growth[1] - growth[0] < 4 * linear) is not faulty, growth


# What a GPU is asked now and heard later


@pytest.mark.parametrize("behind", [0, 2, 100])
def test_results_settle_in_order(behind: int, tiny_reference: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come in the jobs' order, each heard only when so many later ones were asked for, or no more are left."""
    monkeypatch.setitem(streaming.BEHIND, "cpu", behind)
    asked: list[str] = []
    names = list(tiny_reference.tensors)

    def later() -> Iterator[Job[Callable[[], tuple[str, int]]]]:
        for name in names:

            def make(_: Sequence[Tensor], name: str = name) -> Callable[[], tuple[str, int]]:
                asked.append(name)
                return lambda: (name, len(asked))

            yield Job([Need(tiny_reference, name)], make)

    settled = list(Stream().settled(later()))
    assert settled == [(name, min(i + 1 + behind, len(names))) for i, name in enumerate(names)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_asked_is_compared(dtype: torch.dtype) -> None:
    """Whether bits differ at all is asked first, and what is heard is what is compared at once: one bit, -0, NaN."""
    before = (torch.arange(12) - 3).to(dtype)
    others = [before.clone(), before.clone(), before.clone()]
    others[1][7] += 1
    if dtype.is_floating_point:
        before[5], others[0][5], others[1][5], others[2][5] = (math.nan,) * 4
        others[2][3] = -0.0
    found = [comparing.asked(before, after)() for after in others]
    assert found == [comparing.differing(before, after) for after in others]
    assert [elements for elements, _, _ in found] == [0, 1, int(dtype.is_floating_point)]


# The command


def test_bench(tiny_reference: Checkpoint, good_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says how fast the audit is beside reading alone, and refuses a bad device in one line."""
    ask: Sequence[str] = ["bench", "--reference", str(tiny_reference.path), "--artifact", str(good_artifact)]
    assert command.main([*ask, "--rounds", "2", "--cold"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert all("28 linears, 0 other tensors changed" in line for line in printed[:4:2])
    assert all(line.startswith("  of the audit's seconds ") for line in printed[1:4:2])
    assert printed[4].startswith("peak memory: ")
    assert command.main([*ask, "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds 0: at least one\n"
