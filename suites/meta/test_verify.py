"""``verify``: everything measured is recorded, what does not hold fails, and so does a test that measured nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fixtures.core.measurement import Bound, Measurement, as_value, readable
from fixtures.expected import matches
from fixtures.verifying import Verify
from reports.stash import MEASUREMENTS, TABLES

NAN, INF = math.nan, math.inf
PAIR = """
    from types import SimpleNamespace

    import pytest


    @pytest.fixture(scope="session")
    def pair():
        reference = SimpleNamespace(name="Qwen2.5-Omni-7B", digest="0011223344556677")
        artifact = SimpleNamespace(name="ours", digest="3f9c01aa44556677", quantization={"quant_method": "awq"})
        return SimpleNamespace(
            reference=SimpleNamespace(checkpoint=reference),
            artifact=SimpleNamespace(checkpoint=artifact),
            scheme="4-bit g128",
        )
"""


class Spy:
    """What each test of an inner run measured, and the reports of its phases."""

    def __init__(self):
        self.measured, self.tables, self.reports = {}, {}, {}

    def pytest_runtest_teardown(self, item):
        """Look into the item's stash once its test is over."""
        self.measured[item.name] = item.stash.get(MEASUREMENTS, None)
        self.tables[item.name] = item.stash.get(TABLES, None)

    def pytest_runtest_logreport(self, report):
        """Keep the phase's report."""
        self.reports[report.nodeid.split("::")[-1], report.when] = report

    def said(self, name, when="call"):
        """The text of a failure."""
        return str(self.reports[name, when].longrepr)


@pytest.fixture
def inner(pytester):
    """Run tests under the plugins; gives pytest's result and a spy."""

    def run(source, *, conftest="", expected=None, options=()):
        pytester.makeconftest(conftest)
        pytester.makepyfile(test_inner=source)
        if expected is not None:
            (pytester.path / "expected_failures.toml").write_text(expected)
        spy = Spy()
        plugins = ("-p", "fixtures.verifying", "-p", "fixtures.expected", "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*plugins, *options, plugins=[spy]), spy

    return run


@pytest.fixture
def listening():
    """A ``verify`` that belongs to no running test."""
    return Verify(SimpleNamespace(stash={}), [])


# What holds


@pytest.mark.parametrize(
    ("kind", "limit", "good", "bad"),
    [
        ("at_most", 2.0, (2.0, 1.9, -5.0, -INF), (2.0000001, INF)),
        ("at_least", 2.0, (2.0, 2.1, INF), (1.9999999, -5.0, -INF)),
        ("equal_to", 2.0, (2.0,), (1.9999999, 2.0000001, INF, -2.0)),
        ("at_most", 0.0, (0.0, -0.0), (1e-300,)),
        ("equal_to", 0, (0.0, False), (1e-300, True)),
    ],
)
def test_bounds(listening, kind, limit, good, bad):
    """A value at its bound holds, the next one beyond does not, and a bound of 0 is a bound."""
    for value in (*good, *bad):
        listening("q", value, **{kind: limit})

    assert [m.holds for m in listening.measurements] == [True] * len(good) + [False] * len(bad)
    assert (listening.conclude() == "") == (not bad)


@pytest.mark.parametrize(
    "nothing", [None, NAN, torch.tensor(NAN), np.float32("nan")], ids=["None", "NaN", "torch", "numpy"]
)
@pytest.mark.parametrize("kind", ["at_most", "at_least", "equal_to"])
@pytest.mark.parametrize("limit", [0.0, INF, -INF])
def test_nothing_never_holds(listening, nothing, kind, limit):
    """NaN, and None for nothing measured, hold against no bound."""
    listening("mean token KL", nothing, "nats", **{kind: limit})

    assert listening.measurements[0].holds is False
    assert listening.conclude().startswith("mean token KL: NaN nats, must be ")


@pytest.mark.parametrize(
    "bounds", [{}, {"at_most": 1, "at_least": 0}, {"at_most": 1, "equal_to": 1}, {"at_most": None}]
)
def test_exactly_one_bound(listening, bounds):
    """A value without a bound, or with several, is an error, and nothing is recorded."""
    with pytest.raises(TypeError, match="exactly one of at_most, at_least, equal_to"):
        listening("q", 1.0, **bounds)

    assert not listening.measurements


@pytest.mark.parametrize("kind", ["at_most", "at_least", "equal_to"])
def test_no_bound_of_nan(listening, kind):
    """A bound of NaN is an error: it would judge nothing."""
    with pytest.raises(ValueError, match="NaN"):
        listening("q", 1.0, **{kind: NAN})


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), (torch.tensor(0.5), 0.5), (torch.tensor([0.5]), 0.5), (np.float16(0.5), 0.5)],
    ids=repr,
)
def test_values(value, number):
    """A value is a number of whatever library."""
    assert as_value(value) == number
    assert type(as_value(value)) is float


