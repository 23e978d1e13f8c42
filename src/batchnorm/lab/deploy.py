"""Make the winner ready to ship: statistics over the whole training set, normalization folded away, outputs verified."""

import copy
import json
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
from batchnorm.lab.shipping import (
    EXAMPLE_ROWS,
    RECALIBRATION_ROWS,
    ROWS_AT_ONCE,
    Deployed,
    best_folder,
    is_exact,
    onnx_checked,
    quiet_exporter,
    rounding,
    unfolded,
)
from batchnorm.models import adapt
from batchnorm.recalibrate import recalibrate
from batchnorm.torch.evaluation import evaluating

__all__ = ["deploy", "load_model", "save"]


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
    bound = rounding(narrow.numpy(), exact.numpy())
    try:
        done = fold(ready, x[:EXAMPLE_ROWS])
        exact_folded = fold(copy.deepcopy(ready).double(), x[:EXAMPLE_ROWS].double()).model
    except BatchNormError as failure:
        return unfolded(ready, str(failure), bound)
    replaced = as_json(ready, done.model)
    if replaced is None:
        return unfolded(ready, "it has changed the network's structure, which the file can't hold", bound)
    exact_error = (_outputs(exact_folded, x.double()) - exact).abs().max().item() / size
    error = (_outputs(done.model, x).double() - narrow).abs().max().item()
    deployed = Deployed(done.model, *_sentences(ready, done), replaced, error, exact_error, bound)
    if is_exact(deployed):
        return deployed
    return unfolded(ready, f"logits differed by {error:.1e} where rounding allows {bound:.1e}", bound)


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
    header = json.dumps(about | {"replaced": deployed.replaced})
    tensors = {name: tensor.contiguous() for name, tensor in deployed.network.state_dict().items()}
    with best_folder(folder) as partial:
        save_file(tensors, partial / "model.safetensors", {"batchnorm": header})
        return _save_onnx(deployed, partial / "model.onnx", x)


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
    with quiet_exporter():
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
    rows = x[:1024]
    expected = _outputs(deployed.network, torch.from_numpy(rows)).numpy()
    return onnx_checked(path, rows, expected, deployed.bound)


def _outputs(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with evaluating(network):
        return torch.cat([network(part) for part in torch.split(x, 4096)])
