"""Charts: a library that is what it claims to be, figures that say their finding, strings that stay text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Medium, Outcome, Result, Run, Table
from reports.charts import PLOTLY, Chart, embedded, script
from reports.gallery import gallery
from reports.render import LARGEST, render, slug
from reports.rows import LaterRows
from reports.samples import voices, worst_tokens
from reports.sentences import called, telling, warnings
from reports.verdict import verdicts
from suites.meta.page_runs import about, illustrated, layered, tables, wav

DIGEST = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"


def test_the_library_is_the_published_one():
    """The vendored Plotly is, byte by byte, the file of the npm package that vendor/README.md names."""
    assert hashlib.sha256(PLOTLY.read_bytes()).hexdigest() == DIGEST
    assert (PLOTLY.parent / "plotly-LICENSE.txt").read_text().startswith("MIT License")


@pytest.mark.parametrize("end", ["</script>", "</SCRIPT >", "<!--"])
def test_scripts_that_would_end_early_are_refused(tmp_path, end):
    """A script that holds its own end is never inlined."""
    (tmp_path / "a.js").write_text(f"const a = '{end}';")
    with pytest.raises(ValueError, match=r"a\.js cannot be inlined"):
        script(tmp_path / "a.js")


def test_embedded_data_stay_data():
    """No text in embedded data can end the element that holds them, and every text is read back as it was."""
    data = {"</script><script>alert(1)</script>": ["<!--", "&lt;", "\u2028", 1.5, None]}
    text = str(embedded(data))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data


# Figures


def charts(*tables: Table, **more: Any) -> dict[str, Chart]:
    """The charts of results with a table each, by name."""
    return {chart.name: chart for chart in gallery([about("tiny", "awq", "test_a.py::test_a", **more, tables=tables)])}


def test_findings():
    """Every chart says in a sentence what an eye would take from it, with the numbers."""
    found = charts(*tables().values(), layered("Error per layer", 14, "half scales"), case="image")
    assert {name: chart.finding for name, chart in found.items()} == {
        "Error per layer": "The highest of 14 values is 0.9642 half scales, at language_model layer 1 mlp.down_proj; "
        "the median is 0.75.",
        "drift": "It is highest for image, after layer 2: 0.2. After the last: image 0.2.",
        "kl": "image: of 28 tokens half are below 1e-05 nats, all below 0.0001.",
        "sensitivity": "language_model 1 costs most: 0.004 nats, 80% of what all cost one by one, of 2 layers.",
        "mixed-precision": "Keeping language_model 1 in 16 bits takes 1.2 MB instead of 1 "
        "and leaves 0.001 nats of 0.005.",
        "memory-by-tower": "language_model-fp16 takes 7 GB. language_model-awq takes 2.5 GB.",
        "memory": "Handed out by the allocator: language_model-awq in transformers: 2.5 GB.",
        "throughput": "From 1.2 (marlin, batch_8) to 1.2 (marlin, batch_8) of FP16's; surely faster in 1 of 1.",
        "ttft": "Medians, the shortest first: fp16, batch_8 6 ms, marlin, batch_8 6 ms.",
        "itl": "Medians, the shortest first: fp16, batch_8 6 ms, marlin, batch_8 6 ms.",
    }


def test_no_token_is_lost():
    """Tokens beyond the last bin, and those whose KL is no number, are counted and said."""
    rows = ((0.0, 1e-9, 0), (1e-9, 1e-8, 6), (1e-8, 1e-7, 0), (10.0, None, 3), (None, None, 1))
    found = charts(Table("KL distribution", ("from nats", "to nats", "tokens"), rows), case="text")["kl"]
    assert found.traces[0]["y"] == [0.6, 0.0, 0.3]
    assert found.finding.endswith("all below 100. 1 of 10 tokens have no KL that is a number.")
    only = charts(Table("KL distribution", ("from nats", "to nats", "tokens"), ((None, None, 4),)), case="text")["kl"]
    assert only.finding == "text: 4 of 4 tokens have no KL that is a number."


def test_nothing_clipped_looks_like_nothing():
    """Zeros alone are the lightest colour of a scale from 0 on, and the finding says that they are all."""
    rows = [("language_model", at, "q", 0.0) for at in range(4)]
    title = "Clipped weights per layer"
    found = charts(Table(title, ("tower", "layer", "linear", "share"), tuple(rows)))[title]
    assert found.finding == "All 4 values are 0 share."
    assert (found.layout["coloraxis"]["cmin"], found.layout["coloraxis"]["cmax"]) == (0, 1)


def test_alike_values_look_alike():
    """Values that differ by a thousandth are not stretched over the whole scale of colours."""
    rows = [("language_model", at, "q", 0.999 + at / 1e4) for at in range(10)]
    alike = charts(Table("Error per layer", ("tower", "layer", "linear", "half scales"), tuple(rows)))[
        "Error per layer"
    ]
    apart = charts(layered("Error per layer", 14, "half scales"))["Error per layer"]
    assert alike.layout["coloraxis"]["cmin"] == 0
    assert "cmin" not in apart.layout["coloraxis"]


def test_latency_of_older_runs():
    """Runs from before latencies were recorded by quantile are drawn from the two that they have."""
    columns = ("regime", "kernel", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms")
    found = charts(Table("Latency", columns, (("batch_8", "fp16", 60.0, 90.0, 3.0, 4.0),)))
    assert (found["ttft"].traces[0]["x"], found["ttft"].traces[0]["y"]) == ([60.0, 90.0], [0.5, 0.99])
    assert found["itl"].traces[0]["x"] == [3.0, 4.0]


def test_no_data_no_chart():
    """A table without rows, with other columns or with no number in it makes no chart, and no error."""
    for table in tables().values():
        assert charts(Table(table.title, table.columns, ())) == {}
        assert charts(Table(table.title, ("a",), ((1,),))) == {}
        words = tuple(("?",) * len(table.columns) for _ in range(2))
        assert charts(Table(table.title, table.columns, words)) == {}


CELLS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_table_renders(data):
    """Whatever stands in a table that a chart is drawn from, the page is made, and its figures are strict JSON."""
    drawn = []
    for table in (*tables().values(), layered("Error per layer", 2, "half scales")):
        rows = data.draw(st.lists(st.tuples(*[CELLS] * len(table.columns)), max_size=3))
        drawn.append(Table(table.title, table.columns, tuple(rows)))
    result = about("tiny", "awq", "test_a.py::test_a", case="text", tables=tuple(drawn))
    page = render(Run({}, (result,)))
    figures = page.partition('<script type="application/json" id="figures">')[2].partition("</script>")[0]
    assert set(json.loads(figures)) == {f"chart-qwen2_5_vl-tiny-awq-{slug(c.name)}" for c in gallery([result])}


def test_numbers_at_the_end_of_their_range_render():
    """A number so large that arithmetic on it overflows is left out of a figure, and the page is made."""
    made = [Table(t.title, t.columns, tuple((1.7e308,) * len(t.columns) for _ in range(2))) for t in tables().values()]
    edges = Table("KL distribution", ("from nats", "to nats", "tokens"), ((1e308, None, 3), (1e300, 1e308, 1)))
    waits = Table("Latency", ("regime", "kernel", "TTFT p50 ms"), (("a", "b", 1.7e308),))
    page = render(Run({}, (about("tiny", "awq", "test_a.py::test_a", tables=(*made, edges, waits)),)))
    assert "Infinity" not in page.partition('id="figures">')[2].partition("</script>")[0]


# Long tables


def test_rows_beyond_the_first_are_data():
    """Every row of a long table is in the page once: the first as HTML, the others in columns, each text once."""
    rows = [("language_model", at, None if at == 40 else at / 7) for at in range(50)]
    later = LaterRows(most=45)
    key = later.add(Table("t", ("tower", "layer", "value"), tuple(rows)))
    tower, layer, value = later.data[key]
    assert tower == [[0] * 25, ["language_model"]]
    assert layer == [list(range(20, 45))]
    assert (value[0][0], value[0][20]) == (2.857, None)
    assert later.add(Table("short", ("a",), ((1,),) * 20)) == ""


# Pictures and sounds


def spoken(outcome: Outcome, name: str, size: int, kind: str = "image/png") -> Result:
    """A result with one medium of ``size`` bytes."""
    return about("tiny", "awq", f"test_a.py::test_{name}", outcome=outcome, media=(Medium(name, kind, bytes(size)),))


def test_media_of_failures_stay_longest():
    """Where not all media have room, those of checks that passed go first, whatever their order."""
    run = Run({}, [spoken("passed", f"ok{at}", 900_000) for at in range(6)] + [spoken("failed", "bad", 900_000)])
    page = render(run)
    assert len(page.encode()) <= LARGEST
    assert 'alt="bad"' in page
    assert 0 < page.count('alt="ok') < 6
    assert page.count("no room for it on this page") == 6 - page.count('alt="ok')
    assert "pictures and sounds had no room on this page" in page


def test_only_media_that_cannot_run_are_shown():
    """A medium of a type that could hold a script, or that is unknown, is named and not inlined."""
    page = render(Run({}, [spoken("failed", "a", 10, "image/svg+xml"), spoken("failed", "b", 10, "text/html")]))
    page = page.replace(script(PLOTLY).source, "")
    assert "data:image/svg" not in page
    assert "data:text" not in page
    assert page.count("of no type that it shows") == 2


def test_waveforms():
    """A WAV file of 16 bits is drawn from lowest to highest value; anything else is said not to be drawable."""
    table = Table("Waveforms", ("sample", "reference", "artifact"), (("said", "ref", "art"),))
    media = (Medium("ref", "audio/wav", wav()), Medium("art", "audio/wav", b"RIFF of nothing"))
    ((pair),) = voices(about("tiny", "awq", "test_a.py::test_a", tables=(table,), media=media), set())
    drawn, broken = pair.sounds
    assert drawn.path is not None
    assert drawn.path.count("M") == 600
    assert drawn.says == "reference: 0.1 s, loudest 49% of full scale"
    assert broken.path is None
    assert broken.says == "artifact: no waveform can be drawn of this file"


def test_worst_tokens_first():
    """Tokens stand with their prompt, the worst first, and one whose KL is no number before all others."""
    columns = ("sample", "token", "nats", "media")
    rows = (("a", 1, 0.1, "x"), ("b", 2, 0.3, ""), ("a", 3, None, "x"), ("a", 4, 0.2, "x"))
    result = about("tiny", "awq", "test_a.py::test_a", tables=(Table("Worst tokens", columns, rows),))
    assert [(s.name, [row["token"] for row in s.tokens]) for s in worst_tokens(result, set())] == [
        ("a", [3, 4, 1]),
        ("b", [2]),
    ]


# Sentences


@pytest.mark.parametrize(
    ("size", "quantizer", "scheme", "title"),
    [
        ("3b", "awq", "4-bit g128", "AWQ 4-bit g128 of Qwen2.5-VL-3B"),
        ("tiny_untied", "rtn", "", "RTN of Qwen2.5-VL (tiny, untied)"),
        ("7b", "bnb-nf4", "nf4 b64", "bitsandbytes NF4 b64 of Qwen2.5-VL-7B"),
        ("own", "someones", "8-bit", "someones 8-bit of Qwen2.5-VL (own)"),
    ],
)
def test_targets_are_called_by_names_that_people_use(size, quantizer, scheme, title):
    """A target's name on the page is quantizer, scheme and model, as people write them."""
    (found,) = verdicts(Run({}, (about(size, quantizer, "test_a.py::test_a"),)))
    subjects = {found.target: {"artifact": {"scheme": scheme}}}
    assert called(found, {"subjects": subjects}) == title
    assert called(found, {"subjects": {found.target: "?"}}).startswith(title.split()[0])


