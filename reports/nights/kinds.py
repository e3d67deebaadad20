"""What makes two nights comparable: the kind of machine, the versions that matter, and the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reports.escape import inline
from reports.nights.series import Kind

# What a number depends on. Another pytest measures the same, and a package that a later version lists as well must not
# end every history.
_VERSIONS = (
    "python",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "vllm",
    "bitsandbytes",
    "autoawq",
    "gptqmodel",
    "numpy",
)
_ARTIFACT = "_artifact"  # ends the target of an artifact that was given, not made


def kind_of(about: Mapping[str, Any]) -> Kind:
    """The kind of a run: its GPUs and their driver, or, without any, its CPU and cores; and its versions.

    Over how many GPUs its engines spread, too, where that is not one: their figures have the same names.
    """
    machine = _mapping(about.get("machine"))
    names = ("gpu", "driver") if machine.get("gpu") else ("cpu", "cores")
    engines = _mapping(_mapping(about.get("subjects")).get("engines"))
    spread = {"engines": engines["spread"]} if engines.get("spread") else {}
    versions = _mapping(about.get("versions"))
    return Kind(_chosen({**machine, **spread}, (*names, *spread)), _chosen(versions, _VERSIONS))


def on_gpu(kind: Kind) -> bool:
    """Whether the machine had a GPU."""
    return any(name == "gpu" for name, _ in kind.machine)


def machine_words(kind: Kind) -> str:
    """The machine as a person says it: ``NVIDIA H200, NVIDIA H200, driver 580.159.04``."""
    said = [value if name in ("gpu", "cpu") else f"{name} {value}" for name, value in kind.machine]
    return ", ".join(said) or "an unnamed machine"


def version_words(kind: Kind) -> str:
    """The versions in one line: ``python 3.12.3, torch 2.11.0``."""
    return ", ".join(f"{name} {value}" for name, value in kind.versions) or "unnamed versions"


def differences(before: Kind, after: Kind) -> list[str]:
    """What sets two kinds apart, a line each: ``torch 2.11.0 -> 2.12.0``."""
    pairs = ((before.machine, after.machine), (before.versions, after.versions))
    found = []
    for old, new in ((dict(a), dict(b)) for a, b in pairs):
        names = dict.fromkeys((*old, *new))
        found += [f"{n} {old.get(n, 'none')} -> {new.get(n, 'none')}" for n in names if old.get(n) != new.get(n)]
    return found


def subjects_of(about: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Per target, the digests of what was checked: ``{"reference": ..., "artifact": ...}``, as far as they are told."""
    found = {}
    for target, said in _mapping(about.get("subjects")).items():
        digests = {part: str(told["sha256"]) for part, told in _parts(said) if told.get("sha256")}
        if digests:
            found[str(target)] = digests
    return found


def identity(target: str, digests: Mapping[str, str]) -> str:
    """What must stay the same for a target's numbers to be the same quantities.

    That is the reference. An artifact that the suites made themselves is what is being judged: a quantizer that writes
    other bytes is news. One that a user gave is another checkpoint when its bytes are others.
    """
    parts = ("reference", "artifact") if target.endswith(_ARTIFACT) else ("reference",)
    return " ".join(digests.get(part, "") for part in parts).strip()


def to_json(kind: Kind) -> dict[str, dict[str, str]]:
    """A kind as plain JSON."""
    return {"machine": dict(kind.machine), "versions": dict(kind.versions)}


def from_json(data: Mapping[str, Any]) -> Kind:
    """The kind that ``to_json`` wrote.

    Raises:
        KeyError, TypeError, ValueError: when it is none.
    """
    machine, versions = data["machine"], data["versions"]
    if not all(isinstance(text, str) for part in (machine, versions) for item in part.items() for text in item):
        raise TypeError("a kind of machine of other things than texts")
    return Kind(tuple(machine.items()), tuple(versions.items()))


def key_text(kind: Kind) -> str:
    """A kind as one text that only equal kinds share."""
    return json.dumps(to_json(kind))


def _chosen(told: Mapping[str, Any], names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Those of ``names`` that something is told of, as one-line texts: they come from a file of anybody's."""
    return tuple((name, inline(told[name])) for name in names if told.get(name) is not None)


def _parts(said: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part, told in _mapping(said).items():
        if isinstance(told, Mapping):
            yield str(part), told


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
