"""Asking vLLM by hand, against a server that speaks as vLLM's does, well or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.core.errors import UserError
from fixtures.engines import served
from fixtures.engines.__main__ import main
from fixtures.engines.server import Serving
from fixtures.engines.vllm_logs import Started
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw

pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
MODEL = str(shipped("qwen2_5_vl-tiny"))
PIECES = (("lime8", [11]), (" yellow1", [12, 13]), ("", [14]))  # what is said, and by which tokens


def chunk(text: str, tokens: list[int], **more: Any) -> dict[str, Any]:
    """A chunk of a chat completion as vLLM 0.25.1 streams it with ``return_token_ids``."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "token_ids": tokens, "finish_reason": None, **more}]}


OPENING = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1, 2, 3]}
SAID = [OPENING, *(chunk(*piece) for piece in PIECES[:-1]), chunk(*PIECES[-1], finish_reason="stop")]
USAGE = {"choices": [], "usage": {"prompt_tokens": 37, "completion_tokens": 4, "total_tokens": 41}}


class Fake:
    """A server on loopback that streams ``chunks``, or refuses, and keeps what it was asked."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, Any]] = [*SAID, USAGE]
        self.refusal: tuple[int, str] | None = None
        self.asked: list[dict[str, Any]] = []
        self.started: list[Serving] = []
        self.closed = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(fake.refusal[0] if fake.refusal else 200)
                self.end_headers()
                if fake.refusal:
                    self.wfile.write(fake.refusal[1].encode())
                    return
                for one in fake.chunks:
                    self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def start(self, checkpoint: Any, serving: Serving, folder: Path, progress: Any) -> SimpleNamespace:
        """In place of ``start_server``."""
        self.started.append(serving)
        progress("vLLM serves it: loading, seconds", 3, 600)
        started = Started(seconds=41.0, weights_by_gpu=(3_400_000_000,), kv_tokens=65536, kernels=("marlin",))
        return SimpleNamespace(
            url=self.url, model=checkpoint.name, started=started, pids=frozenset, close=self._close, log=folder
        )

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A fake in place of vLLM, on a machine that is said to have it."""
    server = Fake()
    monkeypatch.setattr(served, "start_server", server.start)
    monkeypatch.setattr(served, "require_vllm", lambda: None)
    monkeypatch.setattr(served, "memory_share", lambda _: 0.1)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_answer(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The streamed text is printed; the request asks greedily for token ids, media inline; the server is closed."""
    (sample,) = draw("image", "evaluation", 1)
    sample.content[0]["image"].save(tmp_path / "a.png")
    arguments = ["ask", "--model", MODEL, "--engine", "vllm", "--kernel", "marlin", "--max-new-tokens", "12"]
    assert main([*arguments, "--image", str(tmp_path / "a.png"), "Read the digits."]) == 0
    out, err = capsys.readouterr()
    assert out == "lime8 yellow1\n"
    assert "37 tokens of prompt, 4 of answer" in err
    assert "weights 3.4 GB, room for 65536 tokens of KV cache" in err
    assert "kernels marlin" in err
    assert "vLLM serves it: loading (3 s)" in err
    (body,) = fake.asked
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "Read the digits."}
    assert (body["temperature"], body["max_tokens"], body["stream"], body["return_token_ids"]) == (0, 12, True, True)
    (serving,) = fake.started
    assert (serving.kernel, serving.media) == ("marlin", (("image", 1),))
    assert serving.max_model_len >= 37 + 12
    assert fake.closed == 1


def test_compare(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Two checkpoints are served one after the other, and their tokens compared."""
    assert main(["ask", "--model", MODEL, "--compare", MODEL, "--engine", "vllm", "x"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same, all 4 tokens"
    assert (len(fake.started), fake.closed) == (2, 2)


REFUSED = json.dumps({"error": {"message": "The prompt is too long:\n5000 tokens", "code": 400}})
BROKEN: dict[str, tuple[tuple[int, str] | None, list[dict[str, Any]], str]] = {
    "refused": ((400, REFUSED), [], "refuses the question (400): The prompt is too long: 5000 tokens"),
    "not JSON": ((502, "Bad\nGateway"), [], "refuses the question (502): Bad Gateway"),
    "broken off": (None, SAID[:2], "breaks off after 1 tokens"),
    "nothing": (None, [], "breaks off after 0 tokens"),
    "error": (None, [*SAID[:2], {"error": {"message": "engine is dead"}}], "breaks off: engine is dead"),
    "another protocol": (None, [{"text": "x"}], "breaks off"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_server_fails(case: str, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that refuses or breaks off costs one line with its reason, exit code 2, and is closed all the same."""
    fake.refusal, fake.chunks, said = BROKEN[case]
    assert main(["ask", "--model", MODEL, "--engine", "vllm", "x"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert fake.closed == 1


def test_server_is_gone(fake: Fake) -> None:
    """A server that no longer listens is a plain error, too."""
    fake.http.server_close()
    fake.http.shutdown()
    with pytest.raises(UserError, match="breaks off"):
        served.stream("http://127.0.0.1:9/v1", {}, lambda _: None)


@pytest.mark.parametrize("choice", [["--device", "cuda"], ["--speak", "x.wav"]])
def test_not_for_vllm(choice: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What vLLM's engine cannot do is refused before it starts."""
    assert main(["ask", "--model", MODEL, "--engine", "vllm", *choice, "x"]) == 2
    assert "are for --engine hf" in capsys.readouterr().err
