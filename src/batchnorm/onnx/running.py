"""Run an ONNX model: by onnxruntime without its own rewriting, or by the reference evaluator."""

import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from batchnorm.errors import OptionError
from batchnorm.onnx.files import LIMIT, weight_bytes
from batchnorm.onnx.shapes import asked
from batchnorm.onnx.tensors import FLOATS

__all__ = ["Runner"]

_Run = Callable[[dict[str, np.ndarray]], list[Any]]


class Runner:
    """A model, ready to run.

    Args:
        model: an ``onnx.ModelProto``.
        evaluated: whether the reference evaluator comes first, as for float64, in which onnxruntime has few operators.
    """

    def __init__(self, model: Any, *, evaluated: bool) -> None:
        self.model = model
        self.makers: list[Callable[[Any], _Run]] = [_session, _evaluator]
        if evaluated:
            self.makers.reverse()
        self.run: _Run | None = None

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs, flattened to one list of arrays: see `outputs`."""
        return _flat(self.outputs(arrays))

    def outputs(self, arrays: dict[str, np.ndarray]) -> list[Any]:
        """Return what the model puts out, as its runtime says it.

        Raises:
            OptionError: neither way can run the model on these inputs.
        """
        arrays = {value.name: _typed(arrays[value.name], value) for value in asked(self.model)}
        reasons: list[str] = []
        while self.run is None:
            run = None
            try:
                run = self.makers[0](self.model)
                found = run(arrays)
            except Exception as error:
                reasons.append(_short(error))
                del self.makers[0]
                if not self.makers:
                    raise OptionError(
                        f"the model must run on the example (or on random inputs, without one), but it failed: {reasons[0]}"
                        + (f"; and {reasons[1]}" if len(reasons) > 1 else "")
                        + ": give an example that it takes"
                    ) from error
            else:
                self.run = run
                return found
        try:
            return self.run(arrays)
        except Exception as error:
            raise OptionError(f"the model must run on these inputs, but it failed: {_short(error)}") from error


def _typed(given: np.ndarray, value: Any) -> np.ndarray:
    elem_type = value.type.tensor_type.elem_type
    return given.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)) if elem_type in FLOATS else given


def _session(model: Any) -> _Run:
    # its telemetry starts with the import
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # the proof is of the model as it is written
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if weight_bytes(model) < LIMIT:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        return lambda arrays: list(session.run(None, arrays))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        copy = type(model)()
        copy.CopyFrom(model)
        onnx.save_model(copy, path, save_as_external_data=True, location="model.data")
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    return lambda arrays: list(session.run(None, arrays))


def _evaluator(model: Any) -> _Run:
    from onnx.reference import ReferenceEvaluator

    from batchnorm.onnx.kernels import KERNELS

    evaluator = ReferenceEvaluator(model, new_ops=KERNELS)

    def run(arrays: dict[str, np.ndarray]) -> list[Any]:
        with np.errstate(all="ignore"):
            return list(evaluator.run(None, arrays))

    return run


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _flat(found: Any) -> list[np.ndarray]:
    """Return all arrays of nested outputs; numbers in place of texts."""
    if found is None:
        return []
    if isinstance(found, dict):
        return [array for key in sorted(found) for array in _flat(found[key])]
    if isinstance(found, list | tuple):
        return [array for item in found for array in _flat(item)]
    array = np.asarray(found)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind in "OUS":
        codes = [zlib.crc32(str(text).encode()) for text in array.ravel()]
        array = np.array(codes, np.int64).reshape(array.shape)
    return [array]
