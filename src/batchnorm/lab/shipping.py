"""What every framework's winner goes through: a proof, a folder that is whole or not there, a run in onnxruntime."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import VerificationError

__all__ = ["Deployed", "Saved", "best_folder", "is_exact", "onnx_checked", "quiet_exporter", "rounding", "unfolded"]

RECALIBRATION_ROWS = 10_000
EXAMPLE_ROWS, ROWS_AT_ONCE = 64, 1024
EXACT_BOUND = 1e-10


@dataclass(frozen=True)
class Deployed:
    """A network without the normalization that could be folded away.

    Args:
        network: in evaluation, from raw rows to logits; a network of Keras ends as it was made, in softmax or in logits.
        folded: what went where, a sentence each.
        kept: what could not be folded, and why, a sentence each.
        replaced: what stands in the place of folded modules of torch, by name; see `batchnorm.lab.replaced`.
        error: largest absolute difference of the logits between folded and unfolded, in float32.
        exact_error: the same in float64, relative to the largest logit.
        bound: what ``error`` was held against.
    """

    network: Any
    folded: tuple[str, ...]
    kept: tuple[str, ...]
    replaced: dict[str, dict[str, Any]]
    error: float
    exact_error: float
    bound: float


@dataclass(frozen=True)
class Saved:
    """What was written.

    Args:
        files: names in the folder.
        onnx: operators and error of the ONNX model; empty where there is none.
        left_out: a file that could not be written, and why; empty where all were.
    """

    files: tuple[str, ...] = ()
    onnx: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""


def rounding(narrow: np.ndarray, exact: np.ndarray) -> float:
    """Return how far folding may move logits: what float32 does to them, with room for another order of the same sums."""
    size = max(1.0, float(np.abs(exact).max()))
    return 16 * max(float(np.abs(narrow - exact).max()), float(np.finfo(np.float32).eps) * size)


def is_exact(deployed: Deployed) -> bool:
    """Whether folding has changed nothing but roundings."""
    return deployed.exact_error <= EXACT_BOUND and deployed.error <= deployed.bound


def unfolded(network: Any, reason: str, bound: float) -> Deployed:
    """Return a network as it is, and say why it was not folded."""
    return Deployed(network, (), (f"folding was undone: {reason}",), {}, 0.0, 0.0, bound)


@contextmanager
def best_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``folder`` when all was written; an older one is replaced at the end."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def onnx_checked(path: Path, rows: np.ndarray, expected: np.ndarray, bound: float) -> dict[str, Any]:
    """Run an ONNX model in onnxruntime and return its operators and the largest difference of its outputs.

    Raises:
        VerificationError: the outputs differ by more than rounding.
    """
    import onnx

    # its telemetry starts with the import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    graph = onnx.load(str(path))
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: rows})[0]
    error = float(np.abs(outputs - expected).max())
    if not error <= bound:
        raise VerificationError(f"onnxruntime must agree within {bound:.1e}, its logits differ by {error:.1e}")
    operators = [node.op_type for node in graph.graph.node]
    return {"operators": operators, "norms": operators.count("BatchNormalization"), "error": error}


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's remarks about libraries that this project does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
