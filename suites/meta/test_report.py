"""The report: what the suites found reaches disk, page and terminal whole; silence proves nothing."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fixtures.core.errors import UserError
from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Outcome, Result, Run, Table
from reports import store, terminal
from reports.__main__ import main
from reports.charts import PLOTLY, script
from reports.heatmap import heatmap
from reports.power import power, shade
from reports.render import LARGEST, margin_text, render
from reports.verdict import margin, verdicts
from suites.meta.pages import Page

ROOT = Path(__file__).parents[2]
GOOD = Measurement("mean token KL", 0.0124, "nats", Bound("at_most", 0.02))
BAD = Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.02), "rain.wav, token 17")
NOTHING = Measurement("mean token KL", math.nan, "nats", Bound("at_most", 0.02))
FLOOR = Measurement("noise floor", 1.5e-6, "nats")


def result(outcome: Outcome = "passed", *measurements: Measurement, **more: Any) -> Result:
    """A result about the target ``qwen2_5_vl-tiny-awq``, or as ``more`` says."""
    target = {"family": "qwen2_5_vl", "size": "tiny", "quantizer": more.pop("quantizer", "awq")}
    given: dict[str, Any] = {
        "id": "suites/test_parity.py::test_parity[qwen2_5_vl-tiny-awq]",
        "target": target,
    }
    return Result(**{"outcome": outcome, "requirement": "", "measurements": measurements, **given, **more})


def verdict(*results: Result) -> str:
    """The verdict on the one target of ``results``."""
    (found,) = verdicts(Run({}, results))
    return str(found)


@pytest.mark.parametrize(
    ("test_id", "case"),
    [
        ("suites/test_a.py::test_b[qwen2_5_vl-tiny-awq-batch_8]", "batch_8"),
        ("suites/test_a.py::test_b[qwen2_5_vl-tiny-awq-text-marlin]", "text-marlin"),
        ("suites/test_a.py::test_b[cuda-qwen2_5_vl-tiny-awq]", "cuda"),
        ("suites/test_a.py::test_b[qwen2_5_vl-tiny-awq]", ""),
        ("suites/test_a.py::test_b", ""),
    ],
)
def test_case_tells_tests_of_one_check_apart(test_id, case):
    """What a check was parametrized with beside its target tells its rows on the page apart."""
    assert result(id=test_id).case == case
    page = render(Run({}, (result(id=test_id, requirement="It is fast."),)))
    assert (f'<span class="modality">{case}</span>' in page) == bool(case)


# On disk


def test_round_trip(tmp_path):
    """A run read back is the run that was written."""
    table = Table("Error per layer", ("layer", "linear", "error"), ((0, "q_proj", 0.5), (1, "q_proj", None)))
    run = Run(
        {"seed": 1, "versions": {"vllm": None}},
        (
            result("passed", GOOD, FLOOR, modality="image", tables=(table,), seconds=1.5),
            result("failed", BAD, message="mean token KL: ...", id="suites/test_parity.py::test_b"),
            Result("suites/meta/test_metrics.py::test_c", "skipped", "It is right.", message="why"),
        ),
    )

    store.save(run, tmp_path / "results.json")

    assert store.load(tmp_path / "results.json") == run


def test_shape_on_disk(tmp_path):
    """results.json has the keys that readers elsewhere rely on."""
    store.save(Run({"seed": 1}, (result("passed", GOOD),)), tmp_path / "results.json")

    data = json.loads((tmp_path / "results.json").read_text())

    assert set(data) == {"schema", "run", "results"}
    assert (data["schema"], data["run"]) == (2, {"seed": 1})
    assert data["results"][0]["target"] == {"family": "qwen2_5_vl", "size": "tiny", "quantizer": "awq"}
    assert data["results"][0]["measurements"] == [
        {
            "quantity": "mean token KL",
            "value": 0.0124,
            "unit": "nats",
            "bound": {"at_most": 0.02},
            "holds": True,
            "detail": "",
        }
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_value(tmp_path, value):
    """A value that is no finite number is written as null, strictly JSON, and never holds when read back."""
    measured = Measurement("ratio", value, "", Bound("at_least", 1.0))
    table = Table("t", ("x",), ((value,),))
    store.save(Run({"x": value}, (result("passed", measured, tables=(table,)),)), tmp_path / "results.json")

    text = (tmp_path / "results.json").read_text()
    read = store.load(tmp_path / "results.json").results[0]

    assert "NaN" not in text and "Infinity" not in text
    assert read.measurements[0].holds is False
    assert read.tables[0].rows == ((None,),)


def test_scalars_become_plain():
    """NumPy's scalars become JSON's, so that a fixture need not convert what it measured."""
    np = pytest.importorskip("numpy", reason="no NumPy: pip install numpy")
    given = {1: (np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan")), "path": Path("a")}

    assert json.dumps(store.plain(given)) == '{"1": [0.5, 3, true, null], "path": "a"}'


def test_failing_write_spares_the_old_file(tmp_path, monkeypatch):
    """A write that fails leaves the earlier report whole, and no draft beside it."""
    path = tmp_path / "results.json"
    store.save(Run({"seed": 1}), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*results\.json: No space left"):
        store.save(Run({"seed": 2}), path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


ENTRY = {"id": "a.py::t", "outcome": "passed", "measurements": []}
MEASURED = {"quantity": "q", "value": 1, "unit": "", "bound": {"at_mots": 1}, "holds": True, "detail": ""}


@pytest.mark.parametrize("command", ["show", "render"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param("", "not JSON", id="empty"),
        pytest.param("\ud800", "not JSON", id="not UTF-8"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param("[]", "not a results.json", id="list"),
        pytest.param('{"schema": 3}', "schema 3", id="newer schema"),
        pytest.param('{"schema": true}', "schema True", id="no schema"),
        pytest.param('{"schema": 1}', "no 'run'", id="no run"),
        pytest.param('{"schema": 1, "run": 3, "results": []}', "'run' is not an object", id="run is a number"),
        pytest.param('{"schema": 1, "run": {}, "results": [{}]}', "no 'id'", id="no id"),
        pytest.param('{"schema": 1, "run": {}, "results": ["x"]}', "not a results.json", id="result is text"),
        pytest.param([ENTRY | {"outcome": "fine"}], "unknown outcome 'fine'", id="unknown outcome"),
        pytest.param([ENTRY | {"target": {"family": "x"}}], "no 'size'", id="no size"),
        pytest.param([ENTRY | {"seconds": "long"}], "'a.py::t' took no number of seconds", id="seconds are text"),
        pytest.param([ENTRY | {"seconds": math.inf}], "'a.py::t' took no number of seconds", id="endless"),
        pytest.param([ENTRY | {"message": 3}], "wrong type in 'a.py::t'", id="message is a number"),
        pytest.param([ENTRY | {"seconds": 10**400}], "a number of 401 digits", id="a number beyond all floats"),
        pytest.param([ENTRY | {"id": 3}], "not a results.json", id="id is a number"),
        pytest.param([ENTRY | {"measurements": [MEASURED]}], "unknown bound 'at_mots'", id="unknown bound"),
    ],
)
def test_bad_input(tmp_path, capsys, command, text, reason):
    """A file that is no results.json is refused in one line that names it, with exit code 2."""
    path = tmp_path / "results.json"
    if isinstance(text, list):
        text = json.dumps({"schema": 1, "run": {}, "results": text})
    if text is not None:
        path.write_bytes(text.encode(errors="surrogatepass"))

    code = main([command, str(path)])

    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1 and said.startswith("reports: ")
    assert str(path) in said and reason in said
    assert not (tmp_path / "index.html").exists()


def test_command_line(tmp_path, capsys):
    """``python -m reports`` prints the verdicts of a results.json and renders its page where it is told."""
    store.save(Run({}, (result("passed", GOOD),)), tmp_path / "results.json")

    assert main(["show", str(tmp_path / "results.json")]) == 0
    assert "proved" in capsys.readouterr().out
    assert main(["render", str(tmp_path / "results.json"), "-o", str(tmp_path / "sub" / "page.html")]) == 0
    assert (tmp_path / "sub" / "page.html").read_text().startswith("<!DOCTYPE html>")


# The verdict


def test_proved():
    """A target is proved when bounds hold and nothing is left out."""
    assert verdict(result("passed", GOOD, FLOOR), result("passed")) == "proved"


def test_known_bad():
    """A target whose only failures are known is no news, and is not called proved."""
    assert verdict(result("passed", GOOD), result("xfailed", BAD)) == "known bad (1 check)"


def test_disproved():
    """One failure disproves a target, whatever else holds, is skipped or erred."""
    others = (result("passed", GOOD), result("skipped"), result("error"), result("xfailed", BAD))
    assert verdict(*others, result("failed", BAD)) == "DISPROVED"


@pytest.mark.parametrize("measured", [BAD, NOTHING], ids=["beyond", "nan"])
def test_numbers_outrank_the_outcome(measured):
    """A check that passed although its own bound does not hold disproves its target."""
    assert verdict(result("passed", GOOD, measured)) == "DISPROVED"


@pytest.mark.parametrize(
    ("results", "gaps"),
    [
        ([result("skipped")], "1 skipped, nothing was compared"),
        ([result("passed")], "nothing was compared"),
        ([result("passed", FLOOR)], "nothing was compared"),
        ([result("xfailed", BAD)], "no bound was held, 1 known bad"),
        ([result("xfailed", GOOD)], "no bound was held, 1 known bad"),
        ([result("passed", GOOD), result("skipped")], "1 skipped"),
        ([result("passed", GOOD), result("error"), result("error")], "2 errors"),
        ([result("passed", GOOD), result("xpassed", GOOD)], "1 no longer bad"),
    ],
)
def test_incomplete(results, gaps):
    """A target that nothing disproves is not proved either while checks lack or nothing was compared."""
    assert verdict(*results) == f"incomplete ({gaps})"


def test_uncollected_module():
    """While a test module cannot be collected, no target is proved: nobody knows what it would have said."""
    lost = Result("suites/test_roundtrip.py", "error", "It can be collected.")
    assert verdict(result("passed", GOOD), lost) == "incomplete (suites/test_roundtrip.py was not collected)"


def test_verdicts_keep_targets_apart():
    """A failure of one target says nothing of another."""
    run = Run({}, (result("passed", GOOD), result("failed", BAD, quantizer="rtn")))
    assert [(v.target, str(v)) for v in verdicts(run)] == [
        ("qwen2_5_vl-tiny-awq", "proved"),
        ("qwen2_5_vl-tiny-rtn", "DISPROVED"),
    ]


@pytest.mark.parametrize(
    ("kind", "limit", "value", "share", "text"),
    [
        ("at_most", 0.02, 0.005, 0.75, "75 % inside"),
        ("at_most", 0.02, 0.03, -0.5, "50 % beyond"),
        ("at_least", 2.0, 128.0, 63.0, "64 x the bound"),
        ("at_least", 3.0, 3.3, 0.1, "10 % inside"),
        ("at_least", -2.0, -3.0, -0.5, "50 % beyond"),
        ("at_most", 2.0, 2.0, 0.0, "at the bound"),
        ("equal_to", 7.0, 7.0, 0.0, "exact"),
        ("equal_to", 8.0, 7.0, -0.125, "12 % beyond"),
        ("equal_to", 0.0, 0.0, None, "exact"),
        ("at_most", 0.0, 1.0, None, "beyond"),
        ("at_most", 1.0, math.nan, None, "not a number"),
    ],
)
def test_margin(kind, limit, value, share, text):
    """A margin is the share of the bound between it and the value, negative beyond the bound."""
    measured = Measurement("q", value, "", Bound(kind, limit))
    assert margin(measured) == (None if share is None else pytest.approx(share))
    assert margin_text(measured) == text


# In the terminal


def test_table():
    """The terminal shows a row per target and a column per suite, and what is about no target apart."""
    own = Result("suites/meta/test_metrics.py::test_kl", "passed", "")
    coverage = "suites/test_coverage.py::test_linears[qwen2_5_vl-tiny-awq]"
    run = Run(
        {},
        (
            result("passed", GOOD),
            result("failed", BAD),
            result("passed", GOOD, id=coverage),
            result("xfailed", BAD, quantizer="rtn"),
            result("passed", GOOD, quantizer="rtn"),
            own,
        ),
    )

    assert terminal.text(run).splitlines() == [
        "target               coverage  parity             verdict",
        "qwen2_5_vl-tiny-awq  1 ok      1 FAILED, 1 ok     DISPROVED",
        "qwen2_5_vl-tiny-rtn  -         1 known bad, 1 ok  known bad (1 check)",
        "about no target: 1 ok",
    ]
    assert max(map(len, terminal.text(run, width=50).splitlines())) <= 50


def test_no_target():
    """A run about no target says so."""
    assert terminal.text(Run({})) == "No target was checked."


# The page


def test_page_escapes():
    """Nothing that a run says can put markup or a script into its page."""
    evil = "<script>alert(1)</script>\"' onmouseover=alert(1) <img src=x> javascript:alert(1)"
    measured = Measurement(evil, 1.0, evil, Bound("at_most", 2.0), evil)
    tables = (
        Table(evil, (evil, "b"), ((evil, 1.0),)),
        Table("Error per layer", ("layer", "linear", evil), ((evil, evil, 0.5), (f"{evil}.1", evil, 0.7))),
    )
    more = {"requirement": evil, "modality": evil, "message": evil, "tables": tables}
    results = [
        result(outcome, measured, id=f"{evil}.py::test[{evil}]{outcome}", quantizer=evil, **more)
        for outcome in ("passed", "failed", "skipped", "xfailed", "error")
    ]
    results.append(Result(f"{evil}::own", "failed", evil, measurements=(measured,)))
    facts = {evil: evil}
    about = dict.fromkeys(("started", "seconds", "command", "seeds", "exit_status"), evil)
    about |= dict.fromkeys(("machine", "versions", "deselected"), facts)
    about |= {"subjects": {evil: facts}, "git": {"commit": evil, "dirty": True}}

    page = Page(render(Run(about, results)))

    assert page.tags.count("script") == 6  # figures, rows, the library, and three of ours
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(href is not None and href.startswith(("#", "data:,")) for href in page.all("href"))


def test_page_is_self_contained():
    """The page fetches nothing: no outside script, style, font or image."""
    html = render(Run({}, (result("passed", GOOD),)))
    page = Page(html)

    own = html.replace(script(PLOTLY).source, "")  # what the library could fetch, the page's policy forbids
    assert not page.all("src") and "@import" not in own and "url(" not in own
    assert "default-src 'none'" in html


def test_page_anchors():
    """Every check has an anchor of its own, and every link in the page leads somewhere."""
    alike = ("test_a[x y]", "test_a[x-y]", "test_a[x/y]")
    run = Run({}, [result("skipped", id=f"suites/test_parity.py::{name}", message="why") for name in alike])
    page = Page(render(run))
    ids = page.all("id")

    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.all("href") if href and href.startswith("#")} <= set(ids)


def test_page_tells():
    """The page carries verdicts, numbers with bound and margin, messages, versions and what was not run."""
    run = Run(
        {"versions": {"torch": "2.9.1", "vllm": None}, "deselected": {"suites/test_memory.py": 4}},
        (
            result("failed", BAD, requirement="Answers stay close.", message="worst: rain.wav"),
            result(
                "skipped",
                id="suites/test_serving.py::test_s",
                message="vLLM is not installed: pip install vllm",
            ),
        ),
    )
    html = render(run)

    for said in (
        "is disproved: 1 of 2 checks failed (mean token KL: 0.314 nats, must be at most 0.02 nats).",
        "16 x the bound",
        "rain.wav, token 17",
        "Answers stay close.",
        "worst: rain.wav",
        "2.9.1",
        "not installed",
        "vLLM is not installed: pip install vllm",
        "4 in <code>suites/test_memory.py</code>",
    ):
        assert said in html


@pytest.mark.parametrize("tables", [1, 12])
def test_page_size(tables):
    """Twelve targets with thousand-row tables make a page of at most 6 MB that says where the rest is."""
    rows = tuple((f"model.layers.{i // 7}", f"linear_{i % 7}", i / 7e3, i, "awq_gemm") for i in range(1000))
    table = Table("Error per layer", ("layer", "linear", "error", "count", "format"), rows)
    run = Run({}, [result("passed", GOOD, quantizer=f"q{i}", tables=(table,) * tables) for i in range(12)])

    html = render(run)

    assert len(html.encode()) <= LARGEST
    assert ("more rows are in results.json" in html) == (tables == 12)


def test_heatmap():
    """A heat map has a row per linear and a column per layer, in numeric order, and its sentence names the worst."""
    rows = [(f"model.layers.{i}", name, float(i)) for i in (10, 9, 0) for name in ("q_proj", "k_proj")]
    table = Table("Error per layer", ("layer", "linear", "error"), (*rows, ("visual.blocks.0", "qkv", 4.0)))

    found = heatmap(table, result())

    assert found is not None
    text, visual = found.traces
    assert (text["name"], text["x"], text["y"]) == ("model.layers", ["0", "9", "10"], ["q_proj", "k_proj"])
    assert text["z"] == [[0.0, 9.0, 10.0]] * 2
    assert (visual["name"], visual["y"], visual["z"]) == ("visual.blocks", ["qkv"], [[4.0]])
    assert found.finding == "The highest of 7 values is 10 error, at model.layers layer 10 q_proj; the median is 9."


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("layer", "error"), (0, 1.0)),
        (("layer", "linear"), (0, "q")),
        (("layer", "linear", "error"), (0, "q", None)),
        (("layer", "linear", "format"), (0, "q", "awq")),
        (("layer", "linear", "error"), (0, "q")),
    ],
)
def test_no_heatmap(columns, row):
    """A table without a number per layer and linear is only a table."""
    assert heatmap(Table("Error per layer", columns, (row,)), result()) is None


def test_power_of_the_checks_is_shown() -> None:
    """What a run says of the checks' power is one section: tables of a title in one, cells that caught all or some."""
    columns = ("fault", "test_a", "test_b")
    rows = [("F01 a", "3/3", ""), ("F02 b", "1/3", "2/2")]
    tables = [Table("Kill matrix over all artifacts", columns, (row,)) for row in rows]
    found = [result(id=f"suites/meta/test_faults.py::test_{n}", target=None, tables=(t,)) for n, t in enumerate(tables)]
    ((table, _),) = power(found)
    assert table.rows == tuple(rows)
    assert [shade(cell) for cell in ("3/3", "1/3", "0/3")] == ["passed", "xfailed", "none"]
    assert [shade(cell) for cell in ("", 3, "a/b", None)] == [""] * 4
    page = render(Run({}, tuple(found)))
    assert "What the checks catch" in page
    assert "<td class=passed>3/3" in page
    assert "<td class=xfailed>1/3" in page
    assert "The suite&#39;s own tests: 2 ok" in page
    assert "What the checks catch" not in render(Run({}, (result(),)))


def test_a_run_of_one_check_is_open():
    """What a run of one check found is there to be read; of several, only what failed is open."""
    table = Table("Side by side", ("quantizer", "seconds"), (("awq", 4.7), ("autoawq", 29.3)))
    one = result("passed", FLOOR, tables=(table,))
    assert len(re.findall(r"<details class=.?(?:check|data)[^>]* open", render(Run({}, (one,))))) == 2
    other = result("passed", GOOD, id="suites/test_parity.py::test_other[qwen2_5_vl-tiny-awq]")
    assert not re.findall(r"<details class=.?(?:check|data)[^>]* open", render(Run({}, (one, other))))