@pytest.mark.parametrize(
    ("value", "bound", "warned"),
    [
        (0.0196, Bound("at_most", 0.02), True),
        (0.0180, Bound("at_most", 0.02), False),
        (0.02, Bound("at_most", 0.02), True),
        (6.0, Bound("at_least", 6.0), False),  # a count on its bound
        (1.0, Bound("at_most", 1.00002), False),  # theory's own limit
        (0.99, Bound("at_most", 1.004), False),  # a ratio about one
        (1.0189, Bound("at_most", 1.02), False),  # 0.1 % away, yet with a twentieth of its room left
        (1.0191, Bound("at_most", 1.02), True),
        (1.1523, Bound("at_least", 1.15), True),  # a gain that is wanted, and hardly there
        (1.16, Bound("at_least", 1.15), False),
        (0.869, Bound("at_most", 0.87), True),
        (0.852, Bound("at_most", 0.87), False),
        (1.0001, Bound("at_least", 1.0), False),  # no room to take a share of
        (19.6, Bound("at_most", 20.0), True),
        (0.0, Bound("equal_to", 0.0), False),
    ],
)
def test_narrow_margins_are_warned_of(value, bound, warned):
    """A value within 5 % of its bound, of the room to one for a bound about one, is a warning; a count on it is not."""
    measured = Measurement("q", value, "", bound)
    (found,) = verdicts(Run({}, (about("tiny", "awq", "test_a.py::test_a", measurements=(measured,)),)))
    assert bool(warnings(found)) == warned
    assert found.word == "proved"


