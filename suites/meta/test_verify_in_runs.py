"""``verify`` in a run: what fails says so, having measured nothing fails, and what is known bad is excused."""

from __future__ import annotations

import math

import pytest

from fixtures.core.measurement import Bound, Measurement
from fixtures.expected import matches
from reports.stash import MEASUREMENTS, TABLES

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


@pytest.mark.parametrize(
    ("when", "excused"),
    [("pytest >= 1", True), ("pytest < 1", False), ("pytest", True)],
    ids=["these versions", "other versions", "any version"],
)
def test_known_bad_with_some_versions(inner, when, excused):
    """What is known of some versions of a package is excused with those alone: with others it must not fail."""
    done, _ = inner(KNOWN, expected=f'{RTN}when = "{when}"\n')

    done.assert_outcomes(passed=2, **{"xfailed" if excused else "failed": 1})


@pytest.mark.parametrize(
    ("when", "said"), [("pytest => 1", "pytest => 1"), ("nobody-has-it > 1", "nobody-has-it is not installed")]
)
def test_bad_versions(inner, when, said):
    """Versions that cannot be read, or of a package that is not there, are a usage error: nothing runs."""
    done, spy = inner(KNOWN, expected=f'{RTN}when = "{when}"\n')

    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"ERROR: *expected_failures.toml: when must be like 'transformers >= 5.18' (*{said}*"])
    assert not spy.reports


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
        pytest.param(RTN + "when = 5.18", id="a number for versions"),
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
