"""What ran where: the machine, the versions and the commit that a result depends on."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any

_PACKAGES = (
    "pytest",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "vllm",
    "bitsandbytes",
    "autoawq",
    "gptqmodel",
    "llmcompressor",
    "numpy",
)


def machine() -> dict[str, Any]:
    """The machine: platform, CPU, memory, and GPUs where NVML sees any."""
    about = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
    }
    return {key: value for key, value in about.items() if value} | _gpus()


def versions() -> dict[str, str | None]:
    """Python and the packages that a verdict may depend on; None for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def git(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout around ``folder`` and whether files differ from it; None outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # not POSIX, or a name that it does not know
        return ""


def _gpus() -> dict[str, Any]:
    """Names of the GPUs that CUDA_VISIBLE_DEVICES leaves, and their driver.

    No GPU, no driver and no NVML are all ordinary: then nothing.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # an absent module, library or driver each raise their own
        return {}
    try:
        handles = [_handle(nvml, name) for name in _visible(nvml.nvmlDeviceGetCount())]
        names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        memory = [f"{nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30:.1f} GiB" for handle in handles]
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()
    return {"gpu": ", ".join(names), "gpu memory": ", ".join(memory), "driver": driver} if names else {}


def _text(value: str | bytes) -> str:
    """Old releases of pynvml answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _visible(count: int) -> list[str]:
    """The visible GPUs by number or UUID; an empty variable hides all, a number that there is not all that follow."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in given.split(",")]
    return list(takewhile(lambda name: name and not (name.isdecimal() and int(name) >= count) and name != "-1", names))


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
