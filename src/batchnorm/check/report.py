"""What a check returns: findings, worst first, rules that were not run, and what could not be looked at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from batchnorm.check.mended import Mended
from batchnorm.errors import OptionError

__all__ = ["ERROR", "NOTE", "WARNING", "Finding", "NotRun", "Report"]

ERROR, WARNING, NOTE = "error", "warning", "note"
_LEVELS = (ERROR, WARNING, NOTE)
# layers that are named in a line before the rest is only counted
NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, where, and how to mend it.

    Args:
        code: of the rule, as ``"BN103"``.
        layer: dotted name of the layer; empty for the model or its training as a whole.
        message: what was found, in one sentence.
        cure: what to do, in one sentence.
        level: ``"error"`` (results are wrong), ``"warning"`` (training suffers) or ``"note"`` (waste).
        size: how bad it is among findings of its rule.
        numbers: what was measured, by name.
    """

    code: str
    layer: str
    message: str
    cure: str
    level: str = WARNING
    size: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"{self.code} {where}{self.message} Cure: {self.cure}"


@dataclass(frozen=True, slots=True)
class NotRun:
    """A rule that was not run, and what it lacks."""

    code: str
    title: str
    reason: str

    def __str__(self) -> str:
        return f"{self.code} {self.title}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """The findings of `check`, worst first; iterates over them, is true where there are any, prints as text.

    Args:
        findings: what was found.
        not_run: rules that were not run, each with its reason.
        problems: what the user gave that could not be used, one sentence each; the rules that need it were not run.
        layers: the names of all batch normalization layers, in order.
        observation: what the data has shown (`observe`); ``None`` without data.
        model: the model that was checked.
    """

    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...] = ()
    problems: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    observation: Any | None = None
    model: Any = field(default=None, repr=False)
    mend: Callable[["Report"], Mended] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, number: int) -> Finding:
        return self.findings[number]

    def fix(self) -> Mended:
        """Mend what can be mended safely, and say what was done.

        Modes, momenta, lasting freezes and statistics are set right in the model itself, weight decay in the optimizer itself;
        biases are stripped and normalization is folded only with a proof. Whatever a cure would change beyond that is left.

        Returns:
            `Mended`: ``model``, ``done`` and ``left``; prints as text.

        Raises:
            OptionError: a report that was made without its model.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=0.99))
            >>> print(bn.check(model).fix())
            BN110 0: momentum is 0.01 now
        """
        if self.mend is None:
            raise OptionError("a report must come from check(model), to mend the model; this one has none")
        return self.mend(self)

    def __str__(self) -> str:
        lines = [line for _, group in groupby(self.findings, _alike) for line in _told(list(group))]
        if not self.findings:
            lines.append(f"nothing found in {len(self.layers)} normalization layers")
        lines += [f"could not be used: {problem}" for problem in self.problems]
        for reason, group in _by_reason(self.not_run):
            why = "see above" if reason in self.problems else reason
            lines.append(f"not run ({why}): {', '.join(rule.code for rule in group)}")
        return "\n".join(lines)


def order(finding: Finding) -> tuple[Any, ...]:
    """Return what findings are sorted by: the worst first."""
    return _LEVELS.index(finding.level), -finding.size, finding.code


def _alike(finding: Finding) -> tuple[str, str, str]:
    return finding.code, finding.message, finding.cure


def _told(group: list[Finding]) -> list[str]:
    layers = [finding.layer for finding in group if finding.layer]
    named = ", ".join(layers[:NAMED]) + (f" and {len(layers) - NAMED} more" if len(layers) > NAMED else "")
    first = group[0]
    return [f"{first.code} {named + ': ' if named else ''}{first.message}", f"      {first.cure}"]


def _by_reason(rules: tuple[NotRun, ...]) -> list[tuple[str, list[NotRun]]]:
    reasons: dict[str, list[NotRun]] = {}
    for rule in rules:
        reasons.setdefault(rule.reason, []).append(rule)
    return list(reasons.items())
