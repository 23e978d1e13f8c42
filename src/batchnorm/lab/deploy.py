"""Make the winner ready to ship: statistics over the whole training set, normalization folded away, outputs verified."""

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from batchnorm.errors import BatchNormError, DataError, VerificationError
from batchnorm.fold import FoldResult, fold
from batchnorm.lab.arms import Arm
from batchnorm.lab.networks import build
from batchnorm.lab.replaced import as_json, replace
from batchnorm.models import adapt
from batchnorm.recalibrate import recalibrate
from batchnorm.torch.evaluation import evaluating

__all__ = ["Deployed", "deploy", "load_model", "save"]

RECALIBRATION_ROWS = 10_000
EXAMPLE_ROWS, ROWS_AT_ONCE = 64, 1024
EXACT_BOUND = 1e-10


@dataclass(frozen=True)
class Deployed:
    """A network without the normalization that could be folded away.

    Args:
        network: in evaluation mode, from raw rows to logits.
        folded: what went where, a sentence each.
        kept: what could not be folded, and why, a sentence each.
        replaced: what stands in the place of folded modules, by name; see `batchnorm.lab.replaced`.
        error: largest absolute difference of the logits between folded and unfolded, in float32.
        exact_error: the same in float64, relative to the largest logit.
        bound: what ``error`` was held against.
    """

    network: nn.Module
    folded: tuple[str, ...]
    kept: tuple[str, ...]
    replaced: dict[str, dict[str, Any]]
    error: float
    exact_error: float
    bound: float


def deploy(network: nn.Module, x_train: np.ndarray, x_check: np.ndarray) -> Deployed:
    """Recompute the statistics of a trained network over the training rows, fold, and verify on ``x_check``.

    A folded network whose outputs differ by more than rounding is thrown away, and the unfolded one returned with the reason.
    """
    ready = copy.deepcopy(network).eval()
    if any(not one.fixed for one in adapt(ready).statistics()):
        rows = torch.from_numpy(x_train[:RECALIBRATION_ROWS])
        recalibrate(ready, torch.split(rows, ROWS_AT_ONCE), method="sequential", progress=False)
    x = torch.from_numpy(x_check)
    exact = _outputs(copy.deepcopy(ready).double(), x.double())
    narrow = _outputs(ready, x).double()
    size = max(1.0, exact.abs().max().item())
    # what rounding does to the unfolded network, with room for another order of the same sums
    bound = 16 * max((narrow - exact).abs().max().item(), torch.finfo(torch.float32).eps * size)
    try:
        done = fold(ready, x[:EXAMPLE_ROWS])
        exact_folded = fold(copy.deepcopy(ready).double(), x[:EXAMPLE_ROWS].double()).model
    except BatchNormError as failure:
        return _unfolded(ready, str(failure), bound)
    replaced = as_json(ready, done.model)
    if replaced is None:
        return _unfolded(ready, "it has changed the network's structure, which the file can't hold", bound)
    exact_error = (_outputs(exact_folded, x.double()) - exact).abs().max().item() / size
    error = (_outputs(done.model, x).double() - narrow).abs().max().item()
    if exact_error <= EXACT_BOUND and error <= bound:
        return Deployed(done.model, *_sentences(ready, done), replaced, error, exact_error, bound)
    return _unfolded(ready, f"logits differed by {error:.1e} where rounding allows {bound:.1e}", bound)


def _unfolded(network: nn.Module, reason: str, bound: float) -> Deployed:
    return Deployed(network, (), (f"folding was undone: {reason}",), {}, 0.0, 0.0, bound)


def _sentences(network: nn.Module, done: FoldResult) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what was folded and what was kept, with the class of each layer."""
    modules = dict(network.named_modules())
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    folded = [f"{f.layer} ({kinds.get(f.layer, 'norm')}) {f.how} into {', '.join(f.into)}" for f in done.folded]
    kept = [f"{k.layer} ({kinds.get(k.layer, 'norm')}) became {k.became}: {k.reason}" for k in done.kept]
    by_row = "its statistics are those of each row, so it is no fixed map"
    kept += [f"{n} ({kinds[n]}): {by_row}" for n, m in modules.items() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
    return tuple(folded), tuple(kept)


def save(deployed: Deployed, folder: Path, x: np.ndarray, about: dict[str, Any]) -> dict[str, Any]:
    """Save ``model.safetensors`` and ``model.onnx``, the latter checked in onnxruntime, all or nothing.

    Args:
        deployed: what to save.
        folder: made anew; an older one is replaced at the end.
        x: rows to check the ONNX model on.
        about: JSON values that `load_model` needs, kept in the header of the safetensors file.

    Returns:
        The operators of the ONNX graph and the largest difference of its logits.

    Raises:
        VerificationError: onnxruntime's outputs differ by more than rounding.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    header = json.dumps(about | {"replaced": deployed.replaced})
    tensors = {name: tensor.contiguous() for name, tensor in deployed.network.state_dict().items()}
    save_file(tensors, partial / "model.safetensors", {"batchnorm": header})
    onnx = _save_onnx(deployed, partial / "model.onnx", x)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return onnx


def load_model(path: str | Path) -> nn.Module:
    """Load a network that a comparison saved, folded and in evaluation mode; nothing is unpickled.

    Args:
        path: a ``model.safetensors`` of `compare`.

    Raises:
        DataError: not such a file.

    Example:
        >>> load_model("comparison/best/model.safetensors")  # doctest: +SKIP
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["batchnorm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} must be a model.safetensors that a comparison saved: {error}") from error
    shape = tuple(about["shape"])
    network = build(
        about["model"], shape, len(about["classes"]), Arm.from_dict(about["arm"]), 0, torch.zeros(2, *shape)
    )
    replace(network, about["replaced"], tensors)
    network.load_state_dict(tensors)
    return network.eval()


def _save_onnx(deployed: Deployed, path: Path, x: np.ndarray) -> dict[str, Any]:
    import onnx

    # its telemetry starts with the import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    with _quiet_exporter():
        program = torch.onnx.export(
            deployed.network,
            (torch.from_numpy(x[:2]),),
            dynamo=True,
            verbose=False,
            input_names=["x"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    if program is None:
        raise VerificationError("the ONNX exporter must return a program, it returned none")
    program.save(str(path))
    graph = onnx.load(str(path))
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = x[:1024]
    expected = _outputs(deployed.network, torch.from_numpy(rows)).numpy()
    error = float(np.abs(session.run(None, {"x": rows})[0] - expected).max())
    if not error <= deployed.bound:
        raise VerificationError(f"onnxruntime must agree within {deployed.bound:.1e}, its logits differ by {error:.1e}")
    operators = [node.op_type for node in graph.graph.node]
    return {"operators": operators, "norms": operators.count("BatchNormalization"), "error": error}


def _outputs(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with evaluating(network):
        return torch.cat([network(part) for part in torch.split(x, 4096)])


@contextmanager
def _quiet_exporter() -> Iterator[None]:
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
