"""What prompts showed and what was said, beside the numbers: worst tokens in context, pictures, sounds, waveforms."""

from __future__ import annotations

import base64
import io
import math
import sys
import wave
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fixtures.core.measurement import readable
from fixtures.core.results import Medium, Result
from reports import verdict
from reports.charts import number, records

SHOWN = ("image/png", "image/webp", "image/jpeg", "audio/wav")  # types that a page shows; none of them can run anything
_COLUMNS = 600  # of a drawn waveform


@dataclass(frozen=True)
class Shown:
    """A medium as it stands in a page; without an address it had no room there."""

    name: str
    caption: str
    picture: bool
    address: str  # data:, or empty

    @property
    def alternative(self) -> str:
        """What it is, for those who do not see or hear it."""
        return self.caption or self.name


@dataclass(frozen=True)
class Sample:
    """A prompt with its worst tokens, as their table has them."""

    name: str
    media: tuple[Shown, ...]
    tokens: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Sound:
    """A waveform drawn: a path in a box of 600 by 100, or None where the file cannot be read."""

    whose: str
    medium: Shown
    path: str | None
    says: str


@dataclass(frozen=True)
class Voices:
    """The reference's sound and the artifact's, of one prompt."""

    name: str
    sounds: tuple[Sound, ...]


def worst_tokens(result: Result, kept: Collection[int]) -> list[Sample]:
    """The tokens that differ most, by the prompt that they answer; a medium is shown once, with its prompt."""
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, row in records([result], "Worst tokens", "sample", "token", "nats"):
        samples.setdefault((str(row["sample"]), str(row.get("media") or "")), []).append(row)
    media = {medium.name: medium for medium in result.media}
    return [
        Sample(
            name,
            tuple(shown(media[one], kept) for one in dict.fromkeys(named.split("\n")) if one in media),
            tuple(sorted(rows, key=lambda row: -_nats(row))),
        )
        for (name, named), rows in samples.items()
    ]


def _nats(row: Mapping[str, Any]) -> float:
    """What is no number is the worst."""
    found = number(row["nats"])
    return math.inf if found is None else found


def voices(result: Result, kept: Collection[int]) -> list[Voices]:
    """Both waveforms of every prompt that the table ``Waveforms`` names."""
    media = {medium.name: medium for medium in result.media}
    return [
        Voices(
            str(row["sample"]),
            tuple(_sound(whose, media[row[whose]], kept) for whose in ("reference", "artifact") if row[whose] in media),
        )
        for _, row in records([result], "Waveforms", "sample", "reference", "artifact")
    ]


def others(result: Result, kept: Collection[int]) -> list[Shown]:
    """Media that no table of the result puts beside a number."""
    named = {
        name
        for table in result.tables
        if table.title in ("Worst tokens", "Waveforms")
        for row in table.rows
        for cell in row
        for name in str(cell).split("\n")
    }
    return [shown(medium, kept) for medium in result.media if medium.name not in named]


def shown(medium: Medium, kept: Collection[int]) -> Shown:
    """A medium as the page has it: inlined if it is of a type that pages show and among those ``kept``."""
    fits = medium.type in SHOWN and id(medium) in kept
    address = f"data:{medium.type};base64,{base64.b64encode(medium.data).decode()}" if fits else ""
    return Shown(medium.name, medium.caption, medium.type.startswith("image/"), address)


def with_room(results: Iterable[Result], room: int) -> frozenset[int]:
    """The ids of the media that fit into ``room`` bytes of a page: those of checks that did not pass come first."""
    kept = set()
    for result in sorted(results, key=lambda r: verdict.badness(verdict.standing(r))):
        for medium in result.media:
            size = 4 * (len(medium.data) + 2) // 3 + 600  # base64, and the words around it
            if medium.type in SHOWN and size <= room:
                kept.add(id(medium))
                room -= size
    return frozenset(kept)


def _sound(whose: str, medium: Medium, kept: Collection[int]) -> Sound:
    found = _samples(medium.data)
    if found is None:
        return Sound(whose, shown(medium, kept), None, f"{whose}: no waveform can be drawn of this file")
    heard, rate = found
    peak = max(map(abs, heard), default=0) / 32768
    says = f"{whose}: {readable(round(len(heard) / rate, 2))} s, loudest {peak:.0%} of full scale"
    return Sound(whose, shown(medium, kept), _path(heard), says)


def _samples(data: bytes) -> tuple[array[int], int] | None:
    """The first channel of a WAV file of 16 bits, and its rate in Hz; None for any other."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2 or not file.getframerate():
                return None
            channels, rate = file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return None
    heard = array("h", raw[: len(raw) // 2 * 2])
    if sys.byteorder == "big":
        heard.byteswap()
    return heard[::channels], rate


def _path(heard: Sequence[int]) -> str:
    """The envelope as an SVG path: per column a stroke from the lowest to the highest value in it."""
    count = min(_COLUMNS, len(heard))
    edges = [at * len(heard) // count for at in range(count + 1)] if count else []
    strokes = []
    for column, (start, end) in enumerate(pairwise(edges)):
        low, high = min(heard[start:end]), max(heard[start:end])
        strokes.append(f"M{column * _COLUMNS // count} {50 - high * 50 // 32768}V{51 - low * 50 // 32768}")
    return "".join(strokes)
