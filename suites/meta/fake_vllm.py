"""Stands in for vLLM's OpenAI server: the same flags, logs and answers, no GPU; and it misbehaves on demand.

``python fake_vllm.py FAULT --model ... --port ...``; FAULT is one of ``FAULTS`` or ``STREAMS``. Like vLLM it starts a
child of its own, which would outlive it if only the server were killed.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import time
from typing import Any

FAULTS = (
    "none", "dies", "hangs", "stubborn", "answers 500", "accepts anything", "dies when asked",
    "is short of memory", "is short of memory when asked",
)  # fmt: skip
STREAMS = (
    "streams no words",
    "ends by itself",
    "breaks off",
    "fails in the stream",
    "computes on",  # the engine core never hears that a client is gone
    "answers on",  # nor does the server: it answers to the end
    "has no metrics",
)
LOG = """\
(APIServer pid=11) INFO 11-22 21:00:00 [api_server.py:100] vLLM API server version 0.25.1
(EngineCore pid=12) INFO 11-22 21:00:01 [core.py:114] Initializing a V1 LLM engine (v0.25.1) with config: \
model='/m', dtype=torch.float16, max_seq_len=2048, quantization=auto_awq, quantization_config=None, enforce_eager=True,
(EngineCore pid=12) INFO 11-22 21:00:02 [gpu_model_runner.py:5210] Starting to load model /m...
(EngineCore pid=12) INFO 11-22 21:00:03 [auto_awq.py:473] Using MacheteLinearKernel for AutoAWQMarlinLinearMethod
(EngineCore pid=12) INFO 11-22 21:00:04 [model_runner.py:302] Model loading took 2.03 GiB and 1.500000 seconds
(EngineCore pid=12) INFO 11-22 21:00:05 [kv_cache_utils.py:2146] GPU KV cache size: 1,234,567 tokens
(APIServer pid=11) INFO 11-22 21:00:06 [api_server.py:616] Starting vLLM server on http://127.0.0.1:1
"""
FAILURE = """\
(EngineCore pid=12) ERROR 11-22 21:00:04 [core.py:1200] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-22 21:00:04 [core.py:1200]   File "utils.py", line 1, in load_weights
(EngineCore pid=12) ERROR 11-22 21:00:04 [core.py:1200] ValueError: There is no module or parameter named \
'blocks.0.attn.proj.weight' in Qwen2_5_VisionTransformer
(EngineCore pid=12) Process EngineCore:
(APIServer pid=11) Traceback (most recent call last):
(APIServer pid=11)   File "api_server.py", line 2, in run_server
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
SHORT = """\
(EngineCore pid=12) ERROR 11-22 21:00:04 [core.py:1200] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate \
20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.20 GiB is free.
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server would."""

    fault = "none"
    asked = 0
    running = 0  # requests
    generated = 0  # tokens

    def do_GET(self) -> None:
        if self.path != "/metrics" or self.fault == "has no metrics":
            return self.answer(200, b"")
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0",model_name="fake"}} {Handler.running}.0',
            'vllm:num_requests_waiting{engine="0",model_name="fake"} 0.0',
            f'vllm:generation_tokens_total{{engine="0",model_name="fake"}} {Handler.generated}.0',
        ]
        return self.answer(200, "\n".join(lines).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Handler.asked += 1
        if self.fault == "answers 500":
            return self.answer(500, b'{"error": {"message": "boom"}}')
        if self.fault.endswith("when asked"):
            sys.stdout.write(FAILURE if self.fault == "dies when asked" else SHORT)
            sys.stdout.flush()
            import os

            os._exit(1)
        try:
            asked = json.loads(body)
            good = asked["model"] == "fake" and asked["max_tokens"] >= 0
        except (ValueError, KeyError):
            good = False
        if not good and self.fault != "accepts anything":
            return self.answer(400, b'{"error": {"message": "what was asked is wrong", "type": "BadRequestError"}}')
        if good and asked.get("stream"):
            return self.stream(asked)
        place = {"token": "token_id:7", "logprob": -0.1, "top_logprobs": [{"token": "token_id:7", "logprob": -0.1}]}
        choice = {"token_ids": [7], "logprobs": {"content": [place]}}
        return self.answer(200, json.dumps({"prompt_token_ids": [1, 2], "choices": [choice]}).encode())

    def stream(self, asked: dict[str, Any]) -> None:
        """One token after another, until all are said or the client is gone."""
        self.send_response(200)
        self.end_headers()
        most = 6 if self.fault == "ends by itself" or not asked.get("ignore_eos") else asked["max_tokens"]
        Handler.running += 1
        said = 0
        try:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
            while said < most:
                said += 1
                Handler.generated += 1
                if said == 3 and self.fault == "breaks off":
                    break
                if said == 3 and self.fault == "fails in the stream":
                    self.event({"error": {"message": "boom"}})
                    break
                words = "" if self.fault == "streams no words" else " a"
                over = "length" if said == most else None
                self.event({"choices": [{"delta": {"content": words}, "finish_reason": over}]})
                time.sleep(0 if self.fault == "streams no words" else 0.005)
        except OSError:  # the client is gone
            if self.fault == "computes on":
                return
            if self.fault == "answers on":
                Handler.generated += most - said
        Handler.running -= 1

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main(arguments: list[str]) -> int:
    """Serve until ended."""
    fault, flags = arguments[0], arguments[1:]
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # the engine core
    if fault in ("dies", "is short of memory"):
        print(FAILURE if fault == "dies" else SHORT, flush=True)
        return 1
    if fault == "stubborn":
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(LOG, flush=True)
    if fault == "hangs":
        time.sleep(600)
    Handler.fault = fault
    port = int(flags[flags.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
