"""The report's page: it carries what a run found, fetches nothing, and takes no string of a run for markup."""

from __future__ import annotations

import re

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run, Table
from reports.charts import PLOTLY, script
from reports.heatmap import heatmap
from reports.power import power, shade
from reports.render import LARGEST, render
from suites.meta.pages import Page
from suites.meta.parity_results import BAD, FLOOR, GOOD, result

# What it carries


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


# What it is made of


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


@pytest.mark.parametrize("tables", [1, 12])
def test_page_size(tables):
    """Twelve targets with thousand-row tables make a page of at most 6 MB that says where the rest is."""
    rows = tuple((f"model.layers.{i // 7}", f"linear_{i % 7}", i / 7e3, i, "awq_gemm") for i in range(1000))
    table = Table("Error per layer", ("layer", "linear", "error", "count", "format"), rows)
    run = Run({}, [result("passed", GOOD, quantizer=f"q{i}", tables=(table,) * tables) for i in range(12)])

    html = render(run)

    assert len(html.encode()) <= LARGEST
    assert ("more rows are in results.json" in html) == (tables == 12)


# Heat maps


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