def test_a_tensor_of_many_is_no_value(listening):
    """A tensor of several elements is an error, not its first or its mean."""
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        listening("q", torch.zeros(2), at_most=1)


# What it says


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.314, "0.314"), (0.02, "0.02"), (0.0123456, "0.01235"), (-1.5, "-1.5"), (1234.56, "1235"), (1e-9, "1e-09"),
        (0.0, "0"), (-0.0, "0"), (3.0, "3"), (123456789.0, "123456789"), (1e9, "1e+09"), (1e300, "1e+300"),
        (NAN, "NaN"), (INF, "inf"), (-INF, "-inf"),
    ],
)  # fmt: skip
def test_readable(number, text):
    """A number has four significant digits, whole ones stand in full."""
    assert readable(number) == text


@pytest.mark.parametrize(
    ("measurement", "text"),
    [
        (Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.020)),
         "mean token KL: 0.314 nats, must be at most 0.02 nats"),
        (Measurement("top-1", 0.5, "", Bound("at_least", 0.95)), "top-1: 0.5, must be at least 0.95"),
        (Measurement("linears", 3, "of 252", Bound("equal_to", 0)), "linears: 3 of 252, must be equal to 0 of 252"),
        (Measurement("noise floor", 1.5e-6, "nats"), "noise floor: 1.5e-06 nats"),
        (Measurement("KL", 0.0200001, "", Bound("at_most", 0.02)), "KL: 0.0200001, must be at most 0.02"),
        (Measurement("KL", 0.02, "", Bound("at_most", 0.02)), "KL: 0.02, must be at most 0.02"),
    ],
    ids=["at most", "at least", "equal to", "no bound", "beyond by a digit not shown", "at the bound"],
)  # fmt: skip
def test_measurement_speaks(measurement, text):
    """A measurement says quantity, value, unit and bound, and never that a value fails a bound it seems to meet."""
    assert str(measurement) == text


@pytest.mark.parametrize(
    "measurement",
    [
        Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.02), "rain.wav, token 17"),
        Measurement("noise floor", 1.5e-6, "nats"),
        Measurement("q", -3.0, "", Bound("equal_to", 0.0)),
    ],
    ids=["judged", "note", "plain"],
)
def test_measurement_survives_json(measurement):
    """A measurement comes back from JSON as it went in."""
    assert Measurement.from_json(measurement.to_json()) == measurement


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_broken_value_survives_json(value):
    """A value that JSON has no word for comes back as one that holds against nothing."""
    back = Measurement.from_json(Measurement("q", value, "", Bound("at_most", 1.0)).to_json())

    assert math.isnan(back.value)
    assert back.holds is False


def test_none_of(listening):
    """No offenders among things looked at holds."""
    listening.none_of("linears with broken scales", [], among=252)

    assert listening.conclude() == ""
    assert listening.measurements == [Measurement("linears with broken scales", 0.0, "of 252", Bound("equal_to", 0.0))]


