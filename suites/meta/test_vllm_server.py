"""vLLM's server is started, waited for and ended as it must be: tried on a stand-in, for real processes and ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.engines import conditions, ports, process
from fixtures.engines.kernels import force, identified, why_not_machete
from fixtures.engines.process import EngineError
from fixtures.engines.refusals import likely_causes
from fixtures.engines.server import Server, Serving, arguments, config_overrides, post, start_server
from fixtures.engines.servers import Servers
from fixtures.engines.vllm_logs import read_start, stage, telling_lines
from fixtures.faults.editing import copied, edit_json
from fixtures.faults.serving import in_memory_names
from fixtures.formats import AWQ_GEMM
from fixtures.subjects.published import published_config
from suites.meta import fake_vllm

FAKE = Path(fake_vllm.__file__)
Start = Callable[..., Server]


@pytest.fixture
def start(tiny_reference: Checkpoint, tmp_path: Path) -> Iterator[Start]:
    """Starts the stand-in with a fault; whatever runs at the end is ended."""
    running: list[Server] = []

    def run(fault: str = "none", **settings: float) -> Server:
        module = (sys.executable, str(FAKE), fault)
        server = start_server(tiny_reference, Serving(), tmp_path / fault, module=module, **settings)
        running.append(server)
        return server

    yield run
    for server in running:
        server.close()


def test_why_it_does_not_start(good_artifact: Path, tmp_path: Path) -> None:
    """Beside vLLM's own words a refusal names what the bytes show: in-memory names, a skip list that vLLM misreads."""
    artifact = copied(good_artifact, tmp_path / "artifact")
    assert likely_causes(Checkpoint(artifact)) == []
    in_memory_names(artifact)
    module = (sys.executable, str(FAKE), "dies")
    with pytest.raises(EngineError) as refused:
        start_server(Checkpoint(artifact), Serving(), tmp_path / "log", module=module)
    names, skipped = (line for line in str(refused.value).splitlines() if line.startswith("  likely: "))
    assert "model.language_model.embed_tokens.weight is model.embed_tokens.weight on the hub" in names
    assert "['model.visual', 'lm_head'], by which vLLM takes visual.blocks.0.attn.proj for quantized" in skipped


def gone(pids: frozenset[int]) -> bool:
    """Whether none of these processes holds anything any more."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return not any(map(alive, pids))


def test_started_and_ended(start: Start) -> None:
    """A server that is ready says what its log says, and when it is closed nothing of it is left, children included."""
    server = start()
    pids = server.pids()
    assert server.alive()
    assert len(pids) == 3  # the guard, the server, the engine core
    assert server.started.kernels == ("machete",)
    assert (server.started.weights_bytes, server.started.kv_tokens) == (round(2.03 * 2**30), 1234567)
    server.close()
    assert gone(pids)
    assert not server.alive()


SPREAD = """\
(Worker_TP2 pid=14) INFO 11-22 21:00:04 [model_runner.py:302] Model loading took 2.03 GiB and 1.600000 seconds
(Worker_TP10 pid=15) INFO 11-22 21:00:04 [model_runner.py:302] Model loading took 2.05 GiB and 1.600000 seconds
(Worker_TP0 pid=13) INFO 11-22 21:00:04 [model_runner.py:302] Model loading took 2.07 GiB and 1.500000 seconds
"""


def test_weights_of_every_gpu() -> None:
    """Workers tell of their weights in any order; they are known by rank, and the fullest GPU's are the most."""
    started = read_start(SPREAD, 1.0)
    assert started.weights_by_gpu == tuple(round(size * 2**30) for size in (2.07, 2.03, 2.05))
    assert started.weights_bytes == round(2.07 * 2**30)
    assert read_start("", 1.0).weights_bytes == 0


def test_closed_by_its_context(start: Start) -> None:
    """Leaving the context ends the server, whatever happened in it."""
    server = start()
    pids = server.pids()
    with pytest.raises(ZeroDivisionError), server:
        raise ZeroDivisionError
    assert gone(pids)


