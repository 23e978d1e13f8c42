"""The verb `check`: run every rule whose needs are met, and list the others."""

from collections.abc import Callable, Iterable
from typing import Any

from batchnorm.check import gap, modes, padding, statistics, training, waste
from batchnorm.check.cures import in_words_of
from batchnorm.check.fixing import fix
from batchnorm.check.report import Finding, NotRun, Report, order
from batchnorm.check.rules import RULES, Rule
from batchnorm.check.subject import MissingError, Subject
from batchnorm.errors import OptionError
from batchnorm.models import adapt, unwrapped

__all__ = ["check"]

# importing them has entered their rules
_ROOMS = (statistics, modes, gap, padding, training, waste)


def check(
    model: Any,
    example: Any | None = None,
    *,
    data: Any | None = None,
    optimizer: Any | None = None,
    loader: Any | None = None,
    training: bool | None = None,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    forward: Callable[..., Any] | None = None,
    batches: int | None = None,
    samples: int | None = None,
    device: Any = None,
    progress: bool = False,
) -> Report:
    """Find what is wrong with the normalization of a model, where, and how to mend it.

    Nothing of the model is changed. What a rule needs and was not given is said: the rule is then listed as not run, and never
    passed over in silence. What was given and can't be used is a problem of the report; every other rule is still run.

    Args:
        model: as in `fold`; as it is to be used or trained next, in that mode.
        example: an input (a tuple of inputs, a dict of named ones); taken from ``data`` where it is left out.
        data: batches, as in `recalibrate`; compared with the running statistics in one pass.
        optimizer: that trains the model.
        loader: of the batches that the model is trained on; only their sizes are read.
        training: whether the model is to be trained (``True``) or used as it is (``False``); ``None`` for what its mode and the
            other arguments say.
        select: codes, or beginnings of codes as ``"BN1"``, of the rules to run; all, if ``None``.
        ignore: codes, or beginnings of codes, of rules to leave out.
        forward: for the pass over the data, as in `observe`.
        batches: read at most these batches of the data.
        samples: stop when so many samples were read.
        device: where batches are moved to; where the model is, if ``None``.
        progress: show a progress bar.

    Returns:
        `Report`: findings, worst first; ``not_run``, ``problems``, ``fix()``; prints as text.

    Raises:
        OptionError: a model of no known framework, or an unknown code.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.9), nn.ReLU())
        >>> for finding in check(model, torch.randn(4, 3, 8, 8)):
        ...     print(finding.code, finding.layer, finding.level)
        BN110 1 error
        BN301 0 note
    """
    chosen = _chosen(_words(select), _words(ignore))
    given = {"example": example, "data": data, "optimizer": optimizer, "loader": loader, "training": training}
    reading = {"forward": forward, "batches": batches, "samples": samples, "device": device, "progress": progress}
    subject = Subject(adapt(unwrapped(model)), **given, **reading)
    findings: list[Finding] = []
    not_run: list[NotRun] = []
    for rule in chosen:
        try:
            findings += (in_words_of(subject.framework, finding) for finding in rule.look(subject))
        except MissingError as missing:
            not_run.append(NotRun(rule.code, rule.title, str(missing)))
    return Report(
        tuple(sorted(findings, key=order)),
        tuple(not_run),
        tuple(subject.problems),
        tuple(state.name for state in subject.states),
        subject.seen,
        model,
        lambda report: fix(report, subject),
    )


def _words(codes: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if codes is None:
        return None
    return tuple(code.strip() for code in (codes.split(",") if isinstance(codes, str) else codes) if code.strip())


def _chosen(select: tuple[str, ...] | None, ignore: tuple[str, ...] | None) -> list[Rule]:
    """Return the rules to run, in the order of their codes.

    Raises:
        OptionError: a code that no rule begins with.
    """
    for code in (*(select or ()), *(ignore or ())):
        if not any(known.startswith(code.upper()) for known in RULES):
            raise OptionError(
                f"a code must be one of a rule, or its beginning as BN1, got {code!r}: {', '.join(sorted(RULES))}"
            )
    wanted = tuple(code.upper() for code in select) if select is not None else ("",)
    left_out = tuple(code.upper() for code in ignore or ())
    return [
        RULES[code]
        for code in sorted(RULES)
        if code.startswith(wanted) and not (left_out and code.startswith(left_out))
    ]