@pytest.mark.parametrize("offenders", [[], ["a"]], ids=["none", "one"])
def test_none_of_nothing(listening, offenders):
    """Looking at nothing never holds."""
    listening.none_of("linears with broken scales", offenders, among=0)

    assert listening.conclude().startswith("linears with broken scales: NaN of 0, must be equal to 0 of 0")


@pytest.mark.parametrize("count", [1, 10, 11, 300])
def test_offenders(listening, count):
    """Offenders are counted, and the first ten named."""
    listening.none_of("broken linears", (f"linear {i}" for i in range(count)), among=1000)

    first, *lines = listening.conclude().splitlines()
    assert first == f"broken linears: {count} of 1000, must be equal to 0 of 1000"
    assert lines[0] == "  worst      linear 0"
    assert lines[1 : min(count, 10)] == [f"             linear {i}" for i in range(1, min(count, 10))]
    assert lines[10:] == ([f"             (and {count - 10} more)"] if count > 10 else [])


def test_failure_layout(inner):
    """A failure names what, how much and the bound; then reference, artifact and worst offender, and no traceback."""
    _, spy = inner(
        """
        def test_parity(pair, verify):
            verify("mean token KL", 0.314159, "nats", at_most=0.02,
                   detail="prompt rain.wav, token 17: ' rain' 0.81 -> ' traffic' 0.44\\nprompt two")
            verify("top-1", 0.99, at_least=0.95)
            verify("perplexity ratio", float("nan"), at_most=1.05)
        """,
        conftest=PAIR,
    )

    assert spy.said("test_parity").splitlines() == [
        "mean token KL: 0.3142 nats, must be at most 0.02 nats",
        "  reference  Qwen2.5-Omni-7B, 00112233",
        "  artifact   ours: awq 4-bit g128, 3f9c01aa",
        "  worst      prompt rain.wav, token 17: ' rain' 0.81 -> ' traffic' 0.44",
        "             prompt two",
        "",
        "perplexity ratio: NaN, must be at most 1.05",
        "  reference  Qwen2.5-Omni-7B, 00112233",
        "  artifact   ours: awq 4-bit g128, 3f9c01aa",
    ]


# In a test


def test_outcomes(inner):
    """A test passes when all that it verified holds, and only then."""
    done, spy = inner("""
        import pytest

        def test_good(verify):
            verify("KL", 0.01, at_most=0.02)
            verify("top-1", 1.0, at_least=0.9)
            verify("files", 3, equal_to=3)
            verify.none_of("offenders", [], among=1)

        @pytest.mark.parametrize("place", range(3))
        def test_one_bad(verify, place):
            for i in range(3):
                verify(f"q{i}", i == place, equal_to=0)

        def test_without_verify():
            pass
    """)

    done.assert_outcomes(passed=2, failed=3)
    assert [spy.said(f"test_one_bad[{i}]") for i in range(3)] == [f"q{i}: 1, must be equal to 0" for i in range(3)]


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "verify.note('noise floor', 1e-6)",
        "verify.table('t', ('a',), [(1,)])",
        "[verify('q', x, at_most=1) for x in ()]",
    ],
    ids=["nothing", "a note", "a table", "zero prompts"],
)
def test_nothing_verified(inner, body):
    """A test that asked for ``verify`` and held nothing against a bound fails."""
    done, spy = inner(f"def test_it(verify):\n    {body}")

    done.assert_outcomes(failed=1)
    assert spy.said("test_it").startswith("nothing was verified")


def test_nothing_verified_through_a_fixture(inner):
    """A test whose fixture asked for ``verify`` in its stead is held to it, too."""
    done, _ = inner("""
        import pytest

        @pytest.fixture
        def check(verify):
            return lambda x: verify("q", x, at_most=1)

        def test_forgets(check):
            pass

        def test_calls(check):
            check(0)

        def test_exceeds(check):
            check(2)
    """)

    done.assert_outcomes(passed=1, failed=2)


