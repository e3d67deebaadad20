"""Planting every fault of the catalogue in every target's artifact, and asking every check of bytes what it says."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fixtures.adapters import adapter_for
from fixtures.audit.coverage import changed_tensors, linear_states
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.checkpoints import read_scales, read_search
from fixtures.core.checkpoint import INDEX, Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.limits import Limits
from fixtures.core.measurement import Measurement
from fixtures.core.targets import Target
from fixtures.faults.catalogue import FAULTS, REFUSED, Setting
from fixtures.formats import format_of
from fixtures.quantizers.layers import Progress, silent
from suites import test_calibration, test_coverage, test_roundtrip
from suites.meta.answering import listener
from suites.meta.scaled_limits import FACTORS, names_used, scaled

Check = Callable[..., None]
CHECKS: tuple[Check, ...] = (
    test_roundtrip.test_rounding,
    test_roundtrip.test_frobenius,
    test_roundtrip.test_resolution,
    test_roundtrip.test_clipping,
    test_roundtrip.test_codes,
    test_roundtrip.test_tables,
    test_coverage.test_every_linear,
    test_coverage.test_every_tensor,
    test_coverage.test_size,
    test_coverage.test_folded_norms,
    test_coverage.test_ties,
    test_coverage.test_skip_list_in_transformers,
    test_coverage.test_skip_list_in_vllm,
    test_coverage.test_settings,
    test_calibration.test_search_record,
)


@dataclass(frozen=True)
class Subject:
    """A good artifact beside its reference."""

    target: Target
    reference: Path
    artifact: Path

    @cached_property
    def setting(self) -> Setting:
        """What a fault may depend on."""
        reference, artifact = Checkpoint(self.reference), Checkpoint(self.artifact)
        config = artifact.quantization or {}
        eight = config.get("load_in_8bit")
        layout = "awq" if format_of(artifact).method == "awq" else "8-bit" if eight else "4-bit"
        tied = adapter_for(reference).head_is_tied(reference.config)
        return Setting(self.target, layout, bool(config.get("bnb_4bit_use_double_quant")), tied)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks that apply to it, as the markers say."""
        missing = {
            test_roundtrip.test_tables: self.setting.layout == "awq",
            test_coverage.test_folded_norms: self.setting.layout != "awq",
            test_calibration.test_search_record: self.target.quantizer != "awq",
        }
        return tuple(check for check in CHECKS if not missing.get(check))


class Evidence:
    """What the checks of bytes look at, computed once per artifact; whichever limits they are then held to."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        reference = Checkpoint(subject.reference)
        self.target = subject.target
        self.artifact = Checkpoint(folder)
        self.pair = Pair(reference, self.artifact, adapter_for(reference).quantizable(reference.config))
        self.pair.require_same_shapes()

    @cached_property
    def linears(self) -> Sequence[Any]:
        """What became of every linear."""
        return linear_states(self.pair)

    @cached_property
    def linear_errors(self) -> Sequence[Any]:
        """What every quantized linear lost."""
        return list(audit_linears(self.pair))

    @cached_property
    def tensor_changes(self) -> Sequence[Any]:
        """What every other tensor lost."""
        return list(changed_tensors(self.pair))

    @cached_property
    def recorded_scales(self) -> Any:
        """The scales that our engine recorded."""
        return read_scales(self.artifact)

    @cached_property
    def search_record(self) -> Any:
        """What our engine's search recorded."""
        return read_search(self.artifact)

    def ask(self, check: Check, limits: Limits) -> list[Measurement]:
        """What a check measures here, held to ``limits``."""
        verify = listener()
        given = {"limits": limits, "verify": verify}
        wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
        check(**{name: given[name] if name in given else getattr(self, name) for name in wanted})
        return verify.measurements


@dataclass
class Outcome:
    """What became of one fault in one target."""

    target: Target
    fault: int  # its place in the catalogue; -1: none was planted
    killed: dict[str, list[Measurement]] = field(default_factory=dict)  # check -> what does not hold
    survived: list[str] = field(default_factory=list)  # checks that saw nothing
    tight: set[str] = field(default_factory=set)  # limits: ten times as strict, a check that holds would fail
    let_past: set[str] = field(default_factory=set)  # limits: ten times as lax, a check that fails would hold
    refused: str = ""  # the line that reading it ended with
    crashed: str = ""  # an exception that is no such line

    @property
    def by(self) -> set[str]:
        """The checks that caught it."""
        return {*self.killed, *({REFUSED} if self.refused else ())}


