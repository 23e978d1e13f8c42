"""What each option of the layers does to a small network, in the situation that the option is for."""

import datetime
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.bench import situations as s
from batchnorm.bench.machine import describe, keep
from batchnorm.bench.situations import Recipe, outcome
from batchnorm.lab.data import Split, load_data
from batchnorm.lab.statistics import SignFlip
from batchnorm.lab.train import one_thread

__all__ = ["CASES", "Case", "EffectsBench", "paired_effect", "run"]

SEEDS, QUICK_SEEDS, QUICK_FACTOR = 10, 2, 20
NONE = "none measured"
_HEAD = ("Option", "Situation", "Log-loss without", "With", "Difference", "Accuracy, points")


@dataclass(frozen=True)
class Case:
    """An option, the situation that it is for, and the training without it; ``changed`` is what the option replaces."""

    option: str
    situation: str
    without: Recipe
    changed: dict[str, Any]

    def measure(self, splits: list[Split], factor: int) -> dict[str, Any]:
        """Return the outcomes of both arms, a pair for each seed: same split, same weights, same batches."""
        arms = {"without": self.without, "with": replace(self.without, **self.changed)}
        outcomes = {
            arm: [outcome(recipe.shortened(factor), split, seed) for seed, split in enumerate(splits)]
            for arm, recipe in arms.items()
        }
        return {"option": self.option, "situation": self.situation, **outcomes}


def settling(steps: int) -> float:
    """Return a momentum that falls from 0.1 to 0.01 over 300 steps."""
    return max(0.01, 0.1 * (1 - steps / 300))


RENORM = {"start": 50, "dmax_at": 200, "rmax_at": 300}

CNN = Recipe()
SMALL = replace(CNN, batch_size=8, steps=300)
MLP = replace(CNN, network="mlp", learning_rate=0.03)
TINY = replace(MLP, batch_size=4, steps=400, learning_rate=0.01)

CASES = [
    Case("virtual_batch_size=16", "CNN, batches of 256", replace(CNN, batch_size=256),
         {"layer": {"virtual_batch_size": 16}}),
    Case("renorm", "MLP, batches of 4", TINY, {"layer": {"renorm": RENORM}}),
    Case("renorm", "MLP, batches of 64", replace(MLP, steps=400), {"layer": {"renorm": RENORM}}),
    Case("example_weight", "CNN, trained with batches of 8", SMALL, {"finish": s.choose_example_weight}),
    Case("debias", "CNN, 20 steps, momentum 0.01", replace(CNN, steps=20, layer={"momentum": 0.01}),
         {"layer": {"momentum": 0.01, "debias": True}}),
    Case("momentum=None", "CNN, batches of 8, against 0.1", SMALL, {"layer": {"momentum": None}}),
    Case("momentum=None, anew", "CNN, batches of 8, one epoch after training", SMALL, {"finish": s.take_statistics_anew}),
    Case("momentum=schedule", "CNN, batches of 8, 0.1 falls to 0.01", SMALL, {"layer": {"momentum": settling}}),
    Case("total_variance", "CNN, batches of two classes", replace(CNN, batches=s.two_classes, learning_rate=0.02),
         {"layer": {"total_variance": True}}),
    Case("unbiased=False", "MLP, batches of 4", TINY, {"layer": {"unbiased": False}}),
    Case("unbiased=False", "CNN, batches of 64", CNN, {"layer": {"unbiased": False}}),
    Case("mask", "CNN, batches padded to 8 to 16 places", replace(CNN, step=partial(s.padded_step, tell=False)),
         {"step": partial(s.padded_step, tell=True)}),
    Case("sample_weight", "CNN, weight 2 against two copies", replace(CNN, step=partial(s.weighted_step, copies=True)),
         {"step": partial(s.weighted_step, copies=False)}),
    Case("accumulate", "CNN, eight micro-batches of 8", replace(CNN, step=partial(s.micro_step, once=False)),
         {"step": partial(s.micro_step, once=True)}),
    Case("counted once", "CNN, checkpointed, against torch's layer", replace(CNN, layer=None, step=s.checkpointed_step),
         {"layer": {}}),
    Case("guard", "CNN, one inf, against torch's layer", replace(CNN, layer=None, step=s.inf_step), {"layer": {}}),
    Case("freeze", "CNN, tuned to mirrored digits, batches of 2",
         replace(CNN, batch_size=2, rows=200, learning_rate=0.003, mirrored=True,
                 start=partial(s.pretrain, frozen=False)),
         {"start": partial(s.pretrain, frozen=True)}),
    Case("domains", "CNN, digits and inverted digits in turn",
         replace(CNN, step=partial(s.domain_step, separate=False), test=partial(s.test_domains, separate=False)),
         {"start": s.add_inverted, "step": partial(s.domain_step, separate=True),
          "test": partial(s.test_domains, separate=True)}),
    Case("param_groups", "CNN, weight decay 0.01, 300 steps", replace(CNN, steps=300, weight_decay=0.01), {"grouped": True}),
    Case("on_single='running'", "MLP, a last batch of one, against torch's layer",
         replace(MLP, rows=1025, layer=None, batches=partial(s.shuffled, last=True)),
         {"layer": {"on_single": "running"}}),
]  # fmt: skip


