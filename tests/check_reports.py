"""Reports as `check` makes them, written by hand: for their readers."""

from dataclasses import dataclass, field

import numpy as np

from batchnorm.check.report import Finding, NotRun, Report

HOSTILE = "<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)> & “q\" 'r"


@dataclass
class Observed:
    """What one layer has seen."""

    layer: str
    mean: np.ndarray
    variance: np.ndarray
    stored_mean: np.ndarray | None
    stored_variance: np.ndarray | None
    eps: float = 1e-5
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None
    dead: float = 0.0
    off: float | None = None
    saturated: float | None = None
    between: float = 0.0
    inputs: np.ndarray | None = None

    @property
    def channels(self):
        return np.arange(len(self.mean))

    @property
    def kl(self):
        stored, now = self.stored_variance + self.eps, self.variance + self.eps
        return (now / stored - 1 - np.log(now / stored) + (self.mean - self.stored_mean) ** 2 / stored) / 2

    @property
    def distance(self):
        return float(self.kl.mean())


@dataclass
class Observation:
    layers: tuple[Observed, ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    def to_dict(self):
        return {"layers": [{"layer": one.layer, "mean": one.mean, "kl": one.kl} for one in self.layers]}


def observed(layer, rng, *, channels=64, shift=0.02, spread=0.03, kept=False):
    """Return what a layer has seen whose statistics are off by about so much."""
    stored_mean, stored = rng.normal(size=channels), rng.gamma(3.0, 0.3, channels)
    mean = stored_mean + np.sqrt(stored) * rng.normal(scale=shift, size=channels)
    variance = stored * np.exp(rng.normal(scale=spread, size=channels))
    inputs = rng.normal(mean, np.sqrt(variance), (600, channels)) if kept else None
    if kept:
        # what a normal distribution does not tell
        inputs = np.where(rng.random(inputs.shape) < 0.3, inputs + 1.5 * np.sqrt(variance), inputs)
        mean, variance = inputs.mean(0), inputs.var(0)
    return Observed(layer, mean, variance, stored_mean, stored, inputs=inputs)


def names(blocks):
    return ["bn1", *(f"layer{i + 1}.{k}.bn{j}" for i, n in enumerate(blocks) for k in range(n) for j in (1, 2, 3))]


def off(layer, size):
    return Finding(
        "BN103",
        layer,
        f"The running statistics are not those of the data: the mean of channel 17 is {size:.1f} stored deviations off.",
        "Recalibrate the model on data like that it is used on: batchnorm recalibrate.",
        "error",
        size,
        {"largest_shift": size, "largest_variance_ratio": 2.5 * size, "channels_off": 12},
    )


def sick(layers=None, *, kept=True, seed=0):
    """Return a report with findings of every level, with an observation."""
    rng = np.random.default_rng(seed)
    layers = layers or ["stem.bn", "block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2", "head.bn"]
    bad = {layers[len(layers) // 2]: (3.0, 1.0), layers[-2]: (0.9, 0.6)}
    seen = tuple(
        observed(name, rng, shift=bad.get(name, (0.02,))[0], spread=bad.get(name, (0, 0.03))[1], kept=kept)
        for name in layers
    )
    momentum = ("momentum is 0.99: the statistics are those of the last batch alone.", "Set momentum to 0.01 or 0.1.")
    findings = (
        off(layers[len(layers) // 2], 9.2),
        off(layers[-2], 2.1),
        *(Finding("BN110", name, *momentum, "warning") for name in layers[: max(2, len(layers) // 5)]),
        Finding("BN202", "", "The optimizer decays γ and β.", "Give them weight decay 0: batchnorm.torch.param_groups.",
                "warning"),
        Finding("BN301", layers[1], "The bias of conv1 has no effect.", "Strip it: batchnorm strip-bias.", "note", 0,
                {"parameters": 64}),
    )  # fmt: skip
    not_run = (
        NotRun("BN201", "Batches of a single value", "needs a loader"),
        NotRun("BN203", "The last batch is small", "needs a loader"),
        NotRun("BN305", "γ and β are decayed", "needs an optimizer"),
    )
    return Report(findings, not_run, (), tuple(layers), Observation(seen))


def healthy(layers=("stem.bn", "block1.bn1", "head.bn")):
    """Return a report without findings and without data."""
    return Report((), (NotRun("BN103", "Statistics are not those of the data", "needs data"),), (), tuple(layers))


def hostile():
    """Return a report whose every text attacks the page."""
    layers = (HOSTILE, "</svg><h1 id='broken'>", "a.{{ 7 * 7 }}")
    seen = tuple(observed(name, np.random.default_rng(1), shift=2.0) for name in layers)
    findings = tuple(Finding("BN103", name, HOSTILE, HOSTILE, "error", 1.0, {HOSTILE: 1.0}) for name in layers)
    not_run = (NotRun("BN201", HOSTILE, HOSTILE),)
    return Report(findings, not_run, (HOSTILE,), layers, Observation(seen))