def test_all_is_recorded(inner):
    """Every measurement and table is recorded, also after one that does not hold, and each test has its own."""
    _, spy = inner("""
        def test_first(verify):
            verify("a", 5, "s", at_most=1, detail="why")
            verify.note("b", 2)
            verify("c", None, at_least=1)
            verify("d", 1, equal_to=1)
            verify.table("t", ["layer", "error"], [[0, 0.5], [1, None]])

        def test_second(verify):
            verify("e", 0, at_most=1)
    """)

    a, b, c, d = spy.measured["test_first"]
    assert a == Measurement("a", 5.0, "s", Bound("at_most", 1.0), "why")
    assert b == Measurement("b", 2.0)
    assert (c.quantity, c.holds, math.isnan(c.value)) == ("c", False, True)
    assert d == Measurement("d", 1.0, "", Bound("equal_to", 1.0))
    assert [(t.title, t.columns, t.rows) for t in spy.tables["test_first"]] == [
        ("t", ("layer", "error"), ((0, 0.5), (1, None)))
    ]
    assert spy.measured["test_second"] == [Measurement("e", 0.0, "", Bound("at_most", 1.0))]


def test_assertion(inner):
    """A plain assertion error still shows its line, and what was measured before it is kept."""
    done, spy = inner("""
        def test_it(verify):
            verify("q", 5, at_most=1)
            found = 40 + 1
            assert found == 42
    """)

    done.assert_outcomes(failed=1)
    assert "assert 41 == 42" in spy.said("test_it")
    assert "found = 40 + 1" in spy.said("test_it")
    assert [m.quantity for m in spy.measured["test_it"]] == ["q"]


def test_wrong_use_is_an_error(inner):
    """A call without a bound fails its test, although an earlier measurement held."""
    done, spy = inner("""
        def test_it(verify):
            verify("q", 0, at_most=1)
            verify("r", 0)
    """)

    done.assert_outcomes(failed=1)
    assert "TypeError: verify('r') needs exactly one of" in spy.said("test_it")


def test_skip(inner):
    """A test that finds out that it cannot run is skipped, whatever it verified."""
    done, _ = inner("""
        import pytest

        def test_it(verify):
            pytest.skip("no vLLM: pip install vllm")
    """)

    done.assert_outcomes(skipped=1)


# A user's error


def test_user_error_in_a_test(inner):
    """A user's error in a test is one line without traceback; any other keeps its own."""
    done, spy = inner("""
        from fixtures.core.errors import CheckpointError, UserError

        def test_user(verify):
            raise UserError("no such folder: x; give another")

        def test_checkpoint():
            raise CheckpointError("x is truncated; copy it again")

        def test_bug():
            raise RuntimeError("a bug")
    """)

    done.assert_outcomes(failed=3)
    assert spy.said("test_user") == "no such folder: x; give another"
    assert spy.said("test_checkpoint") == "x is truncated; copy it again"
    assert "Error" in spy.said("test_bug")
    assert 'raise RuntimeError("a bug")' in spy.said("test_bug")


@pytest.mark.parametrize("scope", ["function", "module", "session"])
def test_user_error_in_a_fixture(inner, scope):
    """A user's error in a fixture is one line that names it, for every test that needs it and not only the first."""
    done, spy = inner(f"""
        import pytest

        from fixtures.core.errors import UserError

        @pytest.fixture(scope="{scope}")
        def reference():
            raise UserError("no such folder: x; give another")

        @pytest.fixture(scope="{scope}")
        def pair_of(reference):
            return reference, 1

        def test_first(reference):
            pass

        def test_second(reference):
            pass

        @pytest.mark.parametrize("place", range(2))
        def test_through(place, pair_of):
            pass

        @pytest.mark.parametrize("place", range(2))
        def test_asks(place, request):
            request.getfixturevalue("pair_of")
    """)

    done.assert_outcomes(errors=4, failed=2)
    said = {(name, when): str(r.longrepr) for (name, when), r in spy.reports.items() if r.failed}
    assert len(said) == 6
    assert set(said.values()) == {"reference: no such folder: x; give another"}


