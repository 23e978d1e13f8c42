"""Cures in the words of frameworks other than torch, where these differ."""

from dataclasses import replace

from batchnorm.check.report import Finding

__all__ = ["in_words_of"]

_KERAS = {
    "BN104": "layer.trainable = False freezes parameters and statistics; load what has moved from the checkpoint.",
    "BN105": "Give each stream a layer of its own, or put the streams into one batch.",
    "BN106": "Leave the layer out of keras.remat, or use the JAX backend, where it counts once.",
    "BN107": "Leave the odd sample out, or take another batch size.",
    "BN108": "Call the layer without training=True.",
    "BN109": 'Keep its variables in float32: dtype="float32", or a policy as mixed_float16.',
    "BN112": "Hand it a mask: a Masking layer before it, or layer(x, mask=…).",
    "BN201": "Larger batches, synchronized=True on several devices, renorm=True, or trainable = False when fine-tuning.",
    "BN202": 'optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"]) before it is built.',
    "BN204": "Count the small batch when choosing settings, or take larger batches and no accumulation.",
    "BN207": "synchronized=True in all layers of a job on several devices, and in none on one.",
    "BN301": "strip_bias(model), or use_bias=False from the start: β takes its place.",
    "BN302": "fold(model) removes it, with a proof.",
    "BN303": "Leave one of them out, or fold(model) for a model in use.",
    "BN304": "Train without what drives γ to zero, or leave these channels out of the next model.",
}
_ONNX = {
    "BN101": "Export a model that was trained, or measure them anew: recalibrate(model, data).",
    "BN108": "Export the model in evaluation mode, or report.fix().",
    "BN109": "Keep its mean and variance in float32 when the model is converted.",
    "BN301": "strip_bias(model), before or after export.",
    "BN302": "fold(model) removes it, with a proof.",
    "BN303": "fold(model) merges them, with a proof.",
}
_WORDS = {"keras": _KERAS, "onnx": _ONNX}


def in_words_of(framework: str, finding: Finding) -> Finding:
    """Return a finding with the cure that users of a framework can apply."""
    cure = _WORDS.get(framework, {}).get(finding.code)
    return finding if cure is None else replace(finding, cure=cure)
