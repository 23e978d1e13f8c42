"""For each rule a torch model that must trigger it, and a look-alike that must not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.torch import BatchNorm1d, convert, freeze, param_groups
from check_pairs import Case, Pairs

pair = Pairs()


def images(samples: int = 16, size: int = 8) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


def net(**layer: Any) -> nn.Sequential:
    """Return a trained-looking network: its statistics are those of its inputs, and counted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, **layer), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, **layer), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, **layer), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return train(model, images(64))


def train(model: Any, x: Tensor, batches: int = 60) -> Any:
    model.train()
    with torch.no_grad():
        for _ in range(batches):
            model(x[torch.randint(len(x), (16,), generator=torch.Generator().manual_seed(_))])
    return model.eval()


def loader(samples: int, size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(samples, 3, 8, 8)), batch_size=size, **options)


@pair("BN101")
def one_reset(sick: bool) -> Case:
    model = net()
    if sick:
        model[4].reset_running_stats()
    return Case(model, "4")


@pair("BN101")
def all_new(sick: bool) -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    # a new model that is about to be trained is as it should be
    return Case(model.train(not sick), "1")


class Spare(nn.Module):
    """A network with a layer that it may have left over."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.net, self.spare, self.called = net(), nn.BatchNorm1d(4), called

    def forward(self, x: Tensor) -> Any:
        return self.spare(self.net(x)) if self.called else self.net(x)


@pair("BN101")
def left_over(sick: bool) -> Case:
    return Case(Spare(called=sick).eval(), "spare", {"example": images(16)})


@pair("BN102")
def negative(sick: bool) -> Case:
    model = net()
    model[4].running_var[2] = -1e-3 if sick else 1e-3
    return Case(model, "4")


@pair("BN102")
def poisoned(sick: bool) -> Case:
    model = net()
    model[1].running_mean[0] = float("nan") if sick else 100.0
    return Case(model, "1")


@pair("BN103")
def scaled(sick: bool) -> Case:
    model = net()
    if sick:
        model[4].running_var.mul_(25)
    return Case(model, "4", {"data": list(images(64).split(16))})


@pair("BN103")
def other_data(sick: bool) -> Case:
    return Case(net(), "1", {"data": [255 * x if sick else x for x in images(64).split(16)]})


@pair("BN103")
def scaled_behind_dropout(sick: bool) -> Case:
    # what dropout has widened is another rule's
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Dropout(0.3), nn.BatchNorm2d(8), nn.ReLU())
    train(model, images(64))
    if sick:
        model[2].running_var.mul_(20)
    return Case(model, "2", {"data": list(images(64).split(16))})


@pair("BN104")
def thawed(sick: bool) -> Case:
    model = net()
    if sick:
        for module in model[:9]:
            module.requires_grad_(False)
    else:
        freeze(model[:9])
    return Case(model.train(), "1")


@pair("BN104")
def thawed_in_evaluation(sick: bool) -> Case:
    # where nothing learns, nothing will be trained
    model = net()
    model.requires_grad_(False)
    model[-1].requires_grad_(sick)
    return Case(model, "1")


@pair("BN104")
def thawed_without_statistics(sick: bool) -> Case:
    model = net(**({} if sick else {"track_running_stats": False}))
    model[1].requires_grad_(False)
    return Case(model.train(), "1")


class Siamese(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.scale = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x) - self.tower(self.scale * x + self.scale - 1)


@pair("BN105")
def two_streams(sick: bool) -> Case:
    model = Siamese(3.0 if sick else 1.0)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return Case(train(model, x), "tower.1", {"data": list(x.split(16))})


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


@pair("BN106")
def counted_twice(sick: bool) -> Case:
    model = Recomputed(reentrant=False)
    return Case(model if sick else convert(model), "block.1", {"example": images(4)})


@pair("BN106")
def counted_twice_reentrant(sick: bool) -> Case:
    model = Recomputed(reentrant=True)
    return Case(model if sick else convert(model), "block.1", {"example": images(4)})


class Collecting(nn.Module):
    """Returns what a hook has collected."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recomputed(reentrant=False)
        self.inner.register_forward_hook(Collecting._collect)

    @staticmethod
    def _collect(module: Any, args: Any, result: Tensor) -> None:
        module.found = [result]

    def forward(self, x: Tensor) -> Any:
        self.inner.found = []
        self.inner(x)
        return self.inner.__dict__.pop("found")


