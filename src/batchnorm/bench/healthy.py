"""What `check` says of models in which nothing was planted: which findings are true, by a test of its own for each rule."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.bench.grown import Grown, Seed, grow, seeds
from batchnorm.check import RULES, Finding, check
from batchnorm.tables import table
from batchnorm.torch.evaluation import call, kept_generators, silent, tensors_of
from batchnorm.torch.parameters import param_groups

__all__ = ["EVIDENCE", "measure", "told"]

MODELS, QUICK = 200, 2
# relative change of outputs that is rounding
SAME = 1e-3


def measure(quick: bool) -> Any:
    """Check models that are as after training, with all that a thorough user gives."""
    models: list[dict[str, Any]] = []
    unfit: list[dict[str, str]] = []
    wanted, number = QUICK if quick else MODELS, 0
    while len(models) < wanted:
        for seed in seeds("torchvision" if quick else ""):
            if len(models) < wanted:
                _one(Seed(seed.zoo, seed.name, seed.build, 100 + number), models, unfit)
        number += 1
    return {"models": models, "unfit": unfit}


def _one(seed: Seed, models: list[dict[str, Any]], unfit: list[dict[str, str]]) -> None:
    try:
        grown = grow(seed)
    except Exception as error:
        unfit.append({"model": f"{seed.name}-{seed.number}", "reason": f"{type(error).__name__}: {error}"[:200]})
        return
    row = looked_at(grown)
    models.append(row | {"zoo": seed.zoo})
    false = [f"{one['code']} {one['layer']}" for one in row["findings"] if not one["true"]]
    sys.stderr.write(f"healthy {len(models)} {grown.name}: {len(row['findings'])} findings, false: {false[:4]}\n")


def looked_at(grown: Grown) -> dict[str, Any]:
    """Return the findings in one model, each with evidence for it where there is some."""
    optimizer = torch.optim.SGD(param_groups(grown.model, 1e-4), 0.01)
    loader = DataLoader(TensorDataset(torch.zeros(32, 1)), batch_size=16)
    try:
        report = check(grown.model, grown.example, data=grown.batches, optimizer=optimizer, loader=loader)
    except Exception as error:
        finding = {"code": "raised", "layer": "", "message": f"{type(error).__name__}: {error}"[:300], "true": False}
        return {"model": grown.name, "layers": 0, "findings": [finding | {"why": ""}], "not_run": [], "problems": []}
    findings = [_told(finding, grown) for finding in report]
    return {
        "model": grown.name,
        "layers": len(report.layers),
        "findings": findings,
        "not_run": [str(rule) for rule in report.not_run],
        "problems": list(report.problems),
    }


def _told(finding: Finding, grown: Grown) -> dict[str, Any]:
    evidence = EVIDENCE.get(finding.code)
    with kept_generators(), silent():
        why = "" if evidence is None else evidence(finding, grown)
    told = {"code": finding.code, "layer": finding.layer, "message": finding.message}
    return told | {"true": bool(why), "why": why}


# -- evidence: tests that know nothing of the rules --------------------------------------------------------------------


def _bias(finding: Finding, grown: Grown) -> str:
    """Another bias changes no output in training."""
    model = grown.copy().model
    bias: Any = model.get_submodule(finding.layer).bias
    before = _outputs(model, grown.example)
    with torch.no_grad():
        bias.add_(torch.randn(bias.shape))
    change = _change(before, _outputs(model, grown.example))
    return f"another bias changes outputs in training by {change:.1e}" if change < SAME else ""


def _momentum(finding: Finding, grown: Grown) -> str:
    """After one batch, running statistics are those of this batch, whatever came before."""
    model = grown.copy().model
    norm: Any = model.get_submodule(finding.layer)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    norm.running_mean.fill_(1e3)
    _outputs(model, grown.example)
    left = float((norm.running_mean - seen[-1].transpose(0, 1).flatten(1).mean(1)).abs().mean()) / 1e3
    return f"one batch leaves {left:.1%} of what was stored" if left < 0.5 else ""


def _dropout(finding: Finding, grown: Grown) -> str:
    """The variance that reaches the layer is larger with dropout than without."""
    model = grown.copy().model
    seen: list[float] = []
    module = model.get_submodule(finding.layer)
    module.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].detach().var())))
    drops: list[Any] = [m for m in model.modules() if "Dropout" in type(m).__name__]
    for rates in ([drop.p for drop in drops], [0.0] * len(drops)):
        for drop, rate in zip(drops, rates, strict=True):
            drop.p = rate
        for batch in grown.batches:
            _outputs(model, batch)
    half = len(seen) // 2
    ratio = sum(seen[half:]) / max(sum(seen[:half]), 1e-12)
    return f"without dropout the variance is {ratio:.2f} × that with it" if ratio < 0.985 else ""


def _dead(finding: Finding, grown: Grown) -> str:
    """A channel does not vary in any batch."""
    model, seen = grown.copy().model, list[Tensor]()
    module = model.get_submodule(finding.layer)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    for batch in grown.batches:
        _outputs(model, batch)
    dead = torch.stack([x.transpose(0, 1).flatten(1).var(1) <= 1e-2 * module.eps for x in seen]).all(0)  # type: ignore[operator]
    return f"{int(dead.sum())} channels are constant in every batch" if dead.any() else ""


def _calls(finding: Finding, grown: Grown) -> str:
    """It is called several times, with inputs of other means or deviations."""
    model, seen = grown.copy().model, list[Tensor]()
    model.get_submodule(finding.layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    _outputs(model, grown.example)
    flat = [x.transpose(0, 1).flatten(1) for x in seen]
    apart = max((float(((a.mean(1) - b.mean(1)) ** 2 / b.var(1)).mean()) for a in flat for b in flat), default=0.0)
    return f"{len(seen)} calls, means {apart**0.5:.2g} deviations apart" if len(seen) > 1 and apart > 0.01 else ""


def _switched_off(finding: Finding, grown: Grown) -> str:
    """Channels of its output that do not vary."""
    model, seen = grown.copy().model, list[Tensor]()
    model.get_submodule(finding.layer).register_forward_hook(lambda _, args, result: seen.append(result.detach()))
    _outputs(model, grown.example)
    still = int((seen[0].transpose(0, 1).flatten(1).var(1) < 1e-6).sum()) if seen else 0
    return f"{still} channels of its output do not vary" if still else ""


def _row(finding: Finding, grown: Grown) -> str:
    """What reaches it has mean β and deviation γ of another norm: it is another's output, bit by bit."""
    model = grown.copy().model
    outputs: list[Tensor] = []
    same: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda _, args, result: outputs.append(result))
    module = model.get_submodule(finding.layer)
    module.register_forward_pre_hook(lambda _, args: same.append(any(args[0] is out for out in outputs)))
    _outputs(model, grown.example)
    return "it is called on the output of another norm" if any(same) else ""


