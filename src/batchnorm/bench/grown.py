"""Models by the hundred that `check` is measured on: other people's architectures with depth, width and images drawn by chance.

Each is brought into the state of a trained model: some steps of SGD, then passes in which its statistics settle.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from batchnorm.bench.zoo import open_torchvision
from batchnorm.bench.zoo_transformers import transformers_zoo
from batchnorm.torch.evaluation import call, silent, tensors_of

__all__ = ["Grown", "Seed", "Site", "grow", "seeds", "settle"]

ROWS, BATCHES, STEPS, PASSES = 16, 4, 5, 30
# batches that a trained model has counted, and what is left of its initial values then
COUNTED, LEFT = 1000, 1e-40
MOST_PARAMETERS = 60e6


@dataclass(frozen=True)
class Site:
    """A batch normalization layer that a forward pass reaches.

    Args:
        name: dotted name.
        calls: in one forward pass.
        places: of one sample, the least of all calls.
        producer: dotted name of the linear layer whose output it is called on as it is; empty where there is none.
        first: whether that linear layer reads the input of the model.
    """

    name: str
    calls: int
    places: int
    producer: str = ""
    first: bool = False


@dataclass(eq=False)
class Grown:
    """A model as after training, with batches of what it was trained on; in evaluation."""

    name: str
    model: nn.Module
    batches: list[Any]
    kind: str = "image"
    findings: set[tuple[str, str]] | None = None

    def copy(self) -> "Grown":
        """Return one whose model may be changed."""
        return Grown(self.name, copy.deepcopy(self.model), self.batches, self.kind)

    @property
    def example(self) -> Any:
        """The first batch."""
        return self.batches[0]

    @cached_property
    def sites(self) -> list[Site]:
        """The layers of torch's own with statistics that are reached, in the order of their calls."""
        return [site for site in _sites(self.model, self.example) if site.name]

    def norm(self, site: Site) -> Any:
        """Return the layer of a site."""
        return self.model.get_submodule(site.name)


@dataclass(frozen=True)
class Seed:
    """What a model grows from, when it is wanted."""

    zoo: str
    name: str
    build: Callable[[np.random.Generator], tuple[nn.Module, Any]]
    number: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def grow(seed: Seed) -> Grown:
    """Build a model, train it for some steps of SGD, and let its statistics settle; the same on every call."""
    rng = np.random.default_rng([seed.number, *seed.name.encode()])
    with torch.random.fork_rng(devices=()), silent():
        torch.manual_seed(int(rng.integers(2**31)))
        model, example = seed.build(rng)
        size = sum(p.numel() for p in model.parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size / 1e6:.0f} M parameters are too many")
        batches = [_batch(example, ROWS) for _ in range(BATCHES)]
        grown = Grown(f"{seed.name}-{seed.number}", model, batches, "image" if _image(example) else "other")
        _fit(model, batches)
        settle(model, batches)
    return grown


# -- training ----------------------------------------------------------------------------------------------------------


def _fit(model: nn.Module, batches: list[Any]) -> None:
    """Train a few steps towards targets of chance, with γ and β as training leaves them: some models start with γ near 0."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.02, momentum=0.9)
    model.train()
    for number in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(distance(call(model, batches[number % len(batches)])))
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    model.eval()


def distance(result: Any) -> Tensor:
    """Return a loss: how far all outputs are from values of chance."""
    ends = [t for t in tensors_of(result) if t.requires_grad and t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    losses = [F.smooth_l1_loss(t, torch.randn(t.shape, generator=generator)) for t in ends]
    return torch.stack(losses).sum()


def settle(model: nn.Module, batches: list[Any], passes: int = PASSES) -> None:
    """Let statistics forget what they were: plain means at first, then a decay of 0.9; count as after long training."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    own = [(norm, norm.momentum) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    # before the others: what they put out reaches those
    _fill_frozen(model, batches)
    model.train()
    try:
        with torch.no_grad():
            for number in range(passes):
                for norm in norms:
                    norm.momentum = max(0.1, 1 / (number + 1))
                call(model, batches[number % len(batches)])
    finally:
        for module, training in modes:
            module.training = training
    for norm, momentum in own:
        norm.momentum = momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(_counted(momentum))


def _counted(momentum: float | None) -> int:
    decay = 0.9 if momentum is None or not 0 < momentum < 1 else 1 - momentum
    return max(COUNTED, math.ceil(math.log(LEFT) / math.log(decay)))


