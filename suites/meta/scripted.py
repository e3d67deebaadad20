"""An OpenAI-compatible server that answers as a script says: raw bytes, so that it can break off anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Script = Callable[[dict[str, Any]], "Answer"]  # a request's JSON body -> what it gets
HANG_UP = object()  # as a part of an answer: the connection is closed there


class Answer:
    """What one request gets: pieces of a body, as they are to leave, each with a breath before it."""

    def __init__(self, pieces: Sequence[bytes | object], status: int = 200) -> None:
        self.pieces = pieces
        self.status = status


def chunk(tokens: int, text: str = " a", prompt: int = 3) -> bytes:
    """An event of a stream, with vLLM's running count of tokens."""
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
    return event({"choices": [{"index": 0, "text": text}], "usage": usage})


def ending(tokens: int, prompt: int = 3, **more: Any) -> bytes:
    """The last event of a stream, and its end."""
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens, **more}
    return event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event, spelled as vLLM does."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def whole(tokens: int, prompt: int = 3) -> Answer:
    """An answer that is not streamed."""
    usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    return Answer([json.dumps({"choices": [{"text": " a" * tokens}], "usage": usage}).encode()])


class Scripted:
    """The server, as it saw things."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.under_way = 0
        self.most_under_way = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept for several requests."""
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in head if line.startswith("content-length:"))
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._answer(self.script(body), writer)
        finally:
            self.under_way -= 1

    async def _answer(self, answer: Answer, writer: asyncio.StreamWriter) -> bool:
        reason = {200: "OK"}.get(answer.status, "No")
        writer.write(f"HTTP/1.1 {answer.status} {reason}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in answer.pieces:
            await asyncio.sleep(0.002)  # so that pieces leave one by one
            if piece is HANG_UP:
                writer.transport.abort()
                return False
            assert isinstance(piece, bytes)
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@contextmanager
def serving(script: Script) -> Iterator[Scripted]:
    """A scripted server on loopback, in a thread of its own."""
    scripted, ready, loop = Scripted(script), threading.Event(), asyncio.new_event_loop()

    async def main() -> None:
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
        scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await stop.wait()
        server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield scripted
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
