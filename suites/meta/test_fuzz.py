"""Fuzzing: whatever a user's files hold, it is read, or refused in one clear line, soon, running nothing of it.

``QUANTPROOF_FUZZ_SEED`` gives other inputs than always, ``QUANTPROOF_FUZZ_SHARE`` so many times as many.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fixtures.core.errors import MOST_SAID, UserError, unknown
from fixtures.core.files import check_depth, check_regular, read_text
from fixtures.faults.broken.apart import Report, fuzz_apart
from fixtures.faults.broken.folder import Broken
from fixtures.faults.broken.judge import SECONDS, SLOW, Verdict
from fixtures.faults.broken.reader import Reader
from fixtures.faults.broken.run import judged
from fixtures.verifying import Verify

SHARE = os.environ.get("QUANTPROOF_FUZZ_SHARE", "1")
SEED = os.environ.get("QUANTPROOF_FUZZ_SEED", "")
WITHIN = 900 * max(1.0, float(SHARE))  # seconds for all inputs: some 70 on a core that nobody else uses
# What the judge must say of each reader that is broken on purpose.
SABOTAGE = {
    "lets_a_key_error_through": "Error: ",
    "waits_for_a_fifo": "hung: not done within 5 s",
    "computes_long": "slow: 1.",
    "believes_lengths": "MemoryError",
    "keeps_much": "memory: 5",
    "follows_dots": "outside its folder",
    "accepts_everything": "read as if nothing were wrong",
    "says_nothing": "does not say where",
    "says_too_much": "not one printable line",
    "unpickles": "executed what it read",
}


def test_broken_inputs(tmp_path: Path, verify: Verify) -> None:
    """Ten thousand broken inputs cost one clear line each, within a second and in little memory; none is executed."""
    seed = ("--seed", SEED) if SEED else ()
    report = fuzz_apart(tmp_path, "--share", SHARE, *seed, seconds=WITHIN)
    inputs = sum(tally["inputs"] for tally in report.tallies)
    offences = [offence for tally in report.tallies for offence in tally["offences"]]

    verify.none_of("readers that brought their process down", [report.died] if report.died else [], among=1)
    verify("broken inputs", inputs, at_least=10_000 * min(1.0, float(SHARE)))
    verify.none_of("inputs that gave something else than one clear line", offences, among=inputs)
    verify(
        "slowest input",
        max((tally["slowest"] for tally in report.tallies), default=None),
        "s of computing",
        at_most=1.0,
        detail="\n".join(f"{t['reader']}: {t['slowest_input']}" for t in report.tallies if t["slowest"] > 0.5),
    )
    verify.none_of(
        "readers that refuse everything, or nothing",
        [tally["reader"] for tally in report.tallies if not tally["refused"] or not tally["read"]],
        among=len(report.tallies),
    )
    verify.table(
        "Fuzzing",
        ("reader", "inputs", "refused", "read", "slowest ms"),
        [(t["reader"], t["inputs"], t["refused"], t["read"], 1000 * t["slowest"]) for t in report.tallies],
    )


# Nobody else checks the checker


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the judge says of readers that are broken on purpose."""
    return fuzz_apart(tmp_path_factory.mktemp("sabotaged"), "--sabotaged", seconds=300)


@pytest.mark.parametrize("reader", SABOTAGE)
def test_sabotaged_reader(reader: str, sabotaged: Report) -> None:
    """A reader that crashes, hangs, fills the memory, executes, looks outside or mumbles is told, with its input."""
    found: dict[str, Any] = next(tally for tally in sabotaged.tallies if tally["reader"] == reader)
    assert found["offending"] == 1
    assert SABOTAGE[reader] in found["offences"][0]


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [((1.2, 0.3), False), ((1.2, 1.1, 0.3), False), ((1.3, 1.1, 1.2, 0.3), True), ((0.3, 1.2), False)],
)
def test_slow_is_who_is_always_slow(seconds: tuple[float, ...], slow: bool) -> None:
    """An input that once took long because others computed is no offence; one that takes long in three tries is."""
    tried = iter(seconds)
    given: list[str] = []

    def judge(read: object, broken: Broken, *, elsewhere: bool = False) -> Verdict:
        given.append(broken.what)
        if broken.what == "nothing":
            return Verdict(False, 0.1)
        took = next(tried)
        return Verdict(True, took, f"{SLOW}: {took} s" if took > SECONDS else "")

    reader = Reader("reader", lambda folder: None, {}, st.nothing(), 1)
    verdict = judged(reader, judge, Broken({}, "hostile"))
    assert verdict.slow == slow
    assert verdict.seconds == min(seconds[: given.count("hostile")])
    assert given[1::2] == ["nothing"] * (len(given) // 2), "what a reader remembers makes its next try quicker"


def test_reader_that_brings_the_process_down(sabotaged: Report) -> None:
    """A process that dies is told with the last reader that was done and the input that it died over."""
    assert sabotaged.died.startswith("the process ended with -6 after unpickles, over ")


def test_process_that_does_not_end(tmp_path: Path) -> None:
    """A process that is not done in time is ended, and told."""
    report = fuzz_apart(tmp_path, seconds=0.5)
    assert report.died == "the process ended with None after nothing, over nothing yet: not done after 0 s"


# What keeps an error one line, and a reader from waiting


@pytest.mark.parametrize("quoted", ["a\nb", "a\r\x1b[1mb", "\u202e", "\ud800", "\0", "x" * 10**6])
def test_error_is_one_line(quoted: str) -> None:
    """Whatever an error quotes, it is one printable line of bounded length, and its end still says what to do."""
    said = str(UserError(f"file {quoted} is wrong; copy it again"))
    assert said.isprintable()
    assert len(said) <= MOST_SAID + 5
    assert said.endswith("copy it again")


def test_unknown_word_among_many() -> None:
    """Of many known words only some are offered, and the nearest always."""
    said = str(unknown("limit", "nonesuch", [*(f"word {n}" for n in range(89)), "nonsuch"]))
    assert "did you mean 'nonsuch'" in said
    assert "and 70 more" in said


def test_no_regular_file(tmp_path: Path) -> None:
    """A pipe, a device or a folder is refused at once; a link to a file is that file, as in the hub's cache."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "blob").write_text("content")
    (tmp_path / "link").symlink_to("blob")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nowhere"):
        with pytest.raises(OSError):
            read_text(path)
    with pytest.raises(OSError, match="at most 3 are read"):
        check_regular(tmp_path / "blob", 3)
    assert read_text(tmp_path / "link") == "content"


def test_depth() -> None:
    """JSON may nest as deep as configs do, and not as deep as recursion fails."""
    value: object = 1
    for _ in range(60):
        value = {"a": [value]} if _ % 2 else [value]
        check_depth(value) if _ < 30 else None
    with pytest.raises(ValueError, match="nests more than 64 deep"):
        check_depth(value)
