"""What changed between two runs: every kind of change is said, by its right name, and nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Outcome, Result, Run
from reports import changes, store
from reports.__main__ import main
from reports.compare import Comparison, Move, Rebound
from suites.meta.pages import Page

ROOT = Path(__file__).parents[2]
BOUND = Bound("at_most", 0.02)
GOOD = Measurement("mean token KL", 0.0124, "nats", BOUND)
BAD = Measurement("mean token KL", 0.314, "nats", BOUND)
NOTHING = Measurement("mean token KL", math.nan, "nats", BOUND)
EVIL = "<script>alert(1)</script> | `tick` ]]> \x00\x1b[31m\ud800\u202e\n\n# x\n|a|"
FORMATS = {"text": changes.text, "markdown": changes.markdown, "html": changes.page}


def result(outcome: Outcome = "passed", *measurements: Measurement, name: str = "test_p", **more: Any) -> Result:
    """A result about the target ``f-tiny-awq``, or as ``more`` says."""
    quantizer = more.pop("quantizer", "awq")
    target = {"family": "f", "size": "tiny", "quantizer": quantizer}
    given: dict[str, Any] = {"id": f"suites/test_parity.py::{name}[f-tiny-{quantizer}]", "target": target}
    return Result(**{"outcome": outcome, "requirement": "", "measurements": measurements, **given, **more})


def valued(value: float, bound: Bound | None = BOUND, unit: str = "nats") -> Measurement:
    """The quantity ``mean token KL`` with that value."""
    return Measurement("mean token KL", value, unit, bound)


def compared(before: list[Result], after: list[Result], above: float = 0.01, **about: tuple[Any, Any]) -> Comparison:
    """Two runs side by side; of ``about``, the first is what the run before says."""
    old, new = ({key: pair[i] for key, pair in about.items()} for i in (0, 1))
    return Comparison(Run(old, before), Run(new, after), above)


def said(found: Comparison) -> dict[str, list[str]]:
    """The lines of the text under each of its titles, columns apart by one space; the first under no title."""
    head, *parts = changes.text(found).rstrip("\n").split("\n\n")
    listed = [part.splitlines() for part in parts]
    return {"": head.splitlines()} | {lines[0]: [" ".join(line.split()) for line in lines[1:]] for lines in listed}


def titles(found: Comparison) -> list[str]:
    return [table.title.split(" (")[0].split(" by more")[0] for table in changes.sections(found)]


FULL = [
    result("passed", GOOD, valued(math.inf), name="test_a"),
    result("failed", BAD, NOTHING, name="test_b", message="m"),
    result("skipped", name="test_c", message="no vLLM"),
]


@pytest.mark.parametrize("results", [[], FULL], ids=["empty", "full"])
def test_nothing_changed(results: list[Result]) -> None:
    """Of a run and itself at another time, for longer and into another folder, nothing is said to have changed."""
    again = [replace(r, seconds=9.0) for r in results]
    about = {
        "started": ("2026-11-22T00:00:00+00:00", "2026-11-23T00:00:00+00:00"),
        "seconds": (1, 2),
        "command": ("a", "b"),
        "machine": ({"gpu": "H200"}, {"gpu": "H200"}),
        "versions": ({"torch": "2", "vllm": None}, {"torch": "2"}),
    }
    found = compared(results, again, 0.0, **about)
    assert found.same
    assert changes.text(found).startswith("nothing changed\n")
    assert changes.markdown(found).startswith("# quantproof: nothing changed\n")
    assert "<h1>nothing changed</h1>" in changes.page(found) and "<table" not in changes.page(found)


def test_outcomes() -> None:
    """Outcomes that changed come with what newly fails first; those that did not are left out."""
    names = (
        "test_same",
        "test_fixed",
        "test_lost",
        "test_known",
        "test_worse",
        "test_erred",
        "test_beyond",
        "test_still",
    )
    before: list[Outcome] = ["passed", "failed", "passed", "passed", "passed", "skipped", "passed", "failed"]
    after: list[Outcome] = ["passed", "passed", "skipped", "xfailed", "failed", "error", "passed", "failed"]
    found = compared(
        [result(o, name=n) for n, o in zip(names, before, strict=True)],
        [
            result(o, *([BAD] if n == "test_beyond" else []), name=n, message="why" if n == "test_worse" else "")
            for n, o in zip(names, after, strict=True)
        ],
    )
    assert said(found)["Outcomes"] == [
        "target check before after why",
        "newly failing f-tiny-awq parity: test_worse ok FAILED why",
        "newly failing f-tiny-awq parity: test_beyond ok FAILED mean token KL: 0.314 nats, must be at most 0.02 nats",
        "newly failing f-tiny-awq parity: test_erred skipped ERROR",
        "changed f-tiny-awq parity: test_known ok known bad",
        "changed f-tiny-awq parity: test_lost ok skipped",
        "no longer failing f-tiny-awq parity: test_fixed FAILED ok",
    ]
    assert changes.headline(found).startswith("3 checks newly failing, 3 checks with another outcome")


def test_verdicts() -> None:
    """A target whose verdict changed is named with both."""
    found = compared([result("passed", GOOD)], [result("failed", GOOD)])
    assert said(found)["Verdicts"] == ["target before after", "f-tiny-awq proved DISPROVED"]


def test_appeared_and_disappeared() -> None:
    """Checks that only one run has are listed, the worst first, and are no other kind of change."""
    common = result("passed", GOOD)
    found = compared(
        [common, result("passed", GOOD, name="test_old")],
        [common, result("passed", GOOD, name="test_new"), result("passed", GOOD, BAD, name="test_bad")],
    )
    parts = said(found)
    assert parts["Checks that are gone"] == ["target check was", "f-tiny-awq parity: test_old ok"]
    assert parts["New checks"] == [
        "target check is",
        "f-tiny-awq parity: test_bad FAILED: mean token KL: 0.314 nats, must be at most 0.02 nats",
        "f-tiny-awq parity: test_new ok",
    ]
    assert titles(found) == ["Verdicts", "Checks that are gone", "New checks"]


def test_different_targets() -> None:
    """Runs of different targets have no check in common: a line per target, not one per check."""
    about = {"subjects": ({"f-tiny-awq": {"sha256": "a"}}, {"f-tiny-rtn": {"sha256": "b"}})}
    found = compared(
        [result("passed", GOOD, name=f"test_{i}") for i in range(9)],
        [result("failed", BAD, name=f"test_{i}", quantizer="rtn") for i in range(9)],
        **about,
    )
    parts = said(found)
    assert "The two runs have no check in common." in parts[""]
    assert parts["Checks that are gone"][1:] == ["f-tiny-awq all of this target 9 ok"]
    assert parts["New checks"][1:] == ["f-tiny-rtn all of this target 9 FAILED"]
    assert parts["Verdicts"][1:] == ["f-tiny-awq proved -", "f-tiny-rtn - DISPROVED"]
    assert titles(found) == ["Verdicts", "Checks that are gone", "New checks"]


@pytest.mark.parametrize(
    ("old", "new", "above", "line"),
    [
        (0.010, 0.0101, 0.01, ""),
        (0.010, 0.0102, 0.01, "0.01 nats 0.0102 nats +2.0 % worse at most 0.02 50 % inside 49 % inside"),
        (0.010, 0.005, 0.01, "0.01 nats 0.005 nats -50 % better at most 0.02 50 % inside 75 % inside"),
        (0.010, 0.005, 0.6, ""),
        (0.0, 0.005, 9.0, "0 nats 0.005 nats from zero worse at most 0.02 100 % inside 75 % inside"),
        (-0.01, -0.005, 0.1, "-0.01 nats -0.005 nats +50 % worse at most 0.02 150 % inside 125 % inside"),
        (0.010, math.nan, 9.0, "0.01 nats NaN nats worse at most 0.02 50 % inside not a number"),
        (math.nan, 0.010, 9.0, "NaN nats 0.01 nats better at most 0.02 not a number 50 % inside"),
        (math.nan, math.nan, 0.0, ""),
        (math.inf, math.inf, 0.0, ""),
        (0.02, 0.0200001, 0.01, "0.02 nats 0.0200001 nats +< 0.1 % worse at most 0.02 at the bound < 0.1 % beyond"),
        (0.0199, 0.0201, 0.5, "0.0199 nats 0.0201 nats +1.0 % worse at most 0.02 0.5 % inside 0.5 % beyond"),
    ],
)
def test_numbers(old: float, new: float, above: float, line: str) -> None:
    """A number that changed by more than asked for, or across its bound, comes with values, bound and margins."""
    found = compared([result("passed", valued(old))], [result("passed", valued(new))], above)
    table = next((t for t in changes.sections(found) if t.title.startswith("Numbers")), None)
    if not line:
        assert table is None
        return
    assert table is not None
    shown = " ".join(str(cell) for cell in table.rows[0][3:])
    assert shown == line


def test_numbers_in_order() -> None:
    """What is beyond its bound comes first, then what became worse by the largest share, then what became better."""
    pairs = {"test_a": (0.01, 0.005), "test_b": (0.01, 0.011), "test_c": (0.01, 0.015), "test_d": (0.03, 0.021)}
    before = [result("passed", valued(old), name=n) for n, (old, _) in pairs.items()]
    after = [result("passed", valued(new), name=n) for n, (_, new) in pairs.items()]
    assert [m.result.check for m in compared(before, after).moves] == ["test_d", "test_c", "test_b", "test_a"]


@pytest.mark.parametrize(
    ("bound", "old", "new", "toward"),
    [
        (Bound("at_most", 1), 0.5, 0.6, "worse"),
        (Bound("at_least", 1), 1.5, 1.6, "better"),
        (Bound("at_least", 1), 1.5, 1.4, "worse"),
        (Bound("equal_to", 1), 1.5, 1.4, "better"),
        (Bound("equal_to", 1), 0.75, 1.25, ""),
        (None, 0.5, 0.6, ""),
    ],
)
def test_better_or_worse(bound: Bound | None, old: float, new: float, toward: str) -> None:
    """Better and worse are said only of what a bound judges, and by its direction."""
    move = Move(result(), valued(old, bound), valued(new, bound))
    assert move.toward == toward


def test_measurements_come_and_go() -> None:
    """A quantity that a check no longer measures, or measures anew, or in another unit, is a change."""
    one, other = Measurement("one", 1.0), Measurement("other", 2.0)
    found = compared(
        [result("passed", one, GOOD)],
        [result("passed", other, valued(0.0124, unit="bits"))],
    )
    rows = sorted(row[2:6] for row in changes.sections(found)[0].rows)
    assert rows == [
        ("mean token KL", "0.0124 nats", "0.0124 bits", ""),
        ("one", "1", "not measured", "gone"),
        ("other", "not measured", "2", "new"),
    ]
    skipped = compared([result("passed", one, GOOD)], [result("skipped", message="no vLLM")])
    assert skipped.moves == ()  # the outcome says it


def test_alike_quantities_keep_apart() -> None:
    """Two measurements of one name in a check are compared each with its own."""
    found = compared([result("passed", valued(1.0), valued(2.0))], [result("passed", valued(1.0), valued(3.0))])
    assert [(m.before.value, m.after.value) for m in found.moves if m.before and m.after] == [(2.0, 3.0)]


def test_changed_bound_is_no_regression() -> None:
    """A check that fails by a stricter bound alone is named so, and comes after what fails by its numbers."""
    strict = Bound("at_most", 0.01)
    found = compared(
        [result("passed", GOOD, name="test_a"), result("passed", GOOD, name="test_b")],
        [result("failed", valued(0.0124, strict), name="test_a"), result("failed", BAD, name="test_b")],
    )
    assert [line.split(" f-")[0] for line in said(found)["Outcomes"][1:]] == ["newly failing", "by a changed bound"]
    assert [m.result.check for m in found.moves] == ["test_b"]
    assert said(found)["Bounds that changed (the limits, not what was measured)"] == [
        "check quantity before after for",
        "tighter parity: test_a mean token KL at most 0.02 at most 0.01 1 check",
    ]
    assert "1 check newly failing, 1 check newly failing by a changed bound" in changes.headline(found)


def test_looser_bound_is_no_repair() -> None:
    """A check that passes by a looser bound alone is not called repaired."""
    found = compared([result("failed", BAD)], [result("passed", valued(0.314, Bound("at_most", 0.5)))])
    (line,) = said(found)["Outcomes"][1:]
    assert line.startswith("by a changed bound f-tiny-awq parity: test_p FAILED ok")


@pytest.mark.parametrize("value", [0.03, math.nan])
def test_changed_bound_hides_no_regression(value: float) -> None:
    """A number that the bound before would have refused as well is a regression, whatever became of the bound."""
    found = compared([result("passed", GOOD)], [result("failed", valued(value, Bound("at_most", 0.015)))])
    (line,) = said(found)["Outcomes"][1:]
    assert line.startswith("newly failing")


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        (Bound("at_most", 1), Bound("at_most", 2), "looser"),
        (Bound("at_most", 2), Bound("at_most", 1), "tighter"),
        (Bound("at_least", 1), Bound("at_least", 2), "tighter"),
        (Bound("at_least", 2), Bound("at_least", 1), "looser"),
        (Bound("equal_to", 2), Bound("equal_to", 1), "another bound"),
        (Bound("at_least", 2), Bound("at_most", 2), "another bound"),
        (None, Bound("at_most", 2), "added"),
        (Bound("at_most", 2), None, "removed"),
    ],
)
def test_bounds(old: Bound | None, new: Bound | None, way: str) -> None:
    """What became of a bound is said in a word."""
    assert Rebound("c", "q", old, new, ()).way == way
    found = compared([result("passed", valued(1.5, old))], [result("passed", valued(1.5, new))])
    assert [b.way for b in found.rebounds] == [way]
    assert found.moves == ()


def test_bounds_once_for_all_checks() -> None:
    """A limit that changed for many cases is one line."""
    new = [result("passed", valued(0.0124, Bound("at_most", 0.03)), name=f"test_p[{i}]") for i in range(5)]
    old = [replace(r, measurements=(GOOD,)) for r in new]
    found = compared(old, new)
    assert titles(found) == ["Bounds that changed"]
    assert said(found)["Bounds that changed (the limits, not what was measured)"][1].endswith("5 checks")


def test_facts() -> None:
    """What differs in machine, versions, commit, seed and subjects is named, and what agrees is not."""
    found = compared(
        [],
        [],
        machine=({"gpu": "H100", "cores": 2}, {"gpu": "H200", "cores": 2}),
        versions=({"torch": "2.11", "vllm": None}, {"torch": "2.11", "vllm": "0.25"}),
        git=({"commit": "a", "dirty": False}, {"commit": "b", "dirty": True}),
        seeds=({"held-out samples": 0}, {"held-out samples": 1}),
        subjects=({"x": {"artifact": {"sha256": "1"}}}, {"x": {"artifact": {"sha256": "2"}}}),
    )
    assert titles(found) == ["What differs in machine, versions, commit and subjects"]
    assert said(found)["What differs in machine, versions, commit and subjects"] == [
        "what before after",
        "machine: gpu H100 H200",
        "versions: vllm not said 0.25",
        "git: commit a b",
        "git: dirty no yes",
        "seeds: held-out samples 0 1",
        "subjects: x: artifact: sha256 1 2",
    ]


@pytest.mark.parametrize("about", ["git", "versions", "subjects", "machine", "deselected"])
def test_odd_facts(about: str) -> None:
    """Facts of another shape than ours are compared as they are."""
    assert len(compared([], [], **{about: ("x", {"a": [1]})}).facts) == 2


# The formats


def evil() -> Comparison:
    """Two runs that differ in everything, with markup and control characters in every string."""
    measured = Measurement(EVIL, 3.0, EVIL, Bound("at_most", 4.0), EVIL)
    more: dict[str, Any] = {"modality": EVIL, "requirement": EVIL, "quantizer": EVIL}
    moved = replace(measured, value=5.0), replace(measured, bound=Bound("at_most", 2.0))
    before = [result("passed", measured, name=f"{i}{EVIL}", message=EVIL, **more) for i in range(3)]
    after = [result("failed", m, name=f"{i}{EVIL}", message=EVIL, **more) for i, m in enumerate(moved)]
    lone = [Result(f"{EVIL}::own", "failed", EVIL, message=EVIL)]
    old, new = ({"started": EVIL, "exit_status": EVIL, "machine": {EVIL: f"{i}{EVIL}"}} for i in range(2))
    return Comparison(Run(old, before), Run(new, after + lone))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_the_same(name: str) -> None:
    """Each format has every kind of change, and lets neither control characters nor a script through."""
    found = evil()
    text = FORMATS[name](found)
    assert len(changes.sections(found)) == 7
    assert all(table.title.split(" %")[0] in text for table in changes.sections(found))
    assert not [c for c in text if c != "\n" and not c.isprintable() and c != "\u202f"]
    if name != "text":
        assert "<script" not in text


def test_markdown_is_one_of_markdown() -> None:
    """A parser of Markdown finds every cell, and no markup that is not ours."""
    parser = pytest.importorskip("markdown_it", reason="no markdown-it-py: pip install markdown-it-py")
    found = evil()
    tokens = parser.MarkdownIt("commonmark").enable("table").parse(changes.markdown(found))
    assert [t.type for t in tokens].count("td_open") == sum(
        len(t.columns) * len(t.rows) for t in changes.sections(found)
    )
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "text_special"}


def test_page() -> None:
    """The page is self-contained, has no script, and allows none."""
    html = changes.page(evil())
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert "script" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name == "src" or name.startswith("on")]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert "default-src 'none'" in html and "script-src" not in html and "url(" not in html


@pytest.mark.parametrize("name", FORMATS)
def test_thousand_results(name: str) -> None:
    """Two runs of a thousand results that differ everywhere make little text in little time."""
    before = [result("passed", GOOD, name=f"test_{i}") for i in range(1000)]
    after = [result("failed", BAD, name=f"test_{i}", message="E   assert\n" * 1000) for i in range(1000)]
    begun = time.process_time()
    text = FORMATS[name](compared(before, after))
    assert time.process_time() - begun < 5
    assert len(text) < 1_000_000
    assert "test_0" in text


@pytest.mark.parametrize("name", FORMATS)
def test_command_line(name: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """``diff`` prints, or writes where it is told; that something changed is no error."""
    a, b, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "sub" / "out"
    store.save(Run({}, [result("passed", GOOD)]), a)
    store.save(Run({}, [result("failed", BAD)]), b)
    arguments = ["diff", str(a), str(b), "--format", name]

    assert main(arguments) == 0
    printed = capsysbinary.readouterr().out.decode()
    assert main([*arguments, "-o", str(out)]) == 0

    assert printed == out.read_text(encoding="utf-8")
    assert "newly failing" in printed


def test_above(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """``--above`` is in percent."""
    for name, value in (("a", 0.0100), ("b", 0.0104)):
        store.save(Run({}, [result("passed", valued(value))]), tmp_path / name)
    for above, expected in (("3", b"1 number changed"), ("3%", b"1 number changed"), ("5", b"nothing changed")):
        assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--above", above]) == 0
        assert capsysbinary.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.json", "missing.json"], "cannot read missing.json"),
        (["bad.json", "a.json"], "bad.json is not JSON"),
        (["a.json", "a.json", "--above", "much"], "--above much is no percentage"),
        (["a.json", "a.json", "--above", "-1"], "--above -1 is no percentage"),
        (["a.json", "a.json", "--above", "nan"], "--above nan is no percentage"),
        (["a.json", "a.json", "-o", "a.json"], "is the results.json itself"),
    ],
)
def test_bad_input(arguments, reason, tmp_path, monkeypatch, capsys) -> None:
    """What cannot be compared is refused in one line, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    store.save(Run({}), Path("a.json"))
    Path("bad.json").write_text("{")
    assert main(["diff", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reports: ") and error.count("\n") == 1 and reason in error


def test_reader_has_read_enough(tmp_path: Path) -> None:
    """A reader such as ``head`` that closes the pipe early ends the printing without a traceback."""
    results = [result("failed", BAD, name=f"test_{i}", message="m" * 100) for i in range(3000)]
    store.save(Run({}, results), tmp_path / "b")
    store.save(Run({}, [replace(r, outcome="passed", measurements=(GOOD,)) for r in results]), tmp_path / "a")
    command = [sys.executable, "-m", "reports", "diff", str(tmp_path / "a"), str(tmp_path / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as printing:
        assert printing.stdout and printing.stderr
        printing.stdout.close()
        assert printing.stderr.read() == b""
    assert printing.returncode == 0
