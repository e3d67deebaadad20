"""The kill matrix: every fault of the catalogue, in every target's artifact, is caught by the checks that it names.

``pytest suites/meta/test_faults.py --report DIR`` puts the matrix into a report; ``-k bnb-nf4`` runs a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from fixtures.adapters import ADAPTERS, adapter_for
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.targets import Target
from fixtures.faults.catalogue import ELSEWHERE, ENTRIES, FAULTS
from fixtures.options import Selection, cores_each
from fixtures.quantizers import calibration, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.quantizers.layers import Progress
from fixtures.subjects import subject
from fixtures.verifying import Verify
from suites.meta.kill_matrix import CHECKS, Outcome, Subject, applying, judged, run
from suites.meta.scaled_limits import names_used

META = Path(__file__).parent
SEEDS = range(5)  # calibration sets that no good artifact may be accused for
QUANTIZERS = ("rtn", "awq", "autoawq", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8")
TARGETS = [
    *(Target("qwen2_5_vl", "tiny", quantizer) for quantizer in QUANTIZERS),
    *(Target("qwen2_5_vl", "tiny_untied", quantizer) for quantizer in ("rtn", "awq")),
    *(Target("qwen2_5_omni", "tiny", quantizer) for quantizer in QUANTIZERS if quantizer != "autoawq"),
]
Outcomes = Callable[[Target], Sequence[Outcome]]


def made(target: Target, selection: Selection, seed: int = 0) -> Subject:
    """A target's good artifact; skipped where its library is absent."""
    needed = {"autoawq": ("awq", "awq-peer")}.get(target.quantizer)
    if target.quantizer.startswith("bnb"):
        needed = ("bitsandbytes", "bnb")
    if needed and find_spec(needed[0]) is None:
        pytest.skip(f'{needed[0]} is absent: pip install "quantproof[{needed[1]}]"')
    reference = Checkpoint(subject(target.reference, selection.cache / "subjects"))
    adapter = adapter_for(reference)
    calibrated = target.quantizer.endswith("awq")
    samples = calibration.built_in(adapter, seed=seed) if calibrated else []
    recipe = recipe_for(target.quantizer, None, calibration=calibration.digest(samples) if calibrated else "")
    return Subject(target, reference.path, cached_artifact(reference, recipe, samples, selection.cache))


def victims(request: pytest.FixtureRequest) -> list[Target]:
    """The targets that this run asks for."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return sorted({found["victim"] for found in params if "victim" in found})


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, selection: Selection, progress: Progress) -> Outcomes:
    """Every fault in every target that is asked for, planted once."""
    subjects = []
    for target in victims(request):
        try:
            subjects.append(made(target, selection))
        except pytest.skip.Exception:  # its own test says so
            continue
    outcomes = run(subjects, selection.limits, min(cores_each(request.config), 8), progress)
    return lambda target: [outcome for outcome in outcomes if outcome.target == target]


@pytest.mark.parametrize("victim", TARGETS, ids=str)
def test_every_fault_is_caught(victim: Target, selection: Selection, matrix: Outcomes, verify: Verify) -> None:
    """Every fault that a target's artifact can have is caught, by every check that exists for it, and crashes none."""
    expected = applying(made(victim, selection))
    found = {outcome.fault: outcome for outcome in matrix(victim)}
    verify("faults planted", len(found.keys() & set(expected)), at_least=len(expected))
    lines = [(FAULTS[number], found[number]) for number in expected]

    verify.none_of("faults caught by nothing", [f.id for f, o in lines if not o.by and not o.crashed], among=len(lines))
    verify.none_of(
        "faults not caught by the check that they name",
        [
            f"{fault.id}: not by {', '.join(missed)}; by {', '.join(sorted(outcome.by)) or 'none'} {outcome.refused}"
            for fault, outcome in lines
            if (missed := sorted(set(fault.caught_by) - outcome.by)) and not outcome.crashed
        ],
        among=len(lines),
    )
    crashes = [f"{fault.id}: {outcome.crashed}" for fault, outcome in lines if outcome.crashed]
    verify.none_of("faults that end in a traceback", crashes, among=len(lines))
    several = [f"{fault.id}: {o.refused!r}" for fault, o in lines if len(o.refused.splitlines()) > 1]
    verify.none_of("refusals of more than one line", several, among=len(lines))
    names = [check.__name__ for check in CHECKS]
    verify.table(
        "Kill matrix",
        ("artifact", "fault", "refused", *(name.removeprefix("test_") for name in names)),
        [
            (str(victim), fault.id, "killed" if outcome.refused else "", *(_cell(outcome, name) for name in names))
            for fault, outcome in lines
        ],
    )


def _cell(outcome: Outcome, check: str) -> str:
    """``killed``, ``survived``, or nothing where the check does not apply or was not reached."""
    return "killed" if check in outcome.killed else "survived" if check in outcome.survived else ""


@pytest.mark.parametrize("victim", TARGETS, ids=str)
def test_no_good_artifact_is_accused(victim: Target, selection: Selection, matrix: Outcomes, verify: Verify) -> None:
    """A good artifact is accused by no check, whichever samples it was calibrated on."""
    outcomes = [outcome for outcome in matrix(victim) if outcome.fault == -1]
    if victim.quantizer.endswith("awq"):
        for seed in SEEDS[1:]:
            other = made(victim, selection, seed)
            outcomes.append(judged(other, -1, other.artifact, selection.limits))
    elif not outcomes:
        made(victim, selection)  # skips
    accused = [
        f"{outcome.refused or '; '.join(f'{check}: {m}' for check, said in outcome.killed.items() for m in said)}"
        for outcome in outcomes
        if outcome.by
    ]
    accused += [outcome.crashed for outcome in outcomes if outcome.crashed]
    asked = sum(len(outcome.survived) + len(outcome.killed) for outcome in outcomes)
    verify.none_of("false alarms", accused, among=len(outcomes))
    verify("checks asked of good artifacts", asked, at_least=len(outcomes) * 10)