def judged(
    subject: Subject, fault: int, folder: Path, limits: Limits, changed: Collection[str] | None = None
) -> Outcome:
    """Ask every check that applies of an artifact.

    ``changed`` are the files that differ from the good artifact's, where that is known: ``test_settings`` is only asked
    where it would read one of them.
    """
    settings_as_they_were = changed is not None and not any(map(is_setting, changed))
    outcome = Outcome(subject.target, fault)
    try:
        evidence = Evidence(subject, folder)
        for check in subject.checks:
            if check is test_coverage.test_settings and settings_as_they_were:
                outcome.survived.append(check.__name__)
                continue
            broken = [m for m in evidence.ask(check, limits) if m.holds is False]
            hanging = {name for name in names_used(check) if hangs_on(evidence, check, limits, name, not broken)}
            outcome.let_past |= hanging if broken else set()
            outcome.tight |= set() if broken else hanging
            if broken:
                outcome.killed[check.__name__] = broken
            else:
                outcome.survived.append(check.__name__)
    except UserError as error:
        outcome.refused = str(error)
    except Exception as error:
        outcome.crashed = f"{type(error).__name__}: {error}"
    return outcome


def hangs_on(evidence: Evidence, check: Check, limits: Limits, name: str, holds: bool) -> bool:
    """Whether a check would say otherwise, were one of its limits ten times as strict or as lax."""
    return any(
        all(m.holds is not False for m in evidence.ask(check, scaled(limits, name, factor))) != holds
        for factor in FACTORS
    )


def differing(subject: Subject, folder: Path) -> set[str]:
    """The files, relative to the folder, that say something else than the good artifact's, however they are written."""
    good, other = (
        {str(file.relative_to(path)): _meaning(file) for file in path.rglob("*") if file.is_file()}
        for path in (subject.artifact, folder)
    )
    return {
        name
        for name in good.keys() | other.keys()
        if (name in good, good.get(name)) != (name in other, other.get(name))
    }


def is_setting(name: str) -> bool:
    """Whether ``test_settings`` looks at a file: not at tensors, nor at our records in their folder."""
    return "/" not in name and not name.endswith(".safetensors") and name != INDEX


def _meaning(file: Path) -> object:
    data = file.read_bytes()
    try:
        if file.suffix == ".json":
            return json.loads(data)
        if file.suffix == ".safetensors":
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            spans = {name: entry.pop("data_offsets") for name, entry in header.items()}
            return {name: (header[name], data[start + a : start + b]) for name, (a, b) in spans.items()}
    except (ValueError, AttributeError, KeyError):
        pass
    return data  # damaged files are compared as they are


def planted(subject: Subject, fault: int, limits: Limits) -> Outcome:
    """Plant one fault in a copy of a good artifact, and ask."""
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / "damaged"
        shutil.copytree(subject.artifact, damaged)
        FAULTS[fault].plant(damaged)
        if not (changed := differing(subject, damaged)):
            return Outcome(subject.target, fault, crashed="nothing was planted: the copy is as it was")
        return judged(subject, fault, damaged, limits, changed)


def applying(subject: Subject) -> list[int]:
    """The faults that a target's artifact can have."""
    return [number for number, fault in enumerate(FAULTS) if fault.where(subject.setting)]


def _share(subject: Subject, faults: Sequence[int], limits: Limits) -> list[Outcome]:
    return [planted(subject, fault, limits) for fault in faults]


def run(subjects: Sequence[Subject], limits: Limits, workers: int, progress: Progress = silent) -> list[Outcome]:
    """Every fault in every subject, on ``workers`` processes; and every subject as it is."""
    # a third of a target at a time: targets differ in cost, and a process takes seconds to start
    jobs = [(subject, applying(subject)[start::3]) for subject in subjects for start in range(3)]
    outcomes = [judged(subject, -1, subject.artifact, limits) for subject in subjects]
    done = 0
    total = sum(len(faults) for _, faults in jobs)
    if workers == 1:  # a process for the only worker would but import everything anew
        for subject, faults in jobs:
            outcomes += _share(subject, faults, limits)
            done += len(faults)
            progress("faults planted", done, total)
        return outcomes
    # a process per core: threads of their own would only spin beside them
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **one_thread) as pool:  # type: ignore[arg-type]
        for future in as_completed([pool.submit(_share, subject, faults, limits) for subject, faults in jobs]):
            outcomes += future.result()
            done += len(future.result())
            progress("faults planted", done, total)
    return outcomes
