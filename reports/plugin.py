"""The pytest plugin: has every test report carry what its test measured, wherever the test ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from reports.recorder import Recorder
from reports.stash import ABOUT, MEASUREMENTS, MEDIA, SEEDS, TABLES
from reports.store import plain
from reports.translate import ATTRIBUTE, identity, module_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--report`` and the ini option of the same name."""
    group = parser.getgroup("quantproof")
    group.addoption("--report", metavar="DIR", help="write results.json and index.html into DIR")
    parser.addini("report", "folder for results.json and index.html (default: no report)", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Open the place for the run's subjects, and listen where a report is wanted."""
    config.stash.setdefault(ABOUT, {})
    config.stash.setdefault(SEEDS, {})
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Worker(config))
        return
    folder = _folder(config)
    if folder is not None and not config.option.collectonly:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # better refused now than after hours on a GPU
        except OSError as error:
            raise pytest.UsageError(f"--report: cannot write into {folder}: {error.strerror}") from error
        config.pluginmanager.register(Recorder(config, folder))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: after pytest has made xfail's outcome of it
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach to the report all that the test said, and its measurements as properties for JUnit."""
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        measurements = item.stash.get(MEASUREMENTS, [])
        tables = item.stash.get(TABLES, [])
        said = identity(item) | {
            "measurements": [m.to_json() for m in measurements],
            "tables": [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables],
            "media": [m.to_json() for m in item.stash.get(MEDIA, [])],
        }
        vars(report)[ATTRIBUTE] = plain(said)
        properties = [(m.quantity, str(m).removeprefix(f"{m.quantity}: ")) for m in measurements]
        item.user_properties += properties  # JUnit writes those of the teardown's report,
        report.user_properties += properties  # others read the call's
    return report


class _Worker:
    """In an xdist worker: sends home what only the worker knows."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.deselected: Counter[str] = Counter()

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected.update(module_of(item.nodeid) for item in items)

    def pytest_sessionfinish(self) -> None:
        home = vars(self.config)["workeroutput"]
        subjects, seeds = self.config.stash[ABOUT], self.config.stash[SEEDS]
        home[ATTRIBUTE] = plain({"subjects": subjects, "seeds": seeds, "deselected": self.deselected})


def _folder(config: pytest.Config) -> Path | None:
    """The report's folder: the option from where pytest was called, the ini's from the root."""
    option: str | None = config.getoption("report")
    ini: str = config.getini("report")
    if option:
        return config.invocation_params.dir / option
    return config.rootpath / ini if ini else None
