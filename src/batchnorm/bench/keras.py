"""Keras's layer and ours beside each other, on every backend that is installed: each part is a process of its own on each."""

import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchnorm.bench.machine import describe, keep
from batchnorm.errors import OptionError, WorkerError

__all__ = ["PARTS", "KerasBench", "run"]

BACKENDS = ("torch", "jax", "tensorflow")
# each is a module with `measure`, which runs on one backend, and `shown`, a table of what was found on all
PARTS = {
    "variance": "batchnorm.bench.keras_variance",
    "fit": "batchnorm.bench.keras_fit",
    "applications": "batchnorm.bench.keras_applications",
}


@dataclass(frozen=True)
class KerasBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        tables = [import_module(PARTS[part]).shown(facts["found"]) for part, facts in self.facts.items()]
        return "\n\n".join([*tables, f"raw values: {', '.join(map(str, self.files))}"])


def run(out: Path, *parts: str, quick: bool = False) -> KerasBench:
    """Measure some parts (all where none is named), and keep every raw value as JSON in ``out``.

    Raises:
        OptionError: an unknown part, or no backend of Keras.
        WorkerError: a process failed.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise OptionError(f"the parts of bench keras are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    backends = [name for name in BACKENDS if find_spec(name) is not None]
    if not backends or find_spec("keras") is None:
        raise OptionError(f"bench keras needs keras and one of {', '.join(BACKENDS)}, none is installed")
    facts: dict[str, Any] = {}
    files = []
    for part in parts or PARTS:
        facts[part] = {
            "machine": describe(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(),
            "found": {backend: _on(backend, part, quick) for backend in backends},
        }
        files.append(keep(facts[part], out, f"keras_{part}.json"))
    return KerasBench(facts, tuple(files))


def _on(backend: str, part: str, quick: bool) -> Any:
    """Run a part in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, part, *(["--quick"] if quick else [])]
    done = subprocess.run(  # noqa: S603 - this interpreter
        command, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkerError(f"bench keras {part} failed on the backend {backend}: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{part} on {found['ran']}", flush=True)  # noqa: T201
    return found


def _main(part: str, *, quick: bool) -> None:
    import keras

    name = keras.backend.backend()
    library = import_module(name)
    found = import_module(PARTS[part]).measure(quick)
    ran = f"{name} {library.__version__}, Keras {keras.__version__}"
    print(json.dumps({"ran": ran, **found}), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main(sys.argv[1], quick="--quick" in sys.argv)