def test_stubborn_server_is_killed(start: Start) -> None:
    """A server that ignores SIGTERM is killed."""
    server = start("stubborn")
    pids = server.pids()
    server._process.close(grace=0.3)
    assert gone(pids)


def test_failed_start_says_why(start: Start) -> None:
    """A server that dies is reported with the engine core's own words, not with the API server's about it."""
    with pytest.raises(EngineError) as caught:
        start("dies")
    message = str(caught.value)
    assert "does not serve" in message
    assert "no module or parameter named 'blocks.0.attn.proj.weight'" in message
    assert "Engine core initialization failed" not in message
    assert len(message.splitlines()) <= 8


def test_hanging_start_ends(start: Start, tmp_path: Path) -> None:
    """A server that never gets ready is given up, and ended with its children."""
    with pytest.raises(EngineError, match="not ready after"):
        start("hangs", within=1.0)
    assert not session_pids_of(tmp_path)


def session_pids_of(folder: Path) -> list[str]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    """When whoever started a server is killed outright, the server and its children end all the same."""
    code = (
        "import sys, time; from pathlib import Path; from fixtures.engines.process import Guarded\n"
        f"p = Guarded([sys.executable, {str(FAKE)!r}, 'hangs', '--port', '1'], Path({str(tmp_path / 'log')!r}),"
        f" {dict(os.environ)!r}, Path({str(tmp_path)!r}))\n"
        "while len({p.pid, *p.pids()}) < 3: time.sleep(0.05)\n"
        "print(p.pid, *p.pids(), flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=FAKE.parents[2])
    assert parent.stdout is not None
    pids = frozenset(map(int, parent.stdout.readline().split()))
    assert len(pids) == 3
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while not gone(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pids)


def test_process_without_its_main_thread_is_ended() -> None:
    """A process whose main thread has ended, which looks like a zombie, lives as long as another thread of it does."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print(flush=True); ctypes.CDLL(None).pthread_exit(None)"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert command.stdout is not None
    command.stdout.readline()
    stat = Path(f"/proc/{command.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert process.session_pids(command.pid) == {command.pid}
    process.kill_session(command.pid)
    assert command.wait(60) == -signal.SIGKILL


def test_dead_server_is_started_anew(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A server is started once for all who ask for it, and once more when it died."""
    module = (sys.executable, str(FAKE), "none")

    def begin(checkpoint: Checkpoint, serving: Serving, folder: Path, progress: object) -> Server:
        return start_server(checkpoint, serving, folder, module=module)

    servers = Servers(tmp_path, start=begin)
    one, other = servers.several([(tiny_reference, Serving(kv_bytes=1)), (tiny_reference, Serving(kv_bytes=2))])
    assert servers(tiny_reference, Serving(kv_bytes=1)) is one
    assert one.port != other.port
    one._process.close()
    assert servers(tiny_reference, Serving(kv_bytes=1)) is not one
    servers.close()
    assert not other.alive()


def test_those_that_started_survive_one_that_does_not(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """One failed start among several is reported, and the others are kept to be closed."""

    def begin(checkpoint: Checkpoint, serving: Serving, folder: Path, progress: object) -> Server:
        fault = "dies" if serving.eager else "none"
        return start_server(checkpoint, serving, folder, module=(sys.executable, str(FAKE), fault))

    servers = Servers(tmp_path, start=begin)
    with pytest.raises(EngineError, match="does not serve"):
        servers.several([(tiny_reference, Serving(kv_bytes=1, eager=eager)) for eager in (True, False)])
    running = servers(tiny_reference, Serving(kv_bytes=1))
    assert running.alive()
    servers.close()
    assert not running.alive()


def test_dying_while_asked_is_told(start: Start) -> None:
    """A server that dies over a request is reported with what its log says of it."""
    with pytest.raises(EngineError, match="no module or parameter"):
        post(start("dies when asked"), "chat/completions", {"model": "fake"})


# -- logs ------------------------------------------------------------------------------------------------------------

PYDANTIC = """\
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "/x.py", line 3, in <module>
(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=7)   Value error, User-specified max_model_len (4096) is greater than the derived max_model_len (2048)
(APIServer pid=7)     For further information visit https://errors.pydantic.dev/2.13/v/value_error
"""
OUT_OF_MEMORY = """\
(EngineCore pid=9) ERROR 11-22 21:00:04 [c.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_telling_lines() -> None:
    """Of a long log the last exception that is its own is quoted, with what explains it; else the last lines."""
    assert telling_lines(PYDANTIC) == [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "Value error, User-specified max_model_len (4096) is greater than the derived max_model_len (2048)",
    ]
    assert telling_lines(OUT_OF_MEMORY)[0].startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert telling_lines("api_server.py: error: unrecognized arguments: --nonsense\n") == [
        "api_server.py: error: unrecognized arguments: --nonsense"
    ]
    assert telling_lines("one\n\ntwo\n") == ["one", "two"]
    assert telling_lines("") == []


@pytest.mark.parametrize(
    ("log", "kernels"),
    [
        (fake_vllm.LOG, ("machete",)),
        (fake_vllm.LOG.replace("Machete", "Marlin"), ("marlin",)),
        (fake_vllm.LOG.replace("Using MacheteLinearKernel for AutoAWQMarlinLinearMethod", "-"), ("awq",)),
        (
            fake_vllm.LOG
            + "WARNING Layer 'x' is not supported by AutoAWQMarlin. Falling back to unoptimized AWQ kernels.",
            ("machete", "awq"),
        ),
        ("config: dtype=torch.float16, quantization=bitsandbytes, x", ("bitsandbytes",)),
        ("config: dtype=torch.float16, quantization=None, x", ("fp16",)),
        ("config: dtype=torch.bfloat16, quantization=None, x", ("bf16",)),
        ("Using NewestLinearKernel for AutoAWQMarlinLinearMethod", ("NewestLinearKernel",)),
        ("nothing of the kind", ()),
    ],
)
def test_kernels_are_named(log: str, kernels: tuple[str, ...]) -> None:
    """A log says by which kernels linears are computed; a fallback beside the others, an unknown one by itself."""
    assert identified(log) == kernels


def test_the_type_of_a_run_is_named() -> None:
    """A log says in which type activations are computed; one that does not is taken for none."""
    assert read_start(fake_vllm.LOG, 1.0).dtype == "float16"
    assert read_start(fake_vllm.LOG.replace("torch.float16", "torch.bfloat16"), 1.0).dtype == "bfloat16"
    assert read_start("dtype=auto, kv_cache_dtype=torch.fp8", 1.0).dtype == ""


def test_start_is_followed() -> None:
    """A start's stages are told from the log so far, and a log without figures gives zeros."""
    lines = fake_vllm.LOG.splitlines(keepends=True)
    assert [stage("".join(lines[:n])) for n in (1, 3, 5, 6, 7)] == [
        "importing",
        "loading weights",
        "measuring memory",
        "warming up",
        "opening the port",
    ]
    assert read_start("", 1.5).kv_tokens == 0


# -- flags -----------------------------------------------------------------------------------------------------------


def test_flags(tiny_reference: Checkpoint, good_artifact: Path, tmp_path: Path) -> None:
    """Settings become vLLM's flags; the model's own length bounds the length, and no media means no vision tower."""
    flags, environment = arguments(tiny_reference, Serving(), tmp_path)
    assert flags[flags.index("--max-model-len") + 1] == "2048"
    assert "--language-model-only" in flags
    assert "--kv-cache-memory-bytes" not in flags
    assert environment["HF_HUB_OFFLINE"] == "1"
    seeing = Serving(media=(("image", 2),), kv_bytes=5, in_flight=True, more=("--more",))
    flags, _ = arguments(tiny_reference, seeing, tmp_path)
    assert json.loads(flags[flags.index("--limit-mm-per-prompt") + 1]) == {"image": 2, "video": 0, "audio": 0}
    assert flags[-1] == "--more"
    artifact = Checkpoint(good_artifact)
    _, environment = arguments(artifact, Serving(kernel="marlin"), tmp_path)
    disabled = environment["VLLM_DISABLED_KERNELS"].split(",")
    assert "MacheteLinearKernel" in disabled
    assert "MarlinLinearKernel" not in disabled
    flags, environment = arguments(artifact, Serving(kernel="awq"), tmp_path)
    assert "fixtures.engines.plain_awq.PlainAwq" in flags
    assert environment["VLLM_CACHE_ROOT"].startswith(str(tmp_path))


def test_impossible_kernels_are_refused(tiny_reference: Checkpoint, good_artifact: Path) -> None:
    """A kernel that does not exist, or cannot run a checkpoint, is refused before anything starts."""
    artifact = Checkpoint(good_artifact)
    with pytest.raises(UserError, match="did you mean 'marlin'"):
        force("marlyn", artifact, "float16")
    with pytest.raises(UserError, match="for AWQ's layout"):
        force("marlin", tiny_reference, "float16")
    with pytest.raises(UserError, match="float16, not bfloat16"):
        force("awq", artifact, "bfloat16")


def test_where_machete_must_run(good_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machete must run the shipped shapes on Hopper; other cards, groups and sizes excuse it, not what is unserved."""
    artifact, hopper = Checkpoint(good_artifact), (9, 0)
    assert why_not_machete(artifact, hopper) == ""
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert why_not_machete(artifact, other).endswith("capability 9.0, this one's is {}.{}".format(*other))
    linear = "model.layers.0.mlp.gate_proj"
    for shape, refused in {(512, 256): False, (512, 320): False, (512, 288): True, (448, 256): True}.items():
        monkeypatch.setattr(AWQ_GEMM, "shape", lambda _, name, s=shape: s if name == linear else (512, 256))
        said = f"{linear} has {shape[1]} inputs, {shape[0]} outputs, groups of 128"
        assert why_not_machete(artifact, hopper) == (said if refused else "")
    monkeypatch.setattr(AWQ_GEMM, "shape", lambda _, name: (64, 64) if name == linear else (512, 256))
    monkeypatch.setattr(ADAPTERS["qwen2_5_vl"], "engine_name", lambda name: "" if name == linear else name)
    assert why_not_machete(artifact, hopper) == ""
    monkeypatch.undo()
    finer = copied(good_artifact, tmp_path / "finer")
    edit_json(finer, "config.json", lambda config: config["quantization_config"].update(group_size=32))
    assert why_not_machete(Checkpoint(finer), hopper).endswith("groups of 32")


def test_positions_of_video_are_overridden() -> None:
    """Where vLLM would read other positions per second than transformers, it is told; published sizes need nothing."""
    assert config_overrides(published_config("qwen2_5_omni-3b")) == {}
    assert config_overrides(published_config("qwen2_5_vl-3b")) == {}
    odd = {"thinker_config": {"position_id_per_seconds": 1, "vision_config": {}}}
    assert config_overrides(odd) == {"thinker_config": {"vision_config": {"tokens_per_second": 1}}}


def test_conditions_are_apart(tiny_reference: Checkpoint, good_artifact: Path) -> None:
    """Every condition is a run of its own: another kernel, graphs or type; all but one are in float16."""
    adapter, artifact = ADAPTERS["qwen2_5_vl"], Checkpoint(good_artifact)
    of_reference = conditions.of_reference(tiny_reference, adapter, 1)
    of_artifact = conditions.of_artifact(artifact, tiny_reference, adapter, 1, conditions.KERNELS)
    assert list(of_reference) == ["eager", "graphs", "bfloat16"]
    assert list(of_artifact) == ["eager", "graphs", "bfloat16", *conditions.KERNELS, "decoded"]
    for found in (of_reference, of_artifact):
        assert len({condition.key for condition in found.values()}) == len(found)
        assert [name for name, one in found.items() if one.serving.dtype != "float16"] == ["bfloat16"]
        assert found["bfloat16"].serving == replace(found["eager"].serving, dtype="bfloat16")


def test_conditions_are_run_once(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Equal conditions share one run; a failed one fails those alone that need it; one never begun is a mistake."""
    ran = []

    def run(checkpoint: Checkpoint, serving: Serving, *_: object, prompts: Path) -> object:
        ran.append(serving)
        if serving.eager:
            raise EngineError("did not start")
        return serving

    runs = conditions.Runs(tmp_path, run=run)
    good, bad = (conditions.Condition(tiny_reference, Serving(eager=eager)) for eager in (False, True))
    runs.begin([good, bad, replace(good)], [])
    runs.begin([good], [])
    assert runs.recorded(good) == good.serving
    with pytest.raises(EngineError, match="did not start"):
        runs.recorded(bad)
    with pytest.raises(LookupError):
        runs.recorded(conditions.Condition(tiny_reference, Serving(kv_bytes=3)))
    assert len(ran) == 2
    runs.close()


def test_interrupted_starts_end_at_once(
    tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while servers start ends them, and none that was to come begins: their ten minutes are not waited for."""
    module = (sys.executable, str(FAKE), "hangs")
    ended: list[str] = []

    def begin(checkpoint: Checkpoint, serving: Serving, folder: Path, progress: object) -> Server:
        try:
            return start_server(checkpoint, serving, folder, module=module, within=120)
        except EngineError as error:
            ended.append(str(error))
            raise

    def interrupted(begun: object, timeout: float) -> None:
        while len(list(tmp_path.glob("*/vllm.log"))) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("fixtures.engines.servers.at_once", lambda: 2)
    monkeypatch.setattr("fixtures.engines.servers.wait", interrupted)
    servers = Servers(tmp_path, start=begin)
    with pytest.raises(KeyboardInterrupt):
        servers.several([(tiny_reference, Serving(kv_bytes=number)) for number in range(1, 5)])
    assert len(ended) == 2
    assert all("it ended with code" in why for why in ended), "not: not ready after 120 s"
    assert not list(process._RUNNING)


def test_runs_that_nobody_asks_for_end(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A run of vLLM that goes on as all is over, after Ctrl-C or a failure, is ended; one to come never begins."""
    running: list[process.Guarded] = []

    def run(*_: object, prompts: Path) -> object:
        sleeping = [sys.executable, "-c", "import time; time.sleep(120)"]
        running.append(process.Guarded(sleeping, tmp_path / f"{len(running)}.log", dict(os.environ), tmp_path))
        while running[-1].alive():
            time.sleep(0.01)
        raise EngineError("it ended")

    runs = conditions.Runs(tmp_path, run=run)
    runs._pool._max_workers = 1
    runs.begin([conditions.Condition(tiny_reference, Serving(kv_bytes=number)) for number in (1, 2)], [])
    while not running:
        time.sleep(0.01)
    runs.close()
    assert [one.code for one in running] == [-signal.SIGTERM], "not 0, as one that has slept enough"


def test_everything_ends_with_the_interpreter(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """What still runs at the interpreter's end is ended."""
    module = (sys.executable, str(FAKE), "none")
    server = start_server(tiny_reference, Serving(), tmp_path, module=module)
    pids = server.pids()
    process.close_all()
    assert gone(pids)


def test_ports_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that start side by side get ports of their own, and engines places of their own to look for more."""
    taken = [ports.take() for _ in range(50)]
    inner = [ports.inner() for _ in range(50)]
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    other_worker = [ports.inner() for _ in range(50)]
    for port in taken:
        ports.give_back(port)
    assert len(set(taken)) == 50
    assert len(set(inner)) == 50
    assert not set(inner) & set(other_worker)
    assert all(1024 < port < 32768 for port in (*inner, *other_worker))
