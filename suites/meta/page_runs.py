"""Runs for the page's tests: one of everything that it draws, a big one, and one whose every string is an attack."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from collections.abc import Sequence
from typing import Any

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Medium, Result, Run, Table

EVIL = (
    "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'><a href='javascript:evil=1'>%{x}{{7*7}}"
)
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
KL = Measurement("mean token KL", 0.0124, "nats", Bound("at_most", 0.02))


def png() -> bytes:
    """A picture of 2 by 2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"\x00\xff\x00\x00\x00\xff\x00" * 2
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav(seconds: float = 0.1) -> bytes:
    """A saw tooth of 16 bits at 16 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(struct.pack("<160h", *range(-16_000, 16_000, 200)) * round(seconds * 100))
    return buffer.getvalue()


def about(size: str, quantizer: str, test: str, case: str = "", **more: Any) -> Result:
    """A result about a target of Qwen2.5-VL."""
    target = {"family": "qwen2_5_vl", "size": size, "quantizer": quantizer}
    place = "-".join(filter(None, ("qwen2_5_vl", size, quantizer, case)))
    given: dict[str, Any] = {
        "outcome": "passed",
        "requirement": "It holds.",
        "measurements": (KL,),
        "modality": case or None,
    }
    return Result(**given | {"id": f"suites/{test}[{place}]", "target": target} | more)


def layered(title: str, linears: int, column: str, value: str = "linear") -> Table:
    """A table with a number per layer and linear."""
    rows = [("language_model", at // 7, LINEARS[at % 7], 0.5 + 0.4999 * at / linears) for at in range(linears)]
    return Table(title, ("tower", "layer", value, column), tuple(rows))


def crowded(linears: int, targets: int) -> Run:
    """A run with four tables per layer, and 36 checks, of every target."""
    titles = ("Error per layer", "Frobenius error per layer", "Clipped weights per layer", "Search gain per layer")
    columns = ("half scales", "relative", "share", "ratio")
    results = []
    for at in range(targets):
        results += [
            about(f"q{at}", "awq", f"test_roundtrip.py::test_{n}", tables=(layered(title, linears, column),))
            for n, (title, column) in enumerate(zip(titles, columns, strict=True))
        ]
        results += [about(f"q{at}", "awq", f"test_parity.py::test_parity_{n}", case="text") for n in range(32)]
    return Run({"started": "2026-11-25T00:00:00+00:00"}, tuple(results))


def tables(
    name: str = "language_model", kernel: str = "marlin", media: Sequence[str] = ("seven.png",)
) -> dict[str, Table]:
    """One table of each kind that a chart is drawn from, by title; ``name``, ``kernel`` and ``media`` are as given."""
    listed = [
        Table("Hidden-state drift", ("layer", "relative"), ((0, 0.0), (1, 0.1), (2, 0.2))),
        Table(
            "KL distribution", ("from nats", "to nats", "tokens"), ((0.0, 1e-6, 5), (1e-6, 1e-5, 20), (1e-5, 1e-4, 3))
        ),
        Table(
            "Worst tokens",
            (
                "sample",
                "token",
                "nats",
                "before",
                "reference says",
                "reference probability",
                "artifact says",
                "artifact probability",
                "media",
            ),
            (
                (
                    f"a red seven {name}",
                    3,
                    0.4,
                    f"It is a {name}",
                    f" seven{name}",
                    0.81,
                    f" one{name}",
                    0.44,
                    "\n".join(media),
                ),
            ),
        ),
        Table(
            "Sensitivity",
            ("tower", "layer", "KL nats", "bytes saved"),
            ((name, 0, 0.001, 9000), (name, 1, 0.004, 9000)),
        ),
        Table(
            "Mixed precision",
            ("step", "kept in 16 bits", "bytes", "KL nats"),
            ((0, "", 1e6, 0.005), (1, f"{name} 1", 1.2e6, 0.001)),
        ),
        Table(
            "Memory by tower",
            ("checkpoint", "tower", "kind", "GB"),
            (
                (f"{name}-fp16", "visual", "16 bits", 1.0),
                (f"{name}-fp16", name, "16 bits", 6.0),
                (f"{name}-awq", "visual", "16 bits", 1.0),
                (f"{name}-awq", name, "codes", 1.5),
            ),
        ),
        Table(
            "Memory in transformers",
            ("checkpoint", "in", "predicted GB", "allocator GB", "reserved GB", "NVML GB"),
            ((f"{name}-awq", "transformers", 2.5, 2.5, 2.6, 3.1),),
        ),
        Table(
            "Throughput",
            ("regime", "kernel", "tokens/s", "of FP16's", "low", "high"),
            (("batch_8", "fp16", 100.0, 1.0, None, None), ("batch_8", kernel, 120.0, 1.2, 1.1, 1.3)),
        ),
        Table(
            "Latency distribution",
            ("regime", "kernel", "latency", "quantile", "ms"),
            tuple(
                ("batch_8", k, which, q, 10 * q + 1)
                for k in ("fp16", kernel)
                for which in ("TTFT", "ITL")
                for q in (0.1, 0.5, 0.99)
            ),
        ),
    ]
    return {table.title: table for table in listed}


def illustrated() -> Run:
    """A run with one of every chart, pictures, sounds and a failure."""
    made = tables()
    drift, sounds = (
        made["Hidden-state drift"],
        (Medium("ref.wav", "audio/wav", wav()), Medium("art.wav", "audio/wav", wav())),
    )
    waves = Table("Waveforms", ("sample", "reference", "artifact"), (("said", "ref.wav", "art.wav"),))
    seven = Medium("seven.png", "image/png", png(), "a red 7")
    spoken = {"tables": (made["KL distribution"], made["Worst tokens"]), "media": (seven,)}

    def one(test: str, case: str = "", **more: Any) -> Result:
        return about("tiny", "awq", test, case, **more)

    beyond = Measurement("mean token KL", 0.3, "nats", Bound("at_most", 0.02), "token 17")
    machine = [
        made[title] for title in ("Memory by tower", "Memory in transformers", "Throughput", "Latency distribution")
    ]
    return Run(
        {"subjects": {"qwen2_5_vl-tiny-awq": {"artifact": {"scheme": "4-bit g128"}}}, "seeds": {"held-out samples": 7}},
        (
            one("test_roundtrip.py::test_rounding", tables=(layered("Error per layer", 28, "half scales"),)),
            one("test_calibration.py::test_gain", tables=(layered("Search gain per layer", 8, "ratio", "group"),)),
            one("test_parity.py::test_hidden_state_drift", "text", tables=(drift,)),
            one("test_parity.py::test_hidden_state_drift", "image", tables=(drift,)),
            one("test_parity.py::test_next_token_distribution", "text", tables=(made["KL distribution"],)),
            one(
                "test_parity.py::test_next_token_distribution",
                "image",
                outcome="failed",
                measurements=(beyond,),
                message="beyond",
                **spoken,
            ),
            one("test_sensitivity.py::test_alone", tables=(made["Sensitivity"], made["Mixed precision"])),
            one("test_speech.py::test_waveform", tables=(waves,), media=sounds),
            one("test_memory.py::test_reduction", tables=tuple(machine)),
            one("test_serving.py::test_alive", outcome="skipped", measurements=(), message="no vLLM: pip install vllm"),
        ),
    )


def evil() -> Run:
    """A run whose every string from outside is an attack."""
    drawn = tables(EVIL, EVIL, [EVIL])
    layers = Table(
        "Error per layer", ("tower", "layer", "linear", EVIL), ((EVIL, EVIL, EVIL, 0.5), (EVIL, 1, "q", 0.7))
    )
    waves = Table("Waveforms", ("sample", "reference", "artifact"), ((EVIL, EVIL, EVIL),))
    long = Table(EVIL, (EVIL, "n"), tuple((EVIL, at) for at in range(50)))
    media = (
        Medium(EVIL, "image/png", png(), EVIL),
        Medium("other", EVIL, png(), EVIL),
        Medium("alone", "audio/wav", wav(), EVIL),
    )
    measured = Measurement(EVIL, 1.0, EVIL, Bound("at_most", 0.5), EVIL)
    facts = {EVIL: EVIL}
    results = [
        Result(
            f"suites/test_parity.py::test_a[{at}{EVIL}]",
            outcome,
            EVIL,
            {"family": EVIL, "size": EVIL, "quantizer": EVIL},
            EVIL,
            (measured,),
            (*drawn.values(), layers, waves, long),
            media,
            EVIL,
        )
        for at, outcome in enumerate(("passed", "failed", "skipped", "xfailed"))
    ]
    machine = dict.fromkeys(("machine", "versions", "deselected", "seeds"), facts)
    return Run({"command": EVIL, "subjects": {EVIL: facts}, "git": {"commit": EVIL, "dirty": True}} | machine, results)
