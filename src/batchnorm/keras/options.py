"""Options of our layer, checked once."""

from collections.abc import Mapping
from math import inf
from typing import Any

from batchnorm.errors import OptionError

__all__ = ["DEFAULTS", "changed", "check"]

# what Keras's layer does not have
DEFAULTS: dict[str, Any] = {"virtual_batch_size": None, "unbiased": False, "debias": False, "on_single": "skip"}
_SINGLE = ("skip", "running", "error")
_CLIPPING = ("rmax", "rmin", "dmax")


def changed(layer: Any) -> dict[str, Any]:
    """Return the options of a layer, beside Keras's, that differ from their defaults."""
    return {name: getattr(layer, name) for name, v in DEFAULTS.items() if getattr(layer, name) != v}


def check(options: Mapping[str, Any]) -> None:
    """Refuse options of the layer that can't be, and those that exclude each other.

    Raises:
        OptionError: naming them.
    """
    _check_kinds(options)
    size = options["virtual_batch_size"]
    if size is not None and (type(size) is not int or size < 2):
        raise OptionError(f"virtual_batch_size must be None or an integer of at least 2 samples, got {size!r}")
    if size is not None and options["synchronized"]:
        raise OptionError(
            "virtual_batch_size makes statistics of fewer samples and synchronized of more: give one of them"
        )
    if options["on_single"] not in _SINGLE:
        raise OptionError(f"on_single must be one of {', '.join(map(repr, _SINGLE))}, got {options['on_single']!r}")
    for name in ("momentum", "renorm_momentum"):
        if not 0 <= options[name] <= 1:
            raise OptionError(f"{name}, the weight of the past, must be between 0 and 1, got {options[name]}")
    if not 0 <= options["epsilon"] < inf:
        raise OptionError(f"epsilon must be 0 or more, and finite, got {options['epsilon']}")
    if options["renorm"]:
        _check_renorm(options)


def _check_kinds(options: Mapping[str, Any]) -> None:
    axis = options["axis"]
    if isinstance(axis, list | tuple):
        raise OptionError(f"axis must be one integer, got {axis!r}: Keras 3 has no layer for several axes")
    for name in ("axis", "momentum", "epsilon", "renorm_momentum"):
        try:
            (int if name == "axis" else float)(options[name])
        except (TypeError, ValueError):
            raise OptionError(f"{name} must be a number, got {options[name]!r}") from None


def _check_renorm(options: Mapping[str, Any]) -> None:
    for name in ("unbiased", "debias"):
        if options[name]:
            raise OptionError(f"renorm keeps its statistics in a way of its own: it excludes {name}")
    clipping = options["renorm_clipping"] or {}
    if not isinstance(clipping, Mapping) or set(clipping) - set(_CLIPPING):
        # Keras's own words first: programs look for them
        raise OptionError(
            f"Received invalid keys for `renorm_clipping` argument: {clipping}. It must be a dict with keys from "
            f"{', '.join(_CLIPPING)}"
        )
    rmax, rmin, dmax = (clipping.get(name) for name in _CLIPPING)
    if rmax is not None and rmin is not None and rmax < rmin:
        raise OptionError(
            f"rmax should be greater than rmin in the `renorm_clipping` argument, got rmax={rmax}, rmin={rmin}"
        )
    if dmax is not None and not dmax >= 0:
        raise OptionError(f"dmax should be non-negative in the `renorm_clipping` argument, got dmax={dmax}")
