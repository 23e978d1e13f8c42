"""Mend what a report has found, where that is safe."""

from collections.abc import Callable
from functools import partial
from typing import Any

from batchnorm.check.mended import Left, Mended, Step
from batchnorm.check.report import Report
from batchnorm.check.subject import MissingError, Subject
from batchnorm.errors import BatchNormError
from batchnorm.fold import fold, strip_bias
from batchnorm.recalibrate import recalibrate
from batchnorm.states import Mend

__all__ = ["fix"]

# what new statistics mend
_MEASURED = ("BN101", "BN102", "BN103", "BN203")
_NOT_SAFE = {
    "BN111": "which ε is right is known to who converted it: set eps",
    "BN112": "a mask must be handed to the layer",
    "BN304": "prune(model, example, threshold=…) changes the sizes of layers",
}


def _mode(subject: Subject, name: str) -> Mend | None:
    state, trains = subject.by_name[name], subject.view.training is True
    return Mend(training=trains) if state.training != trains else None


def _swapped(subject: Subject, name: str) -> float:
    decay = subject.by_name[name].decay
    assert decay is not None  # noqa: S101
    return 1.0 - decay


# what one layer is set to, by the code of the finding, and in words
_SETTINGS: dict[str, tuple[Callable[[Subject, str], Mend | None], str]] = {
    "BN104": (
        lambda subject, name: Mend(freeze=True),
        "running statistics are frozen, whatever .train() is called later",
    ),
    "BN106": (lambda subject, name: Mend(count_once=True), "a batch counts once under activation checkpointing"),
    "BN108": (_mode, "the mode is that of the model"),
    "BN109": (lambda subject, name: Mend(wide=True), "running statistics are kept in float32"),
    "BN110": (lambda subject, name: Mend(decay=_swapped(subject, name)), "momentum is {momentum:.4g} now"),
}


def fix(report: Report, subject: Subject) -> Mended:
    """Mend the findings of a report, in an order in which nothing is undone."""
    codes: dict[str, list[str]] = {}
    for finding in report.findings:
        codes.setdefault(finding.code, []).append(finding.layer)
    work = _Work(subject, codes)
    work.set_layers()
    work.measure()
    work.spare()
    work.rewrite("BN301", lambda model, example: strip_bias(model, example).model, "biases are stripped")
    work.rewrite("BN302", lambda model, example: fold(model, example).model, "folded into their neighbours")
    for code, layers in codes.items():
        if code not in work.handled:
            reason = _NOT_SAFE.get(code, "it needs a decision: see its cure")
            work.left += [Left(code, layer, reason) for layer in layers]
    return Mended(work.model, tuple(work.done), tuple(work.left))


class _Work:
    def __init__(self, subject: Subject, codes: dict[str, list[str]]) -> None:
        self.subject, self.codes = subject, codes
        self.model = subject.view.model
        self.done: list[Step] = []
        self.left: list[Left] = []
        self.handled: set[str] = set()

    def set_layers(self) -> None:
        """Set modes, momenta, freezes and dtypes of single layers."""
        for code, (setting, what) in _SETTINGS.items():
            layers = self.codes.get(code, [])
            wanted = {name: setting(self.subject, name) for name in layers if name in self.subject.by_name}
            mends = {name: mend for name, mend in wanted.items() if mend is not None}
            if mends:
                self._try({code: list(mends)}, partial(self.subject.view.mend, mends), self._said(what, mends))
            written = [name for name in layers if name not in mends]
            self.left += [
                Left(code, name, "it is written into the model's code, not set in the layer") for name in written
            ]
            self.handled |= {code} if layers else set()

    def _said(self, what: str, mends: dict[str, Mend]) -> str:
        decays = [mend.decay for mend in mends.values() if mend.decay is not None]
        own = [self.subject.momentum(decay) for decay in decays]
        return what.format(momentum=own[0] if own else 0.0)

    def measure(self) -> None:
        """Measure statistics anew, where data was given."""
        found = {code: self.codes[code] for code in _MEASURED if code in self.codes}
        if found:
            self._try(found, self._recalibrate, "statistics are those of the data")

    def _recalibrate(self) -> None:
        if self.subject.data is None:
            raise MissingError("it needs data to measure on")
        recalibrate(self.subject.view.model, self.subject.data, **self.subject.options)

    def spare(self) -> None:
        """Take weight decay off γ and β."""
        if "BN202" in self.codes:
            spare = partial(self.subject.view.spare, self.subject.optimizer)
            self._try({"BN202": self.codes["BN202"]}, spare, "γ and β are no longer decayed")

    def rewrite(self, code: str, change: Callable[[Any, Any], Any], what: str) -> None:
        """Change the structure in a copy, with a proof."""

        def run() -> None:
            self.model = change(self.model, self.subject.example)

        if code in self.codes:
            self._try({code: self.codes[code]}, run, what)

    def _try(self, found: dict[str, list[str]], run: Callable[[], Any], what: str) -> None:
        """Do something against findings of some rules, and note what came of it."""
        self.handled |= set(found)
        try:
            run()
        except (BatchNormError, MissingError) as error:
            reason = " ".join(str(error).split())
            self.left += [Left(code, layer, reason) for code, layers in found.items() for layer in layers]
        else:
            self.done += [Step(code, tuple(layers), what) for code, layers in found.items()]
