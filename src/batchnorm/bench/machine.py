"""Describe the machine that a measurement was made on."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

__all__ = ["caches", "describe", "keep"]

_PACKAGES = (
    "batchnorm", "torch", "torchvision", "numba", "keras", "jax", "tensorflow", "numpy", "scikit-learn", "joblib",
    "onnxruntime",
)  # fmt: skip
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, Any]:
    """Return processor, cores, caches, memory, load and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def caches() -> dict[str, int]:
    """Return the bytes of the caches that the first core reaches, as ``{"L1": …, "L2": …}``; none where nobody tells."""
    found: dict[str, int] = {}
    for index in sorted(_CACHES.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)
    return found


def keep(facts: dict[str, Any], out: Path, name: str) -> Path:
    """Write what was measured as ``name`` in the folder ``out``, and return the file."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / name
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return file


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
