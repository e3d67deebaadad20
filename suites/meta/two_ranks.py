"""vLLM's server over two ranks that share one card: ``python two_ranks.py`` and the server's own flags.

NCCL refuses two ranks on one card of one host, so each is told that its host is another (``NCCL_HOSTID``), and vLLM
that there are two nodes of one GPU each. What a rank holds is what it would hold on a card of its own; how fast it is
says nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    """That of a node: ports are looked for by each itself."""
    ours = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}
    return {**ours, **ON_LOOPBACK, "NCCL_HOSTID": f"node-{rank}", RANK: str(rank)}


def pids_of(rank: int, pids: frozenset[int]) -> frozenset[int]:
    """Those processes of a server that are a rank's; what ended meanwhile is nobody's."""
    return frozenset(pid for pid in pids if f"{RANK}={rank}".encode() in _environment_of(pid))


def _environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def main() -> None:
    """Start the second node, and become the first; both write to one log and end together, as one session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = sys.argv[1:]
    subprocess.Popen(command(1, flags, port), env=environment(1))
    os.execve(sys.executable, command(0, flags, port), environment(0))


if __name__ == "__main__":
    main()