@pair("BN106")
def counted_twice_behind_a_hook(sick: bool) -> Case:
    model = Collecting()
    return Case(model if sick else convert(model), "inner.block.1", {"example": images(4)})


@pair("BN107")
def last_batch(sick: bool) -> Case:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=False), nn.BatchNorm1d(8))
    return Case(model, "2", {"example": images(4), "loader": loader(65, 16, drop_last=not sick)})


@pair("BN107")
def one_sample(sick: bool) -> Case:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    return Case(model, "1", {"example": images(1 if sick else 16)})


@pair("BN108")
def left_in_training(sick: bool) -> Case:
    model = net()
    model[4].train(sick)
    return Case(model, "4")


@pair("BN108")
def left_in_evaluation(sick: bool) -> Case:
    model = net().train()
    if sick:
        model[7].eval()
    else:
        freeze(model[7])
    return Case(model, "7")


class HardWired(nn.Module):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.norm, self.always = nn.BatchNorm2d(3), training
        self.norm.running_mean += 1

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        training = self.always or self.training
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training)


@pair("BN108")
def hard_wired(sick: bool) -> Case:
    return Case(HardWired(sick).eval(), "norm", {"example": images(4)})


@pair("BN108")
def always_by_the_batch(sick: bool) -> Case:
    # a layer that keeps no statistics has no other way
    model = net(**({} if sick else {"track_running_stats": False}))
    if sick:
        model[1].train()
    return Case(model, "1", {"example": images(4)})


@pair("BN109")
def half(sick: bool) -> Case:
    model = net()
    return Case(model.half() if sick else convert(model, wide_statistics=True).half(), "1")


@pair("BN110")
def keras_momentum(sick: bool) -> Case:
    model = net()
    model[7].momentum = 0.99 if sick else 0.01
    return Case(model, "7")


@pair("BN111")
def odd_eps(sick: bool) -> Case:
    model = net(eps=1e-3)
    if sick:
        model[4].eps = 1e-5
    return Case(model, "4")


@pair("BN111")
def odd_eps_in_a_small_part(sick: bool) -> Case:
    # a head, which comes last, may have another
    blocks = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(6)]
    blocks[2 if sick else 5][1].eps = 1e-3
    return Case(nn.Sequential(*blocks), "2.1")


@pair("BN102")
def infinite(sick: bool) -> Case:
    model = net()
    model[4].running_var[2] = float("inf") if sick else 0.5
    return Case(model, "4", {"data": list(images(64).split(16))})


class Padded(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.masked = nn.Conv1d(5, 6, 1, bias=False), BatchNorm1d(6), masked

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).any(1) if self.masked else None
        return self.norm(self.conv(x), mask=mask)


@pair("BN112")
def padded(sick: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(64, 5, 20, generator=generator)
    lengths = torch.randint(5, 21, (64,), generator=generator)
    x = x * (torch.arange(20) < lengths[:, None])[:, None]
    return Case(train(Padded(masked=not sick), x), "norm", {"data": list(x.split(16))})


@pair("BN112")
def dark_edges(sick: bool) -> Case:
    # the dark frame of an image is data: it is on all sides
    x = images(64)
    if sick:
        for number, image in enumerate(x):
            image[:, :, 3 + number % 6 :] = 0
    else:
        x[:, :, :2] = x[:, :, -2:] = 0
        x[:, :, :, :2] = x[:, :, :, -2:] = 0
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return Case(train(model, x), "1", {"data": list(x.split(16))})


@pair("BN112")
def margins(sick: bool) -> Case:
    # margins of any width on both sides are how a picture is framed
    x = images(64)
    for number, image in enumerate(x):
        image[:, :, 3 + number % 5 :] = 0
        if not sick:
            image[:, :, : number % 5] = 0
            image[:] = image if number % 2 else image.flip(-2)
    return _padded_images(x)


@pair("BN112")
def same_edge(sick: bool) -> Case:
    # an edge that is the same in all pictures does not fill them up
    x = images(64)
    for number, image in enumerate(x):
        image[:, :, 3 + (number % 5 if sick else 0) :] = 0
    return _padded_images(x)


def _padded_images(x: Tensor) -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return Case(train(model, x), "1", {"data": list(x.split(16))})


@pair("BN201")
def few_values(sick: bool) -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 8, bias=False), nn.BatchNorm2d(8))
    return Case(model, "1", {"example": images(4 if sick else 32)})


@pair("BN201")
def small_batches(sick: bool) -> Case:
    return Case(net(), "1", {"example": images(16), "loader": loader(64, 2 if sick else 32)})


