"""vLLM's server over two ranks that share one card: ``python two_ranks.py`` and the server's own flags.

NCCL refuses two ranks on one card of one host, so each is told that its host is another (``NCCL_HOSTID``), and vLLM
that there are two nodes of one GPU each. The weights that a rank holds are what it would hold on a card of its own.
What NCCL keeps is not (sockets instead of peers' memory), and how fast it is says nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fixtures.engines.guard import GRACE, exit_code
from fixtures.meters import nvml

RANK = "QUANTPROOF_RANK"  # of a process and all that it starts
OF_HTTP = ("--host", "--port", "--served-model-name")  # a second node answers nobody
# vLLM's ``serve --headless``, without the commands beside it, whose imports are not needed
HEADLESS = """
from vllm.entrypoints.cli.serve import run_headless
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

cli_env_setup()
options = make_arg_parser(FlexibleArgumentParser()).parse_args()
options.api_server_count = 0
run_headless(options)
"""
ON_LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",  # cards of one rack are found by their own, and these two are one
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_CUMEM_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


def command(rank: int, flags: Sequence[str], port: int) -> list[str]:
    """How the first or the second node is started, from the flags of a server; they meet at a port."""
    several = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    if rank == 0:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, *several]
    left = list(flags)
    for name in OF_HTTP:
        at = left.index(name)
        del left[at : at + 2]
    return [sys.executable, "-c", HEADLESS, *left, *several, "--headless"]


def environment(rank: int) -> dict[str, str]:
    """That of a node, which sees one card: ports are looked for by each itself."""
    ours = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    told = {"NCCL_HOSTID": f"node-{rank}", "CUDA_VISIBLE_DEVICES": str(nvml.physical_index()), RANK: str(rank)}
    return {**ours, **ON_LOOPBACK, **told, "SPT_NOENV": "1"}  # else vLLM's titles overwrite what ``pids_of`` reads


def pids_of(rank: int, pids: frozenset[int]) -> frozenset[int]:
    """Those processes of a server that are a rank's; what ended meanwhile is nobody's."""
    return frozenset(pid for pid in pids if f"{RANK}={rank}".encode() in _environment_of(pid))


def _environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def together(nodes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until one of them ends, and end the other: it would wait for it. The exit code is that of the first."""
    ended: list[int] = []
    while not ended:
        time.sleep(0.1)
        ended = [code for node in nodes if (code := node.poll()) is not None]
    for node in nodes:
        node.terminate()
    for node in nodes:
        try:
            node.wait(GRACE)
        except subprocess.TimeoutExpired:
            node.kill()
    return exit_code(ended[0])


def main() -> int:
    """Run both nodes, which write to one log."""
    flags, port = sys.argv[1:], int(os.environ["VLLM_PORT"])
    nodes = [subprocess.Popen(command(rank, flags, port), env=environment(rank)) for rank in (0, 1)]
    signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
    return together(nodes)


if __name__ == "__main__":
    sys.exit(main())