@dataclass(frozen=True)
class EffectsBench:
    """Raw values of the measurement; prints as the table made of them."""

    facts: dict[str, Any]
    file: Path

    def __str__(self) -> str:
        rows = [_HEAD, *map(_row, self.facts["cases"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "─" * (sum(widths) + 2 * len(widths) - 2))
        notes = [
            "",
            f"With minus without, on test rows: mean of {self.facts['seeds']} paired seeds, 95 % interval of the "
            "sign-flip test; log-loss in nats, less is better.",
            f"“{NONE}”: the interval contains 0. The intervals are not corrected for their number.",
            f"raw values: {self.file}",
        ]
        return "\n".join([*lines, *notes])


def run(out: Path, *, quick: bool = False) -> EffectsBench:
    """Train both arms of every case, and keep every raw value as JSON in ``out``."""
    seeds, factor = (QUICK_SEEDS, QUICK_FACTOR) if quick else (SEEDS, 1)
    data = load_data("digits")
    facts: dict[str, Any] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    facts["seeds"] = seeds
    with one_thread():
        splits = [data.split(seed) for seed in range(seeds)]
        facts["cases"] = [case.measure(splits, factor) for case in CASES]
    return EffectsBench(facts, keep(facts, out, "effects.json"))


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a case; where an arm fails, how often each works."""
    pairs = list(zip(case["without"], case["with"], strict=True))
    if any("failed" in arm for pair in pairs for arm in pair):
        counts = [
            f"works in {sum('failed' not in arm for arm in arms)} of {len(pairs)}" for arms in zip(*pairs, strict=True)
        ]
        return case["option"], case["situation"], *counts, "–", "–"
    means = [f"{np.mean([arm['log_loss'] for arm in arms]):.4f}" for arms in zip(*pairs, strict=True)]
    effects = [paired_effect(pairs, "log_loss", 1, 4), paired_effect(pairs, "accuracy", 100, 2)]
    return case["option"], case["situation"], *means, *effects


def paired_effect(pairs: list[tuple[dict[str, Any], dict[str, Any]]], key: str, scale: float, digits: int) -> str:
    """Return the mean difference with its interval; what rounds to 0 is 0."""
    test = SignFlip([scale * (b[key] - a[key]) for a, b in pairs])
    low, high = (round(bound, digits) for bound in test.interval())
    interval = f"[{_signed(low, digits)}, {_signed(high, digits)}]"
    return f"{NONE} {interval}" if low <= 0 <= high else f"{_signed(test.mean, digits)} {interval}"


def _signed(value: float, digits: int) -> str:
    # no −0.00
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")