def _stored(module: nn.Module) -> bool:
    """Whether it keeps statistics that training does not move, as of a checkpoint."""
    return not isinstance(module, _BatchNorm) and isinstance(getattr(module, "running_mean", None), Tensor)


@torch.no_grad()
def _fill_frozen(model: nn.Module, batches: list[Any]) -> None:
    """Give frozen layers the statistics of what reaches them, one after the other."""
    for module in [module for module in model.modules() if _stored(module)]:
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].transpose(0, 1).flatten(1))
        )
        for batch in batches:
            call(model, batch)
        hook.remove()
        values, frozen = torch.cat(seen, 1), cast(Any, module)
        frozen.running_mean.copy_(values.mean(1))
        frozen.running_var.copy_(values.var(1))


# -- what is reached -----------------------------------------------------------------------------------------------------


def _sites(model: nn.Module, example: Any) -> Iterator[Site]:
    """Run once, and see which layers are called on what."""
    makers: dict[int, tuple[Tensor, str, bool]] = {}
    found: dict[str, list[tuple[int, str, bool]]] = {}
    given = {id(t) for t in tensors_of(example)}

    def norm_called(name: str, args: Any) -> None:
        shape = args[0].shape
        _, maker, first = makers.get(id(args[0]), (None, "", False))
        found.setdefault(name, []).append((math.prod(shape[2:]), maker, first))

    def linear_called(name: str, args: Any, result: Any) -> None:
        # the result is held, so that no other gets its identity
        makers[id(result)] = (result, name, id(args[0]) in given)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: norm_called(name, args)))
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            hooks.append(module.register_forward_hook(lambda _, a, result, name=name: linear_called(name, a, result)))
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, calls in found.items():
        _, maker, first = calls[0]
        yield Site(name, len(calls), min(places for places, _, _ in calls), maker, first)


# -- inputs --------------------------------------------------------------------------------------------------------------


def _image(example: Any) -> bool:
    leaves = tensors_of(example)
    return len(leaves) == 1 and leaves[0].ndim == 4 and leaves[0].shape[1] == 3


def _batch(example: Any, rows: int) -> Any:
    """Return inputs of the same shapes with so many samples; images have smooth parts, contrasts and noise of their own."""
    return tree_map(lambda leaf: _leaf(leaf, rows) if isinstance(leaf, Tensor) else leaf, example)


def _leaf(leaf: Tensor, rows: int) -> Tensor:
    shape = (rows, *leaf.shape[1:])
    if not leaf.is_floating_point():
        values = leaf.flatten()
        return values[torch.randint(len(values), shape)] if len(values) else leaf
    if leaf.numel() == 0 or bool((leaf == leaf.flatten()[0]).all()):
        return leaf[:1].expand(shape).clone()
    noise = torch.randn(shape)
    if leaf.ndim < 4:
        return noise + 0.5 * torch.randn(rows, *[1] * (leaf.ndim - 1))
    smooth = F.interpolate(torch.randn(rows, math.prod(shape[1:-2]), 4, 4), shape[-2:], mode="bilinear")
    contrast = 0.5 + torch.rand(rows, *[1] * (leaf.ndim - 1))
    return contrast * (smooth.reshape(shape) + 0.5 * noise)


# -- architectures -------------------------------------------------------------------------------------------------------


def seeds(zoo: str = "") -> list[Seed]:
    """Return what models grow from, of one zoo or of all: by turns, so that the first ones already differ."""
    own = [Seed("torchvision", name, build) for name, build in TORCHVISION.items()]
    theirs = [Seed("transformers", member.name, partial(_member, member)) for member in transformers_zoo()]
    return [seed for seed in own + theirs if zoo in ("", seed.zoo)]


def _member(member: Any, rng: np.random.Generator) -> tuple[nn.Module, Any]:
    model, example = member.build()
    config: Any = getattr(model, "config", None)
    if getattr(config, "apply_spec_augment", False):
        # its masks are longer than the short waves here
        config.apply_spec_augment = False
    return model, example


def _vision(path: str) -> Any:
    open_torchvision()
    return import_module(f"torchvision.models.{path}")


def _pixels(rng: np.random.Generator, *sides: int) -> Tensor:
    side = int(rng.choice(sides or (32, 40, 48)))
    return torch.randn(1, 3, side, side)


