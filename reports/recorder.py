"""The main process's side of the plugin: reports become results, and results the report."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from fixtures.core.errors import UserError
from fixtures.core.results import Result, Run
from reports import about, store, terminal
from reports.render import render
from reports.stash import ABOUT, SEEDS
from reports.translate import ATTRIBUTE, identity, module_of, result_of, with_failed_teardown

_COLORS = {"proved": "green", "known bad": "yellow", "disproved": "red", "incomplete": "yellow"}


class Recorder:
    """In the main process: turns reports into results, and results into the report."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.started = datetime.now(UTC)
        self.clock = perf_counter()
        self.collected: dict[str, Result] = {}
        self.deselected: Counter[str] = Counter()
        self.results: dict[str, Result] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.run: Run | None = None
        self.trouble = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.collected[item.nodeid] = Result.from_json(
                {**identity(item), "id": item.nodeid, "outcome": "skipped", "measurements": []}
            )

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected.update(module_of(item.nodeid) for item in items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.results[report.nodeid] = replace(result_of(report), requirement="It can be collected.")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome not in ("passed", "failed", "skipped"):
            return  # such as the "rerun" of pytest-rerunfailures: another report follows
        self.seconds[report.nodeid] += report.duration
        if report.when == "teardown":
            if report.failed and report.nodeid in self.results:
                self.results[report.nodeid] = with_failed_teardown(self.results[report.nodeid], report)
        elif report.when != "setup" or not report.passed:
            self.results[report.nodeid] = result_of(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        for nodeid in ids:
            self.collected.setdefault(nodeid, Result(nodeid, "skipped", ""))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        sent = getattr(node, "workeroutput", {}).get(ATTRIBUTE, {})
        _merge(self.config.stash[ABOUT], sent.get("subjects", {}))
        _merge(self.config.stash[SEEDS], sent.get("seeds", {}))
        self.deselected = Counter(sent.get("deselected", self.deselected))  # every worker deselects the same

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.run = Run(self._about(int(exitstatus)), self._results())
        try:
            store.save(self.run, self.folder / "results.json")
            store.write(self.folder / "index.html", render(self.run))
        except UserError as error:
            self.trouble = str(error)
            session.exitstatus = exitstatus or pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.run is None:
            return
        terminalreporter.section("verdict")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for text, verdict in terminal.lines(self.run, width):
            color = {_COLORS[verdict.word]: True} if verdict else {}
            terminalreporter.write_line(text, **color)
        if self.deselected:
            terminalreporter.write_line(f"not asked for: {sum(self.deselected.values())} deselected")
        if self.trouble:
            terminalreporter.write_line(f"no report: {self.trouble}", red=True)
            return
        for name in ("results.json", "index.html"):
            terminalreporter.write_line(str(self.folder / name))

    def _results(self) -> tuple[Result, ...]:
        """A result of everything collected, in the order of collection; what never ran says so."""
        unrun = "not run: the run ended before it came to this"
        ids = dict.fromkeys((*(i for i in self.results if i not in self.collected), *self.collected))
        targets = {r.target_id: r.target for r in self.results.values() if r.target_id}
        results = []
        for nodeid in ids:
            result = self.results.get(nodeid) or replace(self.collected[nodeid], message=unrun)
            if result.target is None:  # a worker that died tells only the test's id
                named = [t for t in targets if t in nodeid.partition("[")[2]]
                result = replace(result, target=targets[max(named, key=len)] if named else None)
            results.append(replace(result, seconds=round(self.seconds[nodeid], 4)))
        return tuple(results)

    def _about(self, exitstatus: int) -> dict[str, Any]:
        found = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(perf_counter() - self.clock, 3),
            "exit_status": exitstatus,
            "command": shlex.join(["pytest", *map(str, self.config.invocation_params.args)]),
            "machine": about.machine(),
            "versions": about.versions(),
            "git": about.git(self.config.rootpath),
            "seeds": self.config.stash[SEEDS] or None,
            "deselected": dict(self.deselected),
            "subjects": self.config.stash[ABOUT],
        }
        plain: dict[str, Any] = store.plain({key: value for key, value in found.items() if value is not None})
        return plain


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add ``more`` to ``into``, through nested dictionaries."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
