"""Give one model the numbers of another, from file to file, for the command line."""

from pathlib import Path

from batchnorm.errors import OptionError
from batchnorm.models import adapt, check_ending, load, save
from batchnorm.translation.result import Transfer
from batchnorm.translation.transferring import transfer

__all__ = ["run"]

_TENSORS = (".safetensors", ".pt")


def run(
    source: str,
    target: str,
    out: Path,
    *,
    weights: Path | None = None,
    inputs: list[tuple[str, tuple[int, ...]]],
) -> str:
    """Write the target with the numbers of the source, and return what was carried as text.

    Args:
        source: a file, or ``package.module:factory``.
        target: another one, of the same architecture.
        out: the file to write, whole or not at all.
        weights: tensors for the source, where that is a factory.
        inputs: name (may be empty) and shape of each input of the source; none where a model knows them.

    Raises:
        BatchNormError: whatever `models.load`, `transfer` or `models.save` raise; then nothing was written.
    """
    if not out.parent.is_dir():
        raise OptionError(f"the result must go into a folder that is there, {out.parent} is not")
    for _, shape in inputs:
        if not shape or min(shape) < 1:
            raise OptionError(
                f"the shape of an input must be positive sizes, got {','.join(map(str, shape)) or 'none'}"
            )
    models = [load(source, weights), load(target)]
    check_ending(models[1], out)
    # what a factory makes is in training mode
    views = [adapt(model.eval() if hasattr(model, "eval") else model) for model in models]
    found = transfer(views[0].model, views[1].model, views[0].example(inputs))
    if out.suffix in _TENSORS:
        _check_eps(found, target, out)
    save(found.model, out, found.example)
    return f"{found}\nwritten to {out}"


def _check_eps(found: Transfer, target: str, out: Path) -> None:
    """Refuse a file of tensors for layers whose eps the target does not have by itself: the file does not hold it.

    Raises:
        OptionError: such a layer.
    """
    for one in found.carried:
        if one.eps is not None and one.eps[0] != one.eps[1]:
            raise OptionError(
                f"{out} holds tensors and no eps: that of layer {one.target!r} must be {one.eps[0]:g}, {target} makes it with "
                f"{one.eps[1]:g}. Let it make its layers with eps={one.eps[0]:g}, or write a .pt2 program"
            )
