"""The report in other formats: Markdown, JUnit XML and JSON say what the page says, and no run breaks them."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Outcome, Result, Run, Table
from reports import escape, store
from reports.__main__ import main
from reports.brief import brief
from reports.junit import exact, junit
from reports.step_summary import LARGEST, step_summary
from suites.meta.parity_results import BAD, FLOOR, GOOD, result

NOTHING = Measurement("mean token KL", math.nan, "nats", Bound("at_most", 0.02))
EVIL = (
    "<script>alert(1)</script> | `tick` ``` ]]> <!-- --> \x00\x1b[31m\x85\ud800\uffff \u202e **b** [a](b) &amp; "
    "</pre></details>\n\n# x\n|a|\r\n"
)
FORMATS = {"markdown": step_summary, "junit": junit, "json": brief}


def evil_run() -> Run:
    """A run with markup, control characters and half a character in every string that a run has."""
    measured = Measurement(EVIL, 3.0, EVIL, Bound("at_most", 2.0), EVIL)
    more = {"requirement": EVIL, "modality": EVIL, "message": EVIL, "tables": (Table(EVIL, (EVIL,), ((EVIL,),)),)}
    outcomes: tuple[Outcome, ...] = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    results = [result(o, measured, id=f"{EVIL}.py::test[{EVIL}]{o}", quantizer=EVIL, **more) for o in outcomes]
    results.append(Result(f"{EVIL}::own", "failed", EVIL, message=EVIL))
    about = dict.fromkeys(("started", "seconds", "command", "seeds", "exit_status"), EVIL)
    return Run({**about, "deselected": {EVIL: EVIL}, "git": {"commit": EVIL, "dirty": True}}, results)


class Tags(HTMLParser):
    """The tags of a page in which every tag is closed by its own end tag, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def many() -> Run:
    """A thousand results over ten targets, a tenth of them failed, with long messages."""
    results = [
        result(
            "failed" if i % 10 == 0 else "passed",
            BAD if i % 10 == 0 else GOOD,
            id=f"suites/test_parity.py::test_{i}",
            quantizer=f"q{i % 10}",
            message="E   assert\n" * 500 if i % 10 == 0 else "",
        )
        for i in range(1000)
    ]
    return Run({}, results)


# Markdown


def test_markdown_tells() -> None:
    """The summary has headline, verdicts, what failed with value, bound, margin and message, and what was not run."""
    coverage = "suites/test_coverage.py::test_c[qwen2_5_vl-tiny-awq]"
    run = Run(
        {"deselected": {"suites/test_memory.py": 4}, "exit_status": 2},
        (
            result("failed", GOOD, BAD, requirement="Answers stay close.", message="worst: rain.wav\n  by far"),
            result("passed", GOOD, id=coverage),
            result("skipped", id=f"{coverage}b", message="vLLM is not installed"),
            Result("suites/meta/test_x.py::test_y", "passed", ""),
        ),
    )

    said = step_summary(run)

    for expected in (
        "# quantproof: 1 target: 1 disproved\n",
        "pytest's exit status 2",
        "| target | coverage | parity | verdict |\n| --- | --- | --- | --- |\n",
        "| qwen2_5_vl-tiny-awq | 1 skipped, 1 ok | 1 FAILED | DISPROVED |\n",
        "About no target: 1 ok",
        "## 1 check failed\n",
        "<summary>FAILED <b>test_parity</b> (qwen2_5_vl-tiny-awq: parity): mean token KL: 0.314 nats, must be at most",
        "<p>Answers stay close.</p>",
        "| mean token KL | 0.314 nats | at most 0.02 | 16 x the bound | rain.wav, token 17 |\n| mean token KL | 0.0124",
        "<pre>worst: rain.wav\n  by far</pre>",
        "- 1: vLLM is not installed\n",
        "4 in suites/test_memory.py\n",
    ):
        assert expected in said


def test_markdown_is_one_of_markdown() -> None:
    """A parser of Markdown finds the table with all its cells, and in an evil run no markup that is not ours."""
    parser = pytest.importorskip("markdown_it", reason="no markdown-it-py: pip install markdown-it-py")
    read = parser.MarkdownIt("commonmark").enable("table").parse
    run = evil_run()
    cells = [token.type for token in read(step_summary(run))].count("td_open")
    assert cells == 3 + 4 * 5  # the one target's row, and a measurement of each of its alarming checks
    html = parser.MarkdownIt("commonmark").enable("table").render(step_summary(run))
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(Tags(html).tags) == {"h1", "h2", "p", "strong", "details", "summary", "b", "pre", "ul", "li"} | table
    assert Tags(html).open == []
    assert Tags(html).text.count("<script>alert(1)</script> | `tick` ``` ]]> <!-- -->") > 20


