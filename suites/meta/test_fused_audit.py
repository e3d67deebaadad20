"""The audit's kernels, interpreted on a CPU: the definition's numbers, whatever is wrong with an artifact.

Triton decides when it is imported whether it interprets, so each of these tests asks a fresh interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fixtures.audit import fused, fused_check
from fixtures.audit.folding import Unfolded, linked
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import Place, audit_steps, begun, linear_error
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.faults import awq_codes, tensors
from fixtures.faults.editing import copied
from fixtures.formats.awq_gemm import StoredAwq, encode
from fixtures.fresh import in_fresh_process
from fixtures.quantizers.layers import Progress, silent
from suites.meta.plain_audit import Plain, assert_same

HAVE_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is absent")
CPU = torch.device("cpu")
FAULTS: dict[str, Callable[[Path], None]] = {
    "end codes moved": awq_codes.end_codes_moved,
    "scale NaN": awq_codes.nan_scale,
    "rows not folded": awq_codes.rows_not_folded,
    "norm not folded": tensors.norm_not_folded,
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process inherits; in this one Triton may have been imported already."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


# In fresh processes


def disagreements(cases: Sequence[tuple[Any, ...]], progress: Progress = silent) -> list[str]:
    """What the kernels say otherwise than the definition does."""
    return [fused_check.disagreement(CPU, *case) for case in cases]


def with_faults(faults: Sequence[tuple[str, Any]], progress: Progress = silent) -> list[str]:
    """The same, of kernels that one constant is wrong in."""
    import triton.language as tl

    from fixtures.audit import fused_kernels

    said = []
    for what, value in faults:
        where, made = (fused, value) if hasattr(fused, what) else (fused_kernels, tl.constexpr(value))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, what, made)
            said.append(fused_check.disagreement(CPU))
    return said


def audits(reference: Path, good: Path, artifacts: Sequence[Path], progress: Progress = silent) -> list[list[str]]:
    """Of each artifact, how what the kernels say of a linear that it has damaged differs from what is said without."""
    fused.DEVICES.add("cpu")
    assert fused.works(CPU)
    return [_audit(*(Pair(Checkpoint(reference), Checkpoint(path)) for path in (good, one))) for one in artifacts]


def _audit(good: Pair, damaged: Pair) -> list[str]:
    places, make = next(touched(good, damaged))
    found = begun(places, make())()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DEVICES", {"cuda"})
        wanted = [linear_error(place, linear) for place, linear in zip(places, make(), strict=True)]
    wrong = []
    for one, other in zip(found, wanted, strict=True):
        try:
            assert_same(one, Plain(**{field.name: getattr(other, field.name) for field in fields(Plain)}))
            assert (one.place, one.repacked) == (other.place, other.repacked)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


def touched(good: Pair, damaged: Pair) -> Iterator[tuple[list[Place], Callable[[], Sequence[Unfolded]]]]:
    """The steps of an audit that a fault has changed the bytes of."""
    for (places, job), (_, other) in zip(audit_steps(damaged), audit_steps(good), strict=True):
        read, sound = ([need.read().view(torch.uint8) for need in one.needs] for one in (job, other))
        if not all(map(torch.equal, read, sound)):
            yield places, lambda job=job: job.make([need.read() for need in job.needs])  # type: ignore[misc]


# Tests


@needs_triton
def test_kernels_are_the_definition() -> None:
    """Extremes and counts of any linear are the definition's bit for bit, sums nearly; no NaN passes."""
    cases = [(0, 128), (1, 16, torch.float16), (2, 64, torch.float32)]
    assert in_fresh_process(silent, disagreements, cases) == ["", "", ""]