# Known bad

KNOWN = """
    import pytest

    def test_other(verify):
        verify("q", 0, at_most=1)

    @pytest.mark.parametrize("quantizer", ["awq", "rtn"])
    def test_kl(verify, quantizer):
        verify("KL", {"awq": 0.01, "rtn": 0.5}[quantizer], at_most=0.02)
"""
RTN = '[[failure]]\ntest = "test_inner.py::test_kl[rtn]"\nreason = "RTN drifts"\nlink = "https://example.org/1"\n'


def test_known_bad(inner):
    """What is known to fail is an expected failure, with its measurements, and nothing else is excused."""
    done, spy = inner(KNOWN, expected=RTN)

    done.assert_outcomes(passed=2, xfailed=1)
    assert spy.reports["test_kl[rtn]", "call"].wasxfail == "RTN drifts (https://example.org/1)"
    assert [m.value for m in spy.measured["test_kl[rtn]"]] == [0.5]


def test_known_bad_is_strict(inner):
    """A known failure that passes fails the run, with its reason and link: it is to be struck from the list."""
    done, spy = inner(KNOWN, expected=RTN.replace("[rtn]", "[*]"))

    done.assert_outcomes(passed=1, xfailed=1, failed=1)
    assert spy.reports["test_kl[awq]", "call"].failed
    assert "RTN drifts (https://example.org/1)" in spy.said("test_kl[awq]")
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_known_bad_excuses_no_neighbour(inner):
    """A list that names other tests excuses none."""
    expected = "".join(
        RTN.replace("test_kl[rtn]", name) for name in ("test_kl", "test_kl[awq2]", "test_kl[r]", "kl[tn]")
    )

    done, _ = inner(KNOWN, expected=expected)

    done.assert_outcomes(passed=2, failed=1)


def test_nothing_known(inner):
    """Without a list nothing is excused."""
    done, _ = inner(KNOWN)

    done.assert_outcomes(passed=2, failed=1)


@pytest.mark.parametrize(
    "expected",
    [
        *(pytest.param("\n".join(x for x in RTN.splitlines() if not x.startswith(key)), id=f"no {key}")
          for key in ("test", "reason", "link")),
        pytest.param(RTN + 'owner = "me"', id="an unknown key"),
        pytest.param('failure = "all"', id="no table"),
        pytest.param("[[failure", id="no TOML"),
        pytest.param(RTN.replace("failure", "failures"), id="another name"),
    ],
)  # fmt: skip
def test_bad_list(inner, expected):
    """A list with an entry that lacks its test, reason or link is a usage error: nothing runs."""
    done, spy = inner(KNOWN, expected=expected)

    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: *expected_failures.toml: every [[]*]] needs a test, a reason and a link*"])
    assert not spy.reports


ID = "suites/test_parity.py::test_kl[Qwen2_5_VL-tiny-rtn-image]"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (ID, True),
        ("test_parity.py::test_kl[Qwen2_5_VL-tiny-rtn-image]", True),
        ("test_parity.py::test_kl[*-rtn-*]", True),
        ("test_parity.py::test_kl[*]", True),
        ("test_parity.py::*", True),
        ("test_kl[*-image]", True),
        ("test_parity.py::test_kl", False),
        ("test_parity.py::test_kl[*-awq-*]", False),
        ("test_parity.py::test_kl[*-text]", False),
        ("test_parity.py::test_kl[rtn]", False),
        ("test_parity.py::test_kl[*-rtn-*", True),
        ("test_parity.py::test_kl*-rtn-[a-z]mage]", False),
        ("test_parity.py::test_kl*-rtn-[!x]mage]", False),
        ("test_parity.py::TEST_KL[*-rtn-*]", False),
        ("test_parity.py", False),
        ("test_coverage.py::*", False),
    ],
)
def test_patterns(pattern, meant):
    """A pattern means the node ids that end as it says: * is anything, brackets are brackets, case matters."""
    assert matches(pattern, ID) is meant
