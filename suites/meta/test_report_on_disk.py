"""results.json: what the suites found is read back as it was, shown and rendered; what is none is refused in a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from fixtures.core.errors import UserError
from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run, Table
from reports import store
from reports.__main__ import main
from suites.meta.parity_results import BAD, FLOOR, GOOD, result


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


# From the command line


def test_command_line(tmp_path, capsys):
    """``python -m reports`` prints the verdicts of a results.json and renders its page where it is told."""
    store.save(Run({}, (result("passed", GOOD),)), tmp_path / "results.json")

    assert main(["show", str(tmp_path / "results.json")]) == 0
    assert "proved" in capsys.readouterr().out
    assert main(["render", str(tmp_path / "results.json"), "-o", str(tmp_path / "sub" / "page.html")]) == 0
    assert (tmp_path / "sub" / "page.html").read_text().startswith("<!DOCTYPE html>")


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