@pair("BN202")
def decayed(sick: bool) -> Case:
    model = net()
    groups = [{"params": model.parameters(), "weight_decay": 1e-4}] if sick else param_groups(model, 1e-4)
    return Case(model, "1", {"optimizer": torch.optim.SGD(groups, 0.1)})


@pair("BN203")
def dropout_before(sick: bool) -> Case:
    order = [nn.Dropout(0.5), nn.BatchNorm2d(8)] if sick else [nn.BatchNorm2d(8), nn.Dropout(0.5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), *order, nn.ReLU())
    return Case(model, "2", {"example": images(4)})


@pair("BN203")
def dropout_as_a_function(sick: bool) -> Case:
    return Case(Dropping(sick), "norm", {"example": torch.randn(8, 6)})


class Dropping(nn.Module):
    def __init__(self, before: bool) -> None:
        super().__init__()
        self.norm, self.before = nn.BatchNorm1d(6), before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.norm(nn.functional.dropout(x, 0.3, self.training).reshape(x.shape))
        return nn.functional.dropout(self.norm(x), 0.3, self.training)


@pair("BN204")
def accumulating(sick: bool) -> Case:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.0)
    model.train()
    for number in range(12):
        model(images(16)).square().mean().backward()
        if not sick or number % 4 == 3:
            optimizer.step()
    for norm in (model[1], model[4], model[7]):
        norm.num_batches_tracked.fill_(12)
    return Case(model, "", {"optimizer": optimizer})


@pair("BN205")
def dead_channel(sick: bool) -> Case:
    torch.manual_seed(0)
    x = torch.rand(64, 6)
    x[:, 2] = 0.5 if sick else 0.5 + 0.05 * torch.randn(64)
    return Case(train(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), x, 200), "0")


@pair("BN205")
def small_values(sick: bool) -> Case:
    # far below ε, and alive
    torch.manual_seed(0)
    x = torch.rand(64, 6)
    x[:, 2] = 1.0 if sick else 1e-6 * torch.randn(64)
    return Case(train(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), x, 300), "0")


@pair("BN205")
def dead_channel_that_is_off(sick: bool) -> Case:
    # what γ = 0 multiplies is not amplified
    case = dead_channel(True)
    if not sick:
        torch.nn.init.zeros_(case.model[0].weight[2:3])
    return case


@pair("BN206")
def deep(sick: bool) -> Case:
    blocks = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(40)]
    model = nn.Sequential(*(block if sick else Residual(block) for block in blocks))
    return Case(model, "39.1" if sick else "", {"example": torch.randn(32, 8)})


@pair("BN206")
def deep_and_linear(sick: bool) -> Case:
    active = [nn.ReLU()] if sick else []
    blocks = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), *active) for _ in range(40)]
    return Case(nn.Sequential(*blocks), "39.1", {"example": torch.randn(32, 8)})


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return x + self.block(x)


@pair("BN207")
def useless_sync(sick: bool) -> Case:
    model = net().train()
    return Case(nn.SyncBatchNorm.convert_sync_batchnorm(model) if sick else model, "1")


@pair("BN301")
def redundant_bias(sick: bool) -> Case:
    # behind a ReLU the bias is no longer one
    between = [] if sick else [nn.ReLU()]
    return Case(nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.BatchNorm2d(8)), "0", {"example": images(4)})


@pair("BN302")
def foldable(sick: bool) -> Case:
    model = net()
    return Case(model.train(not sick), "1", {"example": images(16)})


@pair("BN302")
def still_trained(sick: bool) -> Case:
    model = net()
    given = {} if sick else {"optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    return Case(model, "1", {"example": images(16), **given})


@pair("BN303")
def in_a_row(sick: bool) -> Case:
    between = [nn.Dropout(0.1)] if sick else [nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), *between, nn.BatchNorm2d(8))
    return Case(model, "3", {"example": images(4)})


@pair("BN304")
def switched_off(sick: bool) -> Case:
    model = net()
    with torch.no_grad():
        model[4].weight[:3] = torch.tensor([0.0, 1e-6, -1e-7]) if sick else torch.tensor([0.1, 0.02, -0.01])
    return Case(model, "4")


@pair("BN304")
def starts_at_zero(sick: bool) -> Case:
    # a branch that is switched on by training
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    nn.init.zeros_(model[1].weight)
    return Case(train(model, images(64)) if sick else model.train(), "1")


def values_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}
