"""Other people's Keras models: every one of ``keras.applications`` that has batch normalization, through the verbs."""

import time
from typing import Any

import keras
import numpy as np

from batchnorm.check import check
from batchnorm.errors import BatchNormError
from batchnorm.fold import fold
from batchnorm.recalibrate import recalibrate
from batchnorm.tables import table

__all__ = ["MODELS", "measure", "norms_in", "randomize", "shown"]

# names of a family, and the smallest images that it takes; ConvNeXt and VGG have no batch normalization
_FAMILIES = {
    32: (
        "DenseNet121", "DenseNet169", "DenseNet201",
        *(f"EfficientNetB{i}" for i in range(8)), *(f"EfficientNetV2B{i}" for i in range(4)),
        "EfficientNetV2S", "EfficientNetV2M", "EfficientNetV2L",
        "MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small", "NASNetLarge", "NASNetMobile",
        "ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2",
    ),
    71: ("Xception",),
    75: ("InceptionResNetV2", "InceptionV3"),
}  # fmt: skip
MODELS = {name: size for size, names in _FAMILIES.items() for name in names}
QUICK = ("MobileNet", "MobileNetV2", "MobileNetV3Small")
SAMPLES = 4


def measure(quick: bool) -> dict[str, Any]:
    """Fold, check and recalibrate every model with random weights and statistics, and tell what was seen."""
    rows = []
    for name in QUICK if quick else MODELS:
        keras.utils.clear_session()
        try:
            rows.append(_one(name, MODELS[name]))
        except (BatchNormError, ValueError) as error:
            rows.append({"model": name, "failed": str(error).split("\n")[0][:200]})
    return {"rows": rows}


def _one(name: str, size: int) -> dict[str, Any]:
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    randomize(model, rng)
    example = rng.normal(size=(2, size, size, 3)).astype("float32")
    begin = time.perf_counter()
    folded = fold(model, example)
    seconds = time.perf_counter() - begin
    last = folded.error.measured[-1]
    return {
        "model": name,
        "norms": len(norms_in(model)),
        "left": len(norms_in(folded.model)),
        "scale_and_shift": len(folded.kept),
        "float64": float(folded.error),
        "own": float(last.relative),
        "bound": float(last.bound),
        "seconds": seconds,
        "findings": sorted({finding.code for finding in check(model, example).findings}),
        **_recalibrated(model, rng.normal(size=(2, SAMPLES, size, size, 3)).astype("float32")),
    }


def _recalibrated(model: Any, batches: np.ndarray) -> dict[str, Any]:
    """Recalibrate on two batches, and hold the first layer to what NumPy finds of all its inputs in float64."""
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    shown = keras.Model(model.input, first.input)
    values = np.concatenate([keras.ops.convert_to_numpy(shown(batch, training=False)) for batch in batches])
    x = values.astype(np.float64).reshape(-1, values.shape[-1])
    result = recalibrate(model, list(batches), progress=False)
    pairs = [(first.moving_mean, x.mean(0)), (first.moving_variance, x.var(0))]
    errors = [np.abs(keras.ops.convert_to_numpy(v) - exact).max() / np.abs(exact).max() for v, exact in pairs]
    return {"recalibrated": len(result.moved), "recalibration_error": float(max(errors))}


def norms_in(model: Any) -> list[Any]:
    """Return the batch normalization layers of a model, those of models inside of it too."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def randomize(model: Any, rng: np.random.Generator) -> None:
    """Move γ, β and the statistics of all layers away from their initial values, γ of both signs and some of it zero."""
    for norm in norms_in(model):
        size = norm.moving_mean.shape
        norm.moving_mean.assign(rng.normal(0, 0.3, size))
        norm.moving_variance.assign(rng.uniform(0.3, 1.5, size))
        if norm.gamma is not None:
            norm.gamma.assign(rng.uniform(0.6, 1.2, size) * rng.choice([-1, 1], size) * (rng.random(size) > 0.05))
        if norm.beta is not None:
            norm.beta.assign(rng.normal(0, 0.3, size))


def shown(found: dict[str, Any]) -> str:
    """Return the table of what was measured on each backend."""
    head = (
        "Backend",
        "Model",
        "Layers",
        "Left",
        "Scale and shift",
        "float64",
        "float32",
        "Recalibrated",
        "Error",
        "Fold s",
    )
    rows = [(one["ran"], row) for one in found.values() for row in one["rows"]]
    lines = [
        (
            ran,
            row["model"],
            str(row["norms"]),
            str(row["left"]),
            str(row["scale_and_shift"]),
            f"{row['float64']:.1e}",
            f"{row['own']:.1e}",
            str(row["recalibrated"]),
            f"{row['recalibration_error']:.1e}",
            f"{row['seconds']:.1f}",
        )
        for ran, row in rows
        if "failed" not in row
    ]
    failed = [f"{row['model']} on {ran}: {row['failed']}" for ran, row in rows if "failed" in row]
    return "\n".join([table(head, lines, numbers=8), *failed])
