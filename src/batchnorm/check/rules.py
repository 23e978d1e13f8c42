"""The table of rules: stable codes, what each rule needs, and the function that looks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.check.report import Finding

__all__ = ["RULES", "Rule", "rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Args:
        code: stable and public, as ``"BN103"``.
        title: what it finds, in a few words.
        needs: what it needs beside the model, in words; empty for nothing.
        look: yields what it finds in a `Subject`.
    """

    code: str
    title: str
    needs: str
    look: Callable[[Any], Iterator[Finding]]


RULES: dict[str, Rule] = {}
"""All rules by their codes."""


def rule(code: str, title: str, needs: str = "") -> Callable[[Any], Any]:
    """Enter a function into the table of rules."""

    def enter(look: Callable[[Any], Iterator[Finding]]) -> Callable[[Any], Iterator[Finding]]:
        RULES[code] = Rule(code, title, needs, look)
        return look

    return enter
