"""A strict reading of systemd's unit files: sections and keys that a service and a timer of ours may have."""

from __future__ import annotations

import re

_UNIT = {"Description", "Documentation"}
_SERVICE = {
    "Type", "User", "Environment", "EnvironmentFile", "WorkingDirectory", "ExecStart", "TimeoutStartSec", "KillMode",
    "NoNewPrivileges", "PrivateTmp", "ProtectSystem", "ProtectControlGroups", "ProtectKernelModules",
    "ProtectKernelTunables", "ReadWritePaths", "RestrictSUIDSGID",
}  # fmt: skip
_TIMER = {"OnCalendar", "Persistent", "AccuracySec", "RandomizedDelaySec", "Unit"}
_KNOWN = {  # of systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5) and systemd.timer(5)
    ".service": {"Unit": _UNIT, "Service": _SERVICE},
    ".timer": {"Unit": _UNIT, "Timer": _TIMER, "Install": {"WantedBy"}},
}
_NEEDED = {".service": ("Service", "ExecStart"), ".timer": ("Timer", "OnCalendar")}


def settings(text: str) -> list[tuple[str, str, str]]:
    """(section, key, value) of every line that is none of blank, comment and section; the rest has an empty key."""
    found, section = [], ""
    for line in text.splitlines():
        if not line.strip() or line[0] in "#;":
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header.group(1)
            continue
        key, sign, value = line.partition("=")
        found.append((section, key if sign and key == key.strip() else "", value.strip() if sign else line))
    return found


def wrong_unit(text: str, suffix: str) -> list[str]:
    """What systemd would ignore or refuse in a unit file of that kind, ``.service`` or ``.timer``."""
    known = _KNOWN[suffix]
    given = settings(text)
    wrong = [f"[{s}] {key or value}: unknown" for s, key, value in given if key not in known.get(s, ())]
    wrong += [f"{key}= is empty" for _, key, value in given if not value]
    if not any((section, key) == _NEEDED[suffix] for section, key, _ in given):
        wrong.append(f"no {_NEEDED[suffix][1]}=")
    return wrong


def setting(text: str, key: str) -> str:
    """The value of a key that is there once.

    Raises:
        ValueError: when it is there never or twice.
    """
    (value,) = [value for _, name, value in settings(text) if name == key]
    return value


def environment(text: str) -> dict[str, str]:
    """The variables that a service sets; values of ours have no blanks."""
    pairs = [pair for _, key, value in settings(text) if key == "Environment" for pair in value.split()]
    return dict(pair.split("=", 1) for pair in pairs)