def test_markdown_of_names() -> None:
    """Names with underscores stay legible, and whatever Markdown would read is a reference."""
    assert escape.markdown("qwen2_5_vl-tiny_a") == "qwen2_5_vl-tiny_a"
    assert escape.markdown("a|b") == "a&#124;b"
    assert escape.markdown("_x_ `y`") == "&#95;x&#95; &#96;y&#96;"
    assert escape.markdown("https://www.x") == "https&#58;//www&#46;x"
    assert escape.markdown("a\nb\t c\x1b") == "a b c&#92;x1b"
    assert escape.markdown("x" * 500, 10) == "xxxxxxx..."


@pytest.mark.parametrize("length", [20_000, 2_000_000])
def test_markdown_has_room(length: int) -> None:
    """A summary stays under GitHub's limit, keeps the first failures whole, and says that the rest is elsewhere."""
    failed = [result("failed", BAD, id=f"suites/test_p.py::t{i}", message="&" * length) for i in range(300)]
    said = step_summary(Run({"deselected": {"x" * length: 1}}, [*failed, result("skipped", message="y" * length)]))

    assert len(said.encode()) <= LARGEST < 1 << 20
    assert "<b>t0</b>" in said and "<b>t299</b>" not in said
    assert said.count("<details>") == said.count("</details>") > 10
    assert "has no room here" in said and "What was not run" in said


# JUnit


def parsed(run: Run) -> ET.Element:
    """The run's XML, read by the standard library from its bytes."""
    return ET.fromstring(junit(run).encode())