def _few(finding: Finding, grown: Grown) -> str:
    """Means of batches scatter as means of few values do."""
    model, seen = grown.copy().model, list[Tensor]()
    model.get_submodule(finding.layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    _outputs(model, grown.example)
    values = seen[0].numel() // seen[0].shape[1] if seen else 0
    return f"a batch has {values} values a channel" if 0 < values < 16 else ""


EVIDENCE: dict[str, Callable[[Finding, Grown], str]] = {
    "BN105": _calls, "BN110": _momentum, "BN201": _few, "BN203": _dropout, "BN205": _dead, "BN301": _bias, "BN303": _row,
    "BN304": _switched_off,
}  # fmt: skip
"""For each rule what proves a finding of it in a model in which nothing was planted."""


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run in training, always with the same random numbers."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        return [t.clone() for t in tensors_of(call(model, batch)) if t.is_floating_point()]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    return max(
        (float((a - b).abs().max() / (a.abs().max() + 1e-6)) for a, b in zip(before, after, strict=True) if a.numel()),
        default=0.0,
    )


# -- tables --------------------------------------------------------------------------------------------------------------


def told(found: dict[str, Any]) -> str:
    """Return the false and the true findings of all models, as a table."""
    findings = [one | {"model": model["model"]} for model in found["models"] for one in model["findings"]]
    rows = []
    for code in sorted({one["code"] for one in findings}):
        own = [one for one in findings if one["code"] == code]
        false = Counter(one["model"] for one in own if not one["true"])
        true = Counter(one["model"] for one in own if one["true"])
        example = next((one["why"] for one in own if one["true"]), "")
        title = RULES[code].title if code in RULES else "an error"
        rows.append((f"{code} {title}", str(len(false)), str(len(true)), str(true.total()), example))
    bad = {one["model"] for one in findings if not one["true"]}
    layers = sum(model["layers"] for model in found["models"])
    head = ("Finding", "False, models", "True, models", "True, findings", "Evidence, for one")
    total = f"{len(found['models'])} models with {layers} layers; false findings in {len(bad)}"
    return f"{table(head, rows)}\n{total}"
