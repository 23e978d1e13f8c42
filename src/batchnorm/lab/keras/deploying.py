"""Make a winner of Keras ready to ship: statistics over the training set, normalization folded away, outputs verified."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from batchnorm.errors import BatchNormError, OptionError, VerificationError
from batchnorm.fold import FoldResult, fold
from batchnorm.keras import files
from batchnorm.keras.internals import in_float64, quietly, told
from batchnorm.keras.naming import names_of
from batchnorm.lab.keras.networks import Network
from batchnorm.lab.keras.watching import logits_of
from batchnorm.lab.shipping import (
    EXAMPLE_ROWS,
    RECALIBRATION_ROWS,
    ROWS_AT_ONCE,
    Deployed,
    Saved,
    best_folder,
    is_exact,
    onnx_checked,
    quiet_exporter,
    rounding,
    unfolded,
)
from batchnorm.models import adapt
from batchnorm.recalibrate import recalibrate

__all__ = ["deploy", "save"]


def deploy(network: Network, x_train: np.ndarray, x_check: np.ndarray) -> Deployed:
    """Recompute the statistics of a trained network over the training rows, fold, and verify on ``x_check``.

    A folded network whose outputs differ by more than rounding is thrown away, and the unfolded one returned with the reason.
    """
    ready = network.copy()
    model = ready.model
    with quietly():
        if any(not one.fixed for one in adapt(model).statistics()):
            rows = x_train[:RECALIBRATION_ROWS]
            parts = [rows[i : i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]
            recalibrate(model, parts, method="sequential", progress=False)
        narrow = logits_of(model, x_check).astype(np.float64)
        bound = rounding(narrow, narrow)
        try:
            done = fold(model, x_check[:EXAMPLE_ROWS])
            exact, exact_folded = _in_float64(model, x_check)
            bound = rounding(narrow, exact)
        except BatchNormError as failure:
            return unfolded(ready.finished(), str(failure), bound)
        error = float(np.abs(logits_of(done.model, x_check) - narrow).max())
    size = max(1.0, float(np.abs(exact).max()))
    exact_error = float(np.abs(exact_folded - exact).max()) / size
    folded, kept = _sentences(model, done)
    shipped = done.model if ready.put_back is None else ready.put_back(done.model)
    deployed = Deployed(shipped, folded, kept, {}, error, exact_error, bound)
    if is_exact(deployed):
        return deployed
    return unfolded(ready.finished(), f"logits differed by {error:.1e} where rounding allows {bound:.1e}", bound)


def _in_float64(model: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of a model in float64, and those of it folded in float64, so that no weight is rounded.

    Raises:
        OptionError: it does not run in float64.
    """
    wide = adapt(model).cast("float64")
    if wide is None:
        raise OptionError("the model must run in float64 to be compared, and a layer of it does not")
    rows = x.astype(np.float64)
    with in_float64(True):
        folded = adapt(fold(wide.model, rows[:EXAMPLE_ROWS]).model)
        return _outputs(wide, rows), _outputs(folded, rows)


def _outputs(view: Any, x: np.ndarray) -> np.ndarray:
    return np.concatenate([view.outputs([x[i : i + ROWS_AT_ONCE]])[0] for i in range(0, len(x), ROWS_AT_ONCE)])


def _sentences(model: Any, done: FoldResult) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what was folded and what was kept, with the class of each layer."""
    layers = {name: layer for layer, name in names_of(model).items()}
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    folded = [f"{f.layer} ({kinds.get(f.layer, 'norm')}) {f.how} into {', '.join(f.into)}" for f in done.folded]
    kept = [f"{k.layer} ({kinds.get(k.layer, 'norm')}) became {k.became}: {k.reason}" for k in done.kept]
    by_row = "its statistics are those of each row, so it is no fixed map"
    own = keras.layers.LayerNormalization | keras.layers.GroupNormalization
    kept += [f"{name} ({kinds[name]}): {by_row}" for name, layer in layers.items() if isinstance(layer, own)]
    return tuple(folded), tuple(kept)


def save(deployed: Deployed, folder: Path, x: np.ndarray) -> Saved:
    """Save ``model.keras``, read it again and compare; and ``model.onnx`` where the backend can write it; all or nothing.

    Where a class of the user's can't be written or read again, its weights are saved alone.

    Args:
        deployed: what to save.
        folder: made anew; an older one is replaced at the end.
        x: rows to check the files on, channels last.

    Raises:
        VerificationError: what was read computes something else.
    """
    rows = x[:ROWS_AT_ONCE]
    expected = logits_of(deployed.network, rows)
    with best_folder(folder) as partial:
        first, why = _save_keras(deployed, partial, rows, expected)
        path = partial / "model.onnx"
        try:
            _export(deployed.network, path)
        except Exception as failure:
            path.unlink(missing_ok=True)
            backend = keras.backend.backend()
            why += f"model.onnx is left out, Keras does not write it on the backend {backend} here: {told(failure)}. "
            return Saved((first,), left_out=why.strip())
        return Saved((first, path.name), onnx_checked(path, rows, expected, deployed.bound), why.strip())


def _save_keras(deployed: Deployed, folder: Path, rows: np.ndarray, expected: np.ndarray) -> tuple[str, str]:
    """Return the name of the file that was written, and what was left out."""
    path, weights = folder / "model.keras", folder / "model.weights.h5"
    try:
        files.save(deployed.network, path)
        read = files.load(path)
    except OSError:
        raise
    except Exception as failure:
        path.unlink(missing_ok=True)
        with quietly():
            deployed.network.save_weights(weights)
        return weights.name, f"model.keras is left out, only the weights are saved: {told(failure)}. "
    error = float(np.abs(logits_of(read, rows) - expected).max())
    if not error <= deployed.bound:
        raise VerificationError(f"{path.name} must agree within {deployed.bound:.1e}, it differs by {error:.1e}")
    return path.name, ""


def _export(model: Any, path: Path) -> None:
    with quiet_exporter():
        model.export(str(path), format="onnx", verbose=False)