def _resnet(block: str, rng: np.random.Generator, **options: Any) -> tuple[nn.Module, Any]:
    resnet = _vision("resnet")
    layers = [int(n) for n in rng.integers(1, 3, 4)]
    return resnet.ResNet(getattr(resnet, block), layers, num_classes=10, **options), _pixels(rng, 32, 40)


def _resnext(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    return _resnet("Bottleneck", rng, groups=int(rng.choice([4, 8])), width_per_group=int(rng.choice([4, 8])))


def _mobilenet_v2(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    width = float(rng.choice([0.25, 0.35, 0.5]))
    return _vision("mobilenetv2").MobileNetV2(num_classes=10, width_mult=width), _pixels(rng)


def _mobilenet_v3(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    mobilenet = _vision("mobilenetv3")
    kind, width = f"mobilenet_v3_{rng.choice(['small', 'large'])}", float(rng.choice([0.35, 0.5, 0.75]))
    setting, last = mobilenet._mobilenet_v3_conf(kind, width_mult=width)
    return mobilenet.MobileNetV3(setting, last, num_classes=10), _pixels(rng)


def _mnasnet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    return _vision("mnasnet").MNASNet(float(rng.choice([0.25, 0.35, 0.5])), num_classes=10), _pixels(rng)


def _shufflenet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    repeats = [int(n) for n in rng.integers(2, 4, 3)]
    width = int(rng.choice([12, 16, 24]))
    channels = [12, 2 * width, 4 * width, 8 * width, 128]
    return _vision("shufflenetv2").ShuffleNetV2(repeats, channels, num_classes=10), _pixels(rng)


def _densenet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    blocks = tuple(int(n) for n in rng.integers(2, 5, 4))
    growth = int(rng.choice([8, 12]))
    return _vision("densenet").DenseNet(growth, blocks, 16, num_classes=10), _pixels(rng)


def _googlenet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    options = {"num_classes": 10, "aux_logits": False, "init_weights": False}
    return _vision("googlenet").GoogLeNet(**options), _pixels(rng, 32)


def _regnet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    regnet = _vision("regnet")
    ratio = None if rng.random() < 0.5 else 0.25
    parameters = regnet.BlockParams.from_init_params(
        int(rng.integers(6, 12)), 24, float(rng.choice([16.0, 24.0])), 2.2, 8, se_ratio=ratio
    )
    return regnet.RegNet(parameters, num_classes=10), _pixels(rng)


def _efficientnet(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    efficientnet = _vision("efficientnet")
    width = float(rng.choice([0.25, 0.35, 0.5]))
    setting, _ = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=width, depth_mult=0.5)
    return efficientnet.EfficientNet(setting, 0.2, num_classes=10), _pixels(rng)


def _vgg(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    vgg = _vision("vgg")
    width = int(rng.choice([8, 16]))
    plan: list[Any] = []
    for stage in range(4):
        plan += [width * 2**stage] * int(rng.integers(1, 4)) + ["M"]
    features = vgg.make_layers(plan, batch_norm=True)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, 10))
    return nn.Sequential(features, head), _pixels(rng)


def _lraspp(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    return _vision("segmentation").lraspp_mobilenet_v3_large(**options), _pixels(rng, 48)


def _video(rng: np.random.Generator) -> tuple[nn.Module, Any]:
    video = _vision("video.resnet")
    convs = [video.Conv3DSimple, *[rng.choice([video.Conv3DSimple, video.Conv3DNoTemporal])] * 3]
    layers = [int(n) for n in rng.integers(1, 3, 4)]
    model = video.VideoResNet(video.BasicBlock, convs, layers, video.BasicStem, num_classes=5)
    return model, torch.randn(1, 3, 2, 16, 16)


TORCHVISION: dict[str, Callable[[np.random.Generator], tuple[nn.Module, Any]]] = {
    "resnet": partial(_resnet, "BasicBlock"), "mobilenet_v2": _mobilenet_v2, "densenet": _densenet, "vgg": _vgg,
    "regnet": _regnet, "shufflenet": _shufflenet, "mobilenet_v3": _mobilenet_v3, "bottleneck": partial(_resnet, "Bottleneck"),
    "mnasnet": _mnasnet, "efficientnet": _efficientnet, "resnext": _resnext, "googlenet": _googlenet, "lraspp": _lraspp,
    "video": _video,
}  # fmt: skip