@needs_triton
def test_wrong_kernels_are_noticed() -> None:
    """Kernels with a wrong constant do not pass what a device is asked before it is trusted with them."""
    faults = {
        ("ORDER", 0x76543210): "largest error",
        ("BEYOND", 0.9): "clipped weights",
        ("NARROWEST", 1e-2): "narrowest scale",
        ("NARROWEST", 0.0): "widest scale",
        ("SMALLEST", -1.0): "a scale of 0.0 passes",
        ("HIGHEST", 14): "narrowest scale",
    }
    said = in_fresh_process(silent, with_faults, list(faults))
    assert [one.split(":")[0] for one in said] == list(faults.values())


@needs_triton
def test_faults_as_by_definition(tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path) -> None:
    """A linear that a fault damaged gets the very numbers by kernels that it gets without."""
    damaged = [copied(good_artifact, tmp_path / name) for name in FAULTS]
    for fault, folder in zip(FAULTS.values(), damaged, strict=True):
        fault(folder)
    wrong = in_fresh_process(silent, audits, tiny_reference.path, good_artifact, damaged)
    assert dict(zip(FAULTS, wrong, strict=True)) == {fault: [] for fault in FAULTS}


class Counting(TorchDispatchMode):
    """What torch is asked that a GPU would be launched for, and what it would be waited for."""

    WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "index"}
    FREE = {"empty", "new_empty", "detach"}

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of views nothing is counted."""
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.waits[name] += name in self.WAITS
        places = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)
        }
        outs = [tensor for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        view = outs and not func._schema.is_mutable and all(o.untyped_storage().data_ptr() in places for o in outs)
        self.launches[name] += not view and name not in self.FREE
        return made


class Unlaunched:
    """A kernel that only counts how often it is launched."""

    launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        Unlaunched.launches += 1
        return lambda *arguments, **options: None


@needs_triton
def test_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear takes a dozen launches before its numbers are asked for, two that are linked some sixty; none waits."""
    from fixtures.audit import fused_kernels

    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "works", lambda *_: True)
    for name in ("judge", "allowed"):
        monkeypatch.setattr(fused_kernels, name, Unlaunched())
    weight = torch.randn(256, 256)
    parts = encode(pseudo_quantize_tensor(weight, Scheme(), scale_dtype=torch.float16))
    counted = []
    for count in (1, 2):
        Unlaunched.launches = 0
        with Counting() as counting:
            found = [Unfolded(StoredAwq(parts, Scheme()), weight) for _ in range(count)]
            begun([Place("w", "", 0, "w")] * count, linked(found))
        counted.append(sum(counting.launches.values()) + Unlaunched.launches)
        assert not sum(counting.waits.values()), counting.waits
    assert counted[0] <= 12
    assert counted[1] <= 60


def test_untrusted_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is absent, kernels do not compile or say something else, the definition judges, and says why."""
    trusted = fused.works.__wrapped__
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not trusted(CPU)
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused_check, "disagreement", lambda device, **_: "clipped weights: 2.0, by the definition 1.0")
    with pytest.warns(UserWarning, match="goes without its kernels, slower: clipped weights"):
        assert not trusted(CPU)

    def broken(device: torch.device, **_: object) -> str:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused_check, "disagreement", broken)
    with pytest.warns(UserWarning, match="RuntimeError: Failed to find C compiler"):
        assert not trusted(CPU)
    monkeypatch.setattr(fused_check, "disagreement", lambda device, **_: "")
    assert trusted(CPU)


@pytest.mark.parametrize(
    ("scheme", "device"), [(Scheme(4, -1), "cpu"), (Scheme(4, 48), "cpu"), (Scheme(4, 128), "meta")], ids=str
)
def test_other_forms_are_left_to_the_definition(scheme: Scheme, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that no tile holds, and devices without kernels, are left to the definition."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    weight = torch.randn(16, 384)
    stored = StoredAwq(encode(pseudo_quantize_tensor(weight, scheme)), scheme)
    assert not fused.can_take(Unfolded(stored, weight.to(device)))
    assert fused.can_take(Unfolded(stored, weight)) is (scheme == Scheme(4, 128))
