"""Running statistics for each domain, with shared γ and β."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.options import read_domains
from batchnorm.torch.surgery import convert, named_layers

__all__ = ["add_domains", "domain"]


def add_domains(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Give every batch normalization layer of a model running statistics for further domains, in place.

    They start where the layer's own statistics are, and are kept in the ``state_dict`` as ``running_mean_<name>`` and so on.

    Args:
        model: any module; layers of torch's own are converted.
        names: like ``"target"``; names that a layer has already are kept.

    Returns:
        The model itself.

    Raises:
        OptionError: a name that is no identifier, or a layer without running statistics.

    Example:
        >>> from torch import nn
        >>> list(add_domains(nn.BatchNorm1d(2, affine=False), ["target"]).state_dict())[3:]
        ['running_mean_target', 'running_var_target', 'num_batches_tracked_target']
    """
    wanted = read_domains(names)
    convert(model)
    known = [name for _, layer in named_layers(model) for name in layer.options.domains]
    return convert(model, domains=tuple(dict.fromkeys([*known, *wanted])))


@contextmanager
def domain(model: nn.Module, name: str | None) -> Iterator[None]:
    """Use the running statistics of one domain, in training and evaluation; ``None`` is the layers' own.

    Args:
        model: a module whose layers have domains.
        name: of the domain.

    Raises:
        OptionError: no layer has the domain.

    Example:
        >>> import torch
        >>> from batchnorm.torch import BatchNorm1d
        >>> layer = BatchNorm1d(1, momentum=1.0, domains=["target"])
        >>> with domain(layer, "target"):
        ...     _ = layer(torch.tensor([[1.0], [3.0]]))
        >>> layer.running_mean.item(), layer.running_mean_target.item()
        (0.0, 2.0)
    """
    layers = [layer for _, layer in named_layers(model) if name is None or name in layer.options.domains]
    if not layers and name is not None:
        known = sorted({known for _, layer in named_layers(model) for known in layer.options.domains})
        raise OptionError(f"no layer has the domain {name!r}, there are {known or 'none'}: add_domains first")
    before = [layer.domain for layer in layers]
    try:
        for layer in layers:
            layer.domain = name
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.domain = old
