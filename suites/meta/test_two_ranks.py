"""Two ranks on one card: how both are started, and whose their processes are."""

from __future__ import annotations

import os
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
