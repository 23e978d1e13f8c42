"""Tables as text."""

from collections.abc import Sequence

__all__ = ["table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Lay out a table with rules; the last ``numbers`` columns are flush right.

    Example:
        >>> print(table(("layer", "parameters"), [("conv", "432"), ("linear", "10")], numbers=1))
        layer   parameters
        ──────────────────
        conv           432
        linear          10
        ──────────────────
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    left = len(head) - numbers
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    rule = "─" * len(lines[0])
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:], rule])
