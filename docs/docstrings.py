"""Fit the docstrings of the source to the site: equations and examples become code blocks there."""

import re
from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Rewrite two habits that Markdown does not know."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Name the section ``Example`` as the reader of docstrings expects it, and take ``::`` off the equations."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"^ *::\n", "", text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