def test_matrix_over_all_artifacts(request: pytest.FixtureRequest, matrix: Outcomes, verify: Verify) -> None:
    """Every fault of the catalogue was planted in an artifact that can have it, and caught in each."""
    asked = victims(request)
    outcomes = [outcome for victim in asked for outcome in matrix(victim)]
    by_fault = {number: [o for o in outcomes if o.fault == number] for number in range(len(FAULTS))}
    idle = [FAULTS[number].id for number, found in by_fault.items() if not found]
    if set(asked) == set(TARGETS):
        verify.none_of("faults that no artifact can have", idle, among=len(FAULTS))
    planted = sum(map(len, by_fault.values()))
    escaped = [f"{o.target}: {FAULTS[n].id}" for n, found in by_fault.items() for o in found if not o.by]
    verify.none_of("planted faults that escaped", escaped, among=planted)
    names = [check.__name__ for check in CHECKS]
    verify.table(
        "Kill matrix over all artifacts",
        ("entry", "fault", "artifacts", "refused", *(name.removeprefix("test_") for name in names)),
        [
            (
                FAULTS[number].entry,
                FAULTS[number].name,
                len(found),
                _share(sum(bool(o.refused) for o in found), len(found)),
                *(_share(*_counts(found, name)) for name in names),
            )
            for number, found in by_fault.items()
            if found
        ],
    )


def _counts(outcomes: Sequence[Outcome], check: str) -> tuple[int, int]:
    """How often a check caught a fault, of how often it was asked."""
    asked = [cell for outcome in outcomes if (cell := _cell(outcome, check))]
    return asked.count("killed"), len(asked)


def _share(caught: int, of: int) -> str:
    """``13/15``; nothing where nobody caught anything."""
    return f"{caught}/{of}" if caught else ""


def test_every_limit_matters(request: pytest.FixtureRequest, matrix: Outcomes, verify: Verify) -> None:
    """A limit ten times as strict accuses a good artifact, or is slack for a reason; as lax, it lets a fault escape."""
    if set(victims(request)) != set(TARGETS):
        pytest.skip("only of the whole matrix: pytest suites/meta/test_faults.py")
    names = sorted({name for check in CHECKS for name in names_used(check)})
    outcomes = [outcome for target in TARGETS for outcome in matrix(target)]
    strict = {name for outcome in outcomes if outcome.fault == -1 for name in outcome.tight}
    lax = {name for outcome in outcomes if outcome.fault >= 0 for name in outcome.let_past}
    verify.none_of(
        "limits that could be ten times as strict", sorted({*names} - strict - SLACK.keys()), among=len(names)
    )
    verify.none_of("limits that could be ten times as lax", sorted({*names} - lax), among=len(names))
    verify.none_of("limits that are no slack", sorted(SLACK.keys() & strict), among=len(names))
    verify.table(
        "Limits times ten",
        ("limit", "stricter", "laxer"),
        [
            (
                name,
                SLACK.get(name, "accuses a good artifact"),
                f"lets {sum(name in o.let_past for o in outcomes if o.fault >= 0)} faults past a check",
            )
            for name in names
        ],
    )


# Limits whose tenth a good artifact would meet, too, and why they stay as they are.
SLACK = {
    "coverage.off_record": "good artifacts are exact, 0; 1e-6 is what float32 division may leave on another machine",
}


def test_every_check_kills(verify: Verify) -> None:
    """Every check of bytes is the one that some fault of the catalogue names."""
    idle = {check.__name__ for check in CHECKS} - {name for fault in FAULTS for name in fault.caught_by}
    verify.none_of("checks that no fault of the catalogue names", sorted(idle), among=len(CHECKS))


def test_every_entry_is_planted(verify: Verify) -> None:
    """Every entry of the catalogue is planted, in an artifact or where it lives; faults have names of their own."""
    planted = {fault.entry for fault in FAULTS}
    elsewhere = {entry for entry, tests in ELSEWHERE.items() if tests}
    verify.none_of("entries planted nowhere", sorted(ENTRIES.keys() - planted - elsewhere), among=len(ENTRIES))
    strangers = sorted((planted | ELSEWHERE.keys()) - ENTRIES.keys())
    verify.none_of("faults of no entry", strangers, among=len(FAULTS))
    pointers = [pointer for tests in ELSEWHERE.values() for pointer in tests]
    verify.none_of("tests that are not there", [p for p in pointers if not _exists(p)], among=len(pointers))
    verify.table(
        "Failure catalogue",
        ("entry", "what went wrong", "seen in", "planted in bytes", "planted elsewhere"),
        [
            (
                entry,
                what,
                seen,
                "; ".join(dict.fromkeys(fault.name for fault in FAULTS if fault.entry == entry)),
                "; ".join(ELSEWHERE.get(entry, ())),
            )
            for entry, (what, seen) in ENTRIES.items()
        ],
    )


def _exists(pointer: str) -> bool:
    file, _, test = pointer.partition("::")
    test, _, case = test.rstrip("]").partition("[")
    text = (META / file).read_text(encoding="utf-8") if (META / file).exists() else ""
    return bool(text) and (not test or f"def {test}(" in text) and (not case or f'"{case}": (' in text)


def test_families_have_targets() -> None:
    """Every family and every quantizer that ships is in the matrix."""
    assert {target.family for target in TARGETS} == set(ADAPTERS)
    assert {target.quantizer for target in TARGETS} == set(QUANTIZERS)
