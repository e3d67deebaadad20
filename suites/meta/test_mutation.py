"""Mutation testing: the runner tells tests that notice from tests that do not, and ours notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fixtures.mutation.__main__ import ENOUGH, JUSTIFIED, MODULES, ROOT
from fixtures.mutation.justified import load
from fixtures.mutation.mutants import Source
from fixtures.mutation.running import sampled

SAMPLE = 64  # mutants of the real modules: half a minute on one core
# `<=` for `<` changes nothing here; every other mutant of it is another function.
POSITIVE = '''"""A module."""

def positive(x):
    """What is above 0."""
    if x < 0:
        return 0
    return x
'''
NOTICES = """from planted import positive

def test_positive():
    assert [positive(x) for x in (-2, 0, 0.5, 3)] == [0, 0, 0.5, 3]
    assert positive(-1) is not None
"""
NOTICES_NOTHING = """from planted import positive

def test_positive():
    for x in (-2, 0, 0.5, 3):
        positive(x)
"""
COUNTDOWN = """def count(n):
    while n > 0:
        n -= 1
    return n
"""
COUNTS = """from planted import count

def test_count():
    assert count(3) == 0
"""
ENTRY = """[[equivalent]]
module = "planted.py"
function = "positive"
changes = [["{before}", "{after}"]]
reason = "0 is 0"
"""


def run(root, *arguments):
    """The runner's exit code, what it printed, and what it wrote."""
    out = root / "out.json"
    command = [sys.executable, "-m", "fixtures.mutation", "--root", root, "--out", out, *arguments]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    said = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return done.returncode, done.stdout + done.stderr, said


@pytest.fixture
def plant(tmp_path):
    """Write a module and its tests, and run the runner on them."""

    def planted(module, tests, justified=""):
        (tmp_path / "planted.py").write_text(module, encoding="utf-8")
        (tmp_path / "test_planted.py").write_text(tests, encoding="utf-8")
        (tmp_path / "justified.toml").write_text(justified, encoding="utf-8")
        return run(tmp_path, "--module=planted.py", "--test=test_planted.py", "--justified=justified.toml")

    return planted


def survivors(said):
    """What survived, as the statements that it was and became."""
    return [(mutant["before"], mutant["after"]) for mutant in said["mutants"] if mutant["status"] == "survived"]


# The runner


def test_killed_and_survived(plant, tmp_path):
    """A test that looks kills every mutant but the one that changes nothing, and no file is changed by it."""
    code, printed, said = plant(POSITIVE, NOTICES)

    assert survivors(said) == [("if x < 0:", "if x <= 0:")]
    assert Counter(mutant["status"] for mutant in said["mutants"])["killed"] == len(said["mutants"]) - 1 > 5
    assert {mutant["killed_by"] for mutant in said["mutants"]} == {"", "test_planted.py::test_positive"}
    assert code == 1
    assert "planted.py:5 positive (comparison)\n  - if x < 0:\n  + if x <= 0:" in printed
    assert (tmp_path / "planted.py").read_text(encoding="utf-8") == POSITIVE


def test_a_test_that_asserts_nothing(plant):
    """Calling code is not testing it: without an assertion nothing is killed."""
    code, _, said = plant(POSITIVE, NOTICES_NOTHING)

    assert (code, said["share"]) == (1, 0)
    assert {mutant["status"] for mutant in said["mutants"]} == {"survived"}


def test_no_test_runs_it(plant):
    """What no test runs survives."""
    code, _, said = plant(POSITIVE, "def test_nothing():\n    pass\n")

    assert (code, said["share"]) == (1, 0)


def test_a_mutant_that_never_ends(plant):
    """A mutant that loops for ever is ended, and counts as noticed."""
    code, _, said = plant(COUNTDOWN, COUNTS)

    endless = {mutant["after"] for mutant in said["mutants"] if mutant["status"] == "timeout"}
    assert endless == {"while True:", "pass", "n += 1", "n = 1"}
    assert (code, said["share"]) == (0, 1)


def test_failing_tests(plant):
    """Tests that fail without any mutant can kill none: an error, not a score."""
    code, printed, said = plant(POSITIVE, "def test_broken():\n    assert False\n")

    assert (code, said) == (2, {})
    assert "without any mutant the tests fail: ['test_planted.py::test_broken']" in printed


def test_trials_that_fail_without_a_mutant(plant):
    """Tests that pass by themselves but fail wherever a mutant is tried would kill all of them: an error, too."""
    code, printed, said = plant(POSITIVE, f"import sys\n{NOTICES}\n    assert not sys.dont_write_bytecode\n")

    assert (code, said) == (2, {})
    assert "without any mutant the trial fails: test_planted.py::test_positive" in printed