@pytest.mark.parametrize("outcome", ["xfailed", "skipped", "xpassed"])
def test_known_failures_and_gaps_are_warned_of(outcome):
    """A check that is known to fail, was skipped or fails no longer is a warning with its reason."""
    (found,) = verdicts(Run({}, (about("tiny", "awq", "test_a.py::test_a", outcome=outcome, message="because"),)))
    ((warning),) = warnings(found)
    assert "because" in warning.says
    assert "1 warning." in render(Run({}, found.results))


def test_a_cell_names_what_says_most():
    """A cell of the matrix names a value beyond its bound, else the suite's own quantity, else the nearest one."""
    kl, near = (
        Measurement("mean token KL", 0.001, "nats", Bound("at_most", 0.02)),
        Measurement("x", 9, "", Bound("at_most", 9)),
    )
    beyond = Measurement("y", 2.0, "", Bound("at_most", 1.0))

    def named(*measured: Measurement) -> str:
        found = telling([about("tiny", "awq", "test_a.py::test_a", measurements=(m,)) for m in measured])
        return "" if found is None else found.quantity

    assert named(near, kl, beyond) == "y"
    assert named(near, kl) == "mean token KL"
    assert named(near) == "x"
    assert named(near, Measurement("z", 0.4, "", Bound("at_most", 0.9))) == "z"  # a count just on its bound says least
    assert named(Measurement("free", 1.0)) == ""