def test_junit_tells() -> None:
    """A suite per target and module counts its cases; outcomes are elements, measurements properties."""
    run = Run(
        {"started": "2026-11-22T21:53:35+00:00"},
        (
            result("passed", GOOD, FLOOR, seconds=1.25),
            result("failed", BAD, message="E   worst"),
            result("xfailed", BAD, message="issue 7"),
            result("xpassed", GOOD),
            result("skipped", message="no vLLM"),
            result("error", message="boom", id="suites/test_coverage.py::TestA::test_x[a::b]"),
            Result("suites/test_roundtrip.py", "error", "It can be collected."),
        ),
    )

    root = parsed(run)

    suites = {s.get("name"): s for s in root}
    assert list(suites) == ["qwen2_5_vl-tiny-awq: coverage", "qwen2_5_vl-tiny-awq: parity", "roundtrip"]
    parity = suites["qwen2_5_vl-tiny-awq: parity"]
    assert [parity.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["5", "2", "0", "2"]
    assert parity.get("timestamp") == "2026-11-22T21:53:35+00:00"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("7", "2", "2")
    passed, failed, known, better, skipped = parity
    assert (passed.get("classname"), passed.get("time")) == ("suites.test_parity", "1.250")
    assert passed.get("name") == "test_parity[qwen2_5_vl-tiny-awq]"
    assert [(p.get("name"), p.get("value")) for p in passed.iter("property")] == [
        ("mean token KL", "0.0124 nats"),
        ("mean token KL: bound", "at most 0.02"),
        ("mean token KL: margin", "38 % inside"),
        ("noise floor", "1.5e-06 nats"),
    ]
    assert [e.tag for e in passed] == ["properties"]
    assert failed[-1].tag == "failure"
    assert failed[-1].get("message") == "mean token KL: 0.314 nats, must be at most 0.02 nats"
    assert (failed[-1].text or "").splitlines()[1:] == ["rain.wav, token 17", "E   worst"]
    assert (known[-1].tag, known[-1].get("message")) == ("skipped", "known bad: issue 7")
    assert (better[-1].tag, better[-1].get("message")) == ("failure", "no longer bad")
    assert (skipped[-1].tag, skipped[-1].get("message")) == ("skipped", "no vLLM")
    (erred,) = suites["qwen2_5_vl-tiny-awq: coverage"]
    assert (erred.get("name"), erred[-1].tag) == ("TestA::test_x[a::b]", "error")
    (lost,) = suites["roundtrip"]
    assert (lost.get("classname"), lost.get("name")) == ("suites.test_roundtrip", "suites/test_roundtrip.py")


def test_junit_keeps_to_the_schema() -> None:
    """Elements have only attributes that readers of JUnit's schema know."""
    known = {
        "testsuites": {"name", "time", "tests", "failures", "errors"},
        "testsuite": {"name", "time", "tests", "failures", "errors", "skipped", "timestamp"},
        "testcase": {"name", "classname", "time"},
        "properties": set(),
        "property": {"name", "value"},
        **{tag: {"type", "message"} for tag in ("failure", "error", "skipped")},
    }
    for element in parsed(evil_run()).iter():
        assert set(element.keys()) <= known[element.tag]


def test_junit_escapes() -> None:
    """A run full of markup and control characters is XML all the same, with all that can be read in it."""
    run = evil_run()
    cases = list(parsed(run).iter("testcase"))

    assert len(cases) == len(run.results)
    (failure,) = cases[1].findall("failure")
    assert "<script>alert(1)</script> | `tick` ``` ]]> <!-- -->" in (failure.text or "")
    assert r"\x00\x1b[31m\x85\ud800\uffff \u202e" in (failure.text or "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2"), (0.1, "0.1"), (1e300, "1e+300"), (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")],
)
def test_exact(value: float, text: str) -> None:
    """Properties have numbers in full."""
    assert exact(value) == text


# JSON


def test_json_tells() -> None:
    """The summary's shape is what programs rely on: a verdict per target, counts, and what is beyond its bound."""
    run = Run(
        {"started": "2026", "exit_status": 1, "git": {"commit": "abc"}},
        (
            result("failed", BAD, GOOD, message="worst", id="suites/test_parity.py::test_p[qwen2_5_vl-tiny-awq-text]"),
            result("passed", GOOD, quantizer="rtn"),
            result("skipped", quantizer="rtn", message="no vLLM"),
            Result("suites/meta/test_x.py::test_y", "passed", ""),
        ),
    )

    data = json.loads(brief(run))

    awq, rtn = data.pop("targets")
    assert data == {
        "schema": 1,
        "headline": "2 targets: 1 disproved, 1 incomplete",
        "started": "2026",
        "exit_status": 1,
        "commit": "abc",
        "verdicts": {"disproved": 1, "incomplete": 1},
        "counts": {"failed": 1, "passed": 2, "skipped": 1},
        "own": {"counts": {"passed": 1}, "failures": []},
        "not_run": [{"reason": "no vLLM", "count": 1}],
    }
    assert awq["failures"] == [
        {
            "id": "suites/test_parity.py::test_p[qwen2_5_vl-tiny-awq-text]",
            "outcome": "failed",
            "suite": "parity",
            "check": "test_p",
            "case": "text",
            "message": "worst",
            "beyond": [
                {
                    "quantity": "mean token KL",
                    "value": 0.314,
                    "unit": "nats",
                    "bound": {"at_most": 0.02},
                    "margin": pytest.approx(-14.7),
                    "detail": "rain.wav, token 17",
                }
            ],
        }
    ]
    assert (rtn["verdict"], rtn["bounds_held"], rtn["gaps"]) == ("incomplete", 1, ["1 skipped"])
    assert rtn["suites"] == {"parity": {"passed": 1, "skipped": 1}}


def test_json_of_no_number() -> None:
    """What is no number is null: strictly JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(brief(Run({"exit_status": math.nan}, (result("failed", NOTHING),))), parse_constant=refuse)
    assert data["targets"][0]["failures"][0]["beyond"][0]["value"] is None


# All of them


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_unprintable(name: str) -> None:
    """No format lets a control character, half a character or a script through."""
    said = FORMATS[name](evil_run())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\uffff\u202e]", said)
    if name != "json":  # where a quoted script is nothing but a string
        assert "<script" not in said


@pytest.mark.parametrize("name", FORMATS)
def test_empty_run(name: str) -> None:
    """A run of nothing is said to be one."""
    said = FORMATS[name](Run({}))
    assert 'tests="0"' in said if name == "junit" else "No target was checked" in said


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_outrank_the_outcome(name: str) -> None:
    """A check that passed beyond its bound, or with NaN, has failed in every format."""
    said = FORMATS[name](Run({}, (result("passed", BAD), result("passed", NOTHING))))
    assert {"markdown": "2 checks failed", "junit": 'failures="2"', "json": '"failed": 2'}[name] in said
    if name != "json":
        assert "NaN nats" in said and "not a number" in said


@pytest.mark.parametrize("name", FORMATS)
def test_thousand_results(name: str) -> None:
    """A thousand results make a small file in little time."""
    run = many()
    begun = time.process_time()
    said = FORMATS[name](run)
    assert time.process_time() - begun < 5
    assert len(said) < 1_500_000


@pytest.mark.parametrize("name", FORMATS)
def test_command_line(name: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """``render --format`` prints to standard output in UTF-8, or writes the file that -o names."""
    path = tmp_path / "results.json"
    run = Run({}, (result("failed", BAD, message="größer ≤"),))
    store.save(run, path)

    assert main(["render", str(path), "--format", name]) == 0
    printed = capsysbinary.readouterr().out.decode()
    assert main(["render", str(path), "--format", name, "-o", str(tmp_path / "sub" / "out")]) == 0

    assert printed == (tmp_path / "sub" / "out").read_text(encoding="utf-8") == FORMATS[name](run)
    assert capsysbinary.readouterr().out.decode() == f"{tmp_path / 'sub' / 'out'}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "sub"]


def test_html_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a format, ``render`` writes the page beside the results."""
    store.save(Run({}), tmp_path / "results.json")
    assert main(["render", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"


@pytest.mark.parametrize("output", ["results.json", "."])
def test_bad_output(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The results are never overwritten by what is made of them, and a folder is refused in one line."""
    monkeypatch.chdir(tmp_path)
    store.save(Run({}), Path("results.json"))
    before = Path("results.json").read_bytes()

    assert main(["render", "results.json", "--format", "json", "-o", output]) == 2

    assert capsys.readouterr().err.count("\n") == 1
    assert Path("results.json").read_bytes() == before