ONCE = """import sys, types

assert not hasattr(sys, "here_before"), "imported again"
sys.here_before = True
sys.modules["once.inner"] = types.ModuleType("once.inner")  # without a file, as some of torch's
"""


def test_an_environment_in_the_project(plant, tmp_path, monkeypatch):
    """What is installed in a virtual environment inside the project is imported once: torch refuses a second time."""
    packages = tmp_path / ".tox" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "once.py").write_text(ONCE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    _, printed, said = plant(POSITIVE, f"import once\n{NOTICES}")

    assert said, printed
    assert survivors(said) == [("if x < 0:", "if x <= 0:")]


def test_justified(plant):
    """A mutant that survives with a reason is counted apart."""
    code, printed, said = plant(POSITIVE, NOTICES, ENTRY.format(before="if x < 0:", after="if x <= 0:"))

    assert (code, said["share"], said["stale"], survivors(said)) == (0, 1, [], [])
    assert [mutant["reason"] for mutant in said["mutants"] if mutant["status"] == "justified"] == ["0 is 0"]
    assert "1 justified, 0 survived" in printed


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [("if x < 7:", "if x <= 7:", "no such mutant"), ("if x < 0:", "if x >= 0:", "killed after all")],
    ids=["gone", "killed"],
)
def test_stale_justification(plant, before, after, complaint):
    """A reason for a mutant that there is not, or that a test kills, is complained of."""
    code, printed, said = plant(POSITIVE, NOTICES, ENTRY.format(before=before, after=after))

    assert [line.split(":")[0] for line in said["stale"]] == [complaint]
    assert code == 1
    assert f"stale: {complaint}" in printed


@pytest.mark.parametrize("entry", ['module = "planted.py"', ENTRY.format(before="", after="").replace("0 is 0", " ")])
def test_a_justification_without_a_reason(tmp_path, entry):
    """Every entry needs a place, a change and a reason."""
    file = tmp_path / "justified.toml"
    file.write_text(entry if "[[" in entry else f"[[equivalent]]\n{entry}\n", encoding="utf-8")

    with pytest.raises(ValueError, match="needs"):
        load(file)


# The mutants


def test_text_for_people_is_left_alone(tmp_path):
    """Neither docstrings nor what an error says are mutated; keys and whether it is raised at all are."""
    text = '"""Doc."""\ndef f(said):\n    """Doc."""\n    if "key" in said:\n        raise ValueError("message")\n'
    (tmp_path / "m.py").write_text(text, encoding="utf-8")

    found = [(mutant.operator, mutant.after) for mutant in Source(tmp_path, "m.py").mutants]

    assert found == [
        ("condition", "if True:"),
        ("condition", "if False:"),
        ("comparison", "if 'key' not in said:"),
        ("text", "if 'key_mutant' in said:"),
        ("statement removed", "pass"),
    ]


def test_mutants_are_known_by_their_text(tmp_path):
    """A mutant is the same one when lines move above it."""
    for name, text in (("a.py", "X = 1\n"), ("b.py", "\n# more\n\nX = 1\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (a,), (b,) = (Source(tmp_path, name).mutants for name in ("a.py", "b.py"))

    assert a.key[1:] == b.key[1:] == ("", "X = 1", "X = 2")
    assert (a.line, b.line) == (1, 4)


@pytest.mark.parametrize("module", MODULES)
def test_every_mutant_is_a_change(module):
    """Every mutant of the real modules compiles, and reads otherwise than what it was."""
    source = Source(ROOT, module)

    assert source.mutants
    for mutant in source.mutants:
        source.compiled(mutant)
        assert mutant.before != mutant.after, mutant


@pytest.mark.parametrize("count", [1, 7, 10, 11])
def test_sample_is_spread(count):
    """A sample has as many as were asked for, all different, out of every part."""
    found = sampled(list(range(10)), count)

    assert len(set(found)) == min(count, 10)
    assert found == sorted(found)
    assert count != 7 or found[0] < 2 < 7 < found[-1]


# Our own tests


def test_our_tests_kill_mutants(verify, tmp_path):
    """Of small changes to metrics, rounding and formats, evenly drawn from all, the tests notice nearly every one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "fixtures.mutation", "--sample", str(SAMPLE), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert out.exists(), done.stdout + done.stderr

    said = json.loads(out.read_text(encoding="utf-8"))
    left = [mutant for mutant in said["mutants"] if mutant["status"] == "survived"]
    names = ("module", "line", "operator", "before", "after")
    rows = [[mutant[name] for name in names] for mutant in left]
    verify("mutants killed", said["share"], at_least=ENOUGH, detail="\n".join(mutant["after"] for mutant in left))
    verify.none_of("stale justifications", said["stale"], among=len(load(Path(ROOT / JUSTIFIED))))
    verify.table("Surviving mutants", names, rows)