def test_charts_outlast_pictures(monkeypatch):
    """Where a page has no room for both, its pictures and sounds go, not its charts."""
    few = illustrated()
    bare = replace(few, results=tuple(replace(result, media=()) for result in few.results))
    large = [[replace(medium, data=medium.data + bytes(100_000)) for medium in result.media] for result in few.results]
    run = replace(few, results=tuple(replace(r, media=tuple(m)) for r, m in zip(few.results, large, strict=True)))
    monkeypatch.setattr("reports.render.LARGEST", len(render(bare).encode()) + 20_000)
    page = render(run)
    assert page.count('class="plot"') == render(bare).count('class="plot"') > 0
    assert "data:image/png" not in page


def test_memory_by_tower_adds_up():
    """A bar per tower and checkpoint, the largest tower first, of one colour per kind of bytes; all is there."""
    found = charts(tables()["Memory by tower"])["memory-by-tower"]
    rows = list(zip(*found.traces[0]["y"], strict=True))
    assert rows == [
        ("language_model", "language_model-fp16"),
        ("language_model", "language_model-awq"),
        ("visual", "language_model-fp16"),
        ("visual", "language_model-awq"),
    ]
    assert {trace["name"]: trace["x"] for trace in found.traces} == {"16 bits": [6, 0, 1, 1], "codes": [0, 1.5, 0, 0]}
