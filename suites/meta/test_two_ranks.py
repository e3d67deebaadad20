"""Two ranks on one card: how both are started, and whose their processes are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from suites.meta import two_ranks


def test_the_second_node_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the server's flags and meet at one port; the second opens none, and takes itself for another host."""
    monkeypatch.setenv("VLLM_PORT", "29000")
    flags = ["--model", "m", "--tensor-parallel-size", "2", "--host", "h", "--port", "1", "--served-model-name", "n"]
    first, second = (two_ranks.command(rank, flags, 7) for rank in (0, 1))
    meeting = ["--master-addr", "127.0.0.1", "--master-port", "7"]
    assert first[3:] == [*flags, "--nnodes", "2", "--node-rank", "0", *meeting]
    assert second[3:] == [*flags[:4], "--nnodes", "2", "--node-rank", "1", *meeting, "--headless"]
    first_of, second_of = (two_ranks.environment(rank) for rank in (0, 1))
    assert first_of["NCCL_HOSTID"] != second_of["NCCL_HOSTID"]
    assert not {"VLLM_PORT"} & {*first_of, *second_of}
    assert first_of["SPT_NOENV"] == second_of["SPT_NOENV"] == "1", "vLLM sets titles, which would hide the rank"


@pytest.mark.parametrize(("visible", "card"), [(None, "0"), ("", "0"), ("3", "3"), ("GPU-a,GPU-b", "GPU-a")])
def test_both_see_one_card(visible: str | None, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks see the first card alone: of two, vLLM would take the second rank for one of its own host."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {two_ranks.environment(rank)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)} == {card}


@pytest.mark.parametrize(("first", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_both_end_together(first: str, code: int) -> None:
    """A node that ends, by itself or killed, ends the other, and says how."""
    nodes = [
        subprocess.Popen([sys.executable, "-c", f"import os, sys, time; {what}"]) for what in ("time.sleep(60)", first)
    ]
    assert two_ranks.together(nodes) == code
    assert nodes[0].poll() == -signal.SIGTERM


def test_processes_are_told_by_rank() -> None:
    """Of a server's processes those of a rank are told, and what has ended is nobody's."""
    asleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    ranks = [subprocess.Popen(asleep, env=two_ranks.environment(rank), stdout=subprocess.PIPE) for rank in (0, 1)]
    try:
        for one in ranks:
            assert one.stdout is not None
            one.stdout.readline()
        pids = frozenset({os.getpid(), *(one.pid for one in ranks)})
        assert [two_ranks.pids_of(rank, pids) for rank in (0, 1)] == [{one.pid} for one in ranks]
        ranks[1].kill()
        ranks[1].wait()
        assert two_ranks.pids_of(1, pids) == frozenset()
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
