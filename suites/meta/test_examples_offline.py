"""A runner without a network: what is packed is what it can install, and nothing else is asked of anybody."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from suites.meta.example_files import EXAMPLES, read
from suites.meta.wheels import wheel

PACK = EXAMPLES / "offline/pack.sh"
Pack = Callable[..., tuple[int, str]]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Where the packing machine finds packages: ``tox`` of two versions, which needs ``part``, built for two glibcs."""
    folder = tmp_path / "index"
    machine = platform.machine()
    wheel(folder, "tox", "4.30", "py3-none-any", "part")
    wheel(folder, "tox", "5.0", "py3-none-any", "part")
    for version, glibc in (("1.0", "2_17"), ("2.0", "2_31"), ("3.0", "2_34")):
        wheel(folder, "part", version, f"py3-none-manylinux_{glibc}_{machine}")
    (tmp_path / "constraints.txt").write_text("tox==4.30\n")
    return folder


@pytest.fixture
def pack(index: Path, tmp_path: Path) -> Pack:
    """Run pack.sh; its exit code and words."""

    def run(*words: str, **variables: str) -> tuple[int, str]:
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        given = {"PYTHON": sys.executable, "CONSTRAINTS": "constraints.txt", "PIP_NO_INDEX": "1"}
        given |= {"PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull, **variables}
        done = subprocess.run([PACK, *words], cwd=tmp_path, env={**quiet, **given}, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def names(folder: Path) -> set[str]:
    """Packages of a folder of wheels, with their versions."""
    return {"-".join(file.name.split("-")[:2]) for file in folder.glob("*.whl")}


def test_pack(pack: Pack, tmp_path: Path) -> None:
    """What is asked for is packed with all that it needs, at the pinned versions, for the runner's glibc."""
    code, said = pack("--glibc", "2.31", "carry/wheels", "tox")
    assert code == 0, said
    assert names(tmp_path / "carry/wheels") == {"tox-4.30", "part-2.0"}
    assert said.splitlines()[-1].startswith("2 wheels in carry/wheels")
    assert pack("--glibc", "2.17", "older", "tox")[0] == 0
    assert names(tmp_path / "older") == {"tox-4.30", "part-1.0"}


def test_pack_again(pack: Pack, index: Path, tmp_path: Path) -> None:
    """What was packed is not fetched twice, and what is new is added to the sums."""
    assert pack("wheels", "tox")[0] == 0
    wheel(index, "more", "1.0")
    assert pack("wheels", "tox", "more")[0] == 0
    assert {"tox-4.30", "more-1.0"} <= names(tmp_path / "wheels")
    sums = (tmp_path / "wheels/SHA256SUMS").read_text()
    assert sums.count(".whl") == len(list((tmp_path / "wheels").glob("*.whl")))


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "say where to"),
        (["--help"], {}, "say where to"),
        (["--glibc", "musl", "out"], {}, "--glibc wants a version such as 2.31, not 'musl'"),
        (["--glibc"], {}, "--glibc wants a version"),
        (["out"], {"PYTHON": "python9.9"}, "there is no python9.9 here"),
        (["out"], {"CONSTRAINTS": "none.txt"}, "there is no none.txt here"),
    ],
)
def test_pack_mistake(pack: Pack, words: list[str], variables: dict[str, str], said: str, tmp_path: Path) -> None:
    """A mistake costs one line and exit code 2, and nothing is written."""
    code, told = pack(*words, **variables)
    assert code == 2
    assert told.startswith("pack.sh: ")
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pack_of_what_is_not_there(pack: Pack, tmp_path: Path) -> None:
    """A package that is not to be had is named, and no sums claim that all is packed."""
    code, said = pack("out", "absent")
    assert code != 0
    assert "absent" in said
    assert not (tmp_path / "out/SHA256SUMS").exists()


def test_on_the_runner(pack: Pack, tmp_path: Path) -> None:
    """The README's lines, word for word: a tox of the wheels alone, a checkout that a newer bundle moves."""
    assert pack("carry/wheels", "tox")[0] == 0
    (bundle,) = re.findall(r"^git (bundle create \S+ .*?) +#", read("offline/README.md"), re.MULTILINE)
    bundled = bundle.replace("carry/", "../carry/")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", tmp_path / "project"]
    (tmp_path / "project").mkdir()
    for words in ("init -q -b main", "commit -q --allow-empty -m start", bundled):
        subprocess.run([*git, *words.split()], check=True, capture_output=True)
    done = on_the_runner(tmp_path)
    assert done.returncode == 0, done.stderr
    tox = subprocess.run([tmp_path / "machine/tools/bin/tox"], capture_output=True, text=True, check=True)
    assert tox.stdout == "4.30\n"
    for words in ("commit -q --allow-empty -m newer", bundled):
        subprocess.run([*git, *words.split()], check=True, capture_output=True)
    shutil.copy(tmp_path / "carry/quantproof.bundle", tmp_path / "machine")
    there = ["git", "-C", tmp_path / "machine/checkout"]
    subprocess.run([*there, "pull", "--quiet", "--ff-only"], check=True)  # as night.sh does
    said = subprocess.run([*there, "log", "-1", "--format=%s"], capture_output=True, text=True, check=True)
    assert said.stdout == "newer\n"


def test_damaged_on_the_way(pack: Pack, tmp_path: Path) -> None:
    """A wheel that was damaged on the way is named before anything is installed."""
    assert pack("carry/wheels", "tox")[0] == 0
    (damaged,) = (tmp_path / "carry/wheels").glob("part-*.whl")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = on_the_runner(tmp_path)
    assert done.returncode != 0
    assert f"{damaged.name}: FAILED" in done.stdout
    assert not (tmp_path / "machine/tools").exists()


def on_the_runner(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the README's block for the runner in ``folder``, its machine a folder there, its Python ours."""
    _, block = re.findall(r"```bash\n(.*?)```", read("offline/README.md"), re.DOTALL)[:2]
    (folder / "machine").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin/python3.12").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "bin/python3.12").chmod(0o755)
    variables = {"PATH": f"{folder}/bin:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "HOME": str(folder)}
    script = block.replace("/srv/quantproof", str(folder / "machine"))
    return subprocess.run(["bash", "-euc", script], cwd=folder, env=variables, capture_output=True, text=True)
