"""What the ranks of a world do, job by job; each world of processes is started once and does all its jobs."""

import copy
import functools
import math
import pickle
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.errors import BatchNormError, BatchNormWarning
from processes import on_ranks
from sync_cases import CHANNELS, TOLERANCE, Case, Counted, step

SHARDS = {"8+8": (8, 8), "5+3+0": (5, 3, 0), "3+1+2+2": (3, 1, 2, 2)}
KINDS = {
    "images": {},
    "images far from zero": {"mean": 1e4 / 3, "std": 1.0},
    "channels last": {"layout": "channels last", "places": (5, 6)},
    "channels last far from zero": {"layout": "channels last", "places": (5, 6), "mean": 1e4 / 3, "std": 1.0},
    "strided": {"layout": "strided"},
    "rows": {"places": ()},
    "rows far from zero": {"places": (), "mean": 1e4 / 3, "std": 1.0},
    "sequences": {"places": (5,)},
    "volumes": {"places": (2, 3, 2)},
    "mask": {"given": "mask"},
    "weight": {"given": "weight"},
    "mask and weight": {"given": "mask weight"},
    "no affine": {"options": {"affine": False}},
    "no bias": {"options": {"bias": False}},
    "ghost batches": {"options": {"virtual_batch_size": 2}},
    "ghost batches of three": {"options": {"virtual_batch_size": 3}},
    "ghost batches, mask and weight": {"options": {"virtual_batch_size": 2}, "given": "mask weight"},
    "renorm": {"options": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}},
    "renorm and mask": {"options": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}, "given": "mask"},
    "device": {"blind": True},
    "device, far from zero": {"blind": True, "mean": 1e4 / 3, "std": 1.0},
    "device, mask and weight": {"blind": True, "given": "mask weight"},
}
STEPS = {
    (shards, kind, dtype): Case(samples, dtype=dtype, **options)
    for shards, samples in SHARDS.items()
    for kind, options in KINDS.items()
    for dtype in TOLERANCE
}
PENALTIES = {
    "plain": Case((5, 3, 0), dtype=torch.float64),
    "mask and weight": Case((5, 3, 0), dtype=torch.float64, given="mask weight"),
    "renorm": Case((5, 3, 0), dtype=torch.float64, options={"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}),
    "rows": Case((5, 3, 1), (), dtype=torch.float64),
}


def derivatives(y_of, x, dy, gamma, weight):
    """Return gradients of a gradient penalty, and of a penalty of its gradient: second and third derivatives."""
    wanted = [v.requires_grad_() for v in (x, dy, gamma, weight) if v is not None]
    (first,) = torch.autograd.grad((y_of() * dy).sum(), x, create_graph=True)
    second = torch.autograd.grad((first**2).sum(), wanted, create_graph=True)
    third = torch.autograd.grad((second[0] ** 2).sum(), wanted)
    return [v.detach().numpy() for v in (first, *second, *third)]


def penalty(rank, case):
    layer = bn.sync(case.layer()).train()
    x, dy, mask, weight = case.shard(rank)
    return derivatives(lambda: layer(x, mask, weight), x, dy, layer.weight, weight)


def model(**options):
    """Return convolution, normalization and a head; equal on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def batches(number, forward):
    torch.manual_seed(50 + 7 * number + forward)
    x = torch.randn(8, 3, 6, 6) * 2 + torch.arange(8.0).view(8, 1, 1, 1)
    return x, torch.randn(8, 2)


def trained(network, part, forwards, optimizer):
    for number in range(3):
        optimizer.zero_grad()
        loss = 0.0
        for forward in range(forwards):
            x, target = (v[part] for v in batches(number, forward))
            loss = loss + ((network(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()


def state(network):
    return {name: v.detach().numpy().astype(np.float64) for name, v in network.state_dict().items()}


def parallel(rank, forwards, broadcast, after):
    """Train under DistributedDataParallel, on half of each batch."""
    from torch.nn.parallel import DistributedDataParallel

    inner = model() if after else bn.sync(model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = DistributedDataParallel(inner, broadcast_buffers=broadcast)
    if after:
        bn.sync(network)
    trained(network, slice(4 * rank, 4 * rank + 4), forwards, torch.optim.SGD(network.parameters(), lr=0.1))
    return state(inner)


def sharded(rank):
    """Train with parameters that are sharded over the ranks."""
    from torch.distributed.fsdp import fully_shard

    network = bn.sync(model())
    mesh = init_device_mesh("cpu", (2,))
    bn.sync(network, mesh)
    for part in network:
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)
    trained(network, slice(4 * rank, 4 * rank + 4), 1, torch.optim.SGD(network.parameters(), lr=0.1))
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in network.state_dict().items()}
    return {name: v.detach().numpy().astype(np.float64) for name, v in full.items()}


def compiled(rank, backend):
    """Take two steps, compiled and not."""
    found = []
    for compile_it in (True, False):
        network = bn.sync(model(virtual_batch_size=2, activation="silu"))
        run = torch.compile(network, fullgraph=True, backend=backend) if compile_it else network
        before = distributed.group.WORLD._get_sequence_number_for_group()
        trained(run, slice(4 * rank, 4 * rank + 4), 1, torch.optim.SGD(network.parameters(), lr=0.1))
        found.append((state(network), distributed.group.WORLD._get_sequence_number_for_group() - before))
    return found


def recomputed(rank, reentrant, options):
    """Return output, gradients and statistics without and with activation checkpointing; rank 1 has no sample."""
    results = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer = bn.sync(Case((5, 0), options=options).layer())
        total = 0.0
        xs = [Case((5, 0)).shard(rank)[0].add(i).requires_grad_() for i in range(2)]
        for x in xs:
            y = run(layer, x)
            total = total + (y * Case((5, 0)).shard(rank)[1]).sum()
        total.backward()
        found = [*(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()]
        results.append([v.detach().clone().numpy() for v in found])
    return results


def recomputed_after_growing(rank):
    """See more ghost batches between a checkpointed forward and its backward; return the gradients, without and with."""
    found = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        layer = bn.sync(bn.BatchNorm1d(CHANNELS, virtual_batch_size=2))
        xs = [Case(samples, ()).shard(rank)[0].requires_grad_() for samples in ((2, 4), (8, 4))]
        sum((run(layer, x) ** 3).sum() for x in xs).backward()
        found.append([x.grad.numpy() for x in xs])
    return found


def counted(rank, options):
    """Return the collectives of a step: the first, the second, an evaluation, a frozen layer, a group of one."""
    layer = bn.sync(bn.BatchNorm2d(CHANNELS, **options))
    found = []
    x = torch.randn(4, CHANNELS, 3, 3, requires_grad=True)
    for prepare in (lambda: None, lambda: None, layer.eval, lambda: bn.freeze(layer.train())):
        prepare()
        with Counted() as seen:
            y = layer(x)
            forward = len(seen)
            y.sum().backward()
        found.append((seen[:forward], seen[forward:]))
    group = [distributed.new_group([other]) for other in range(2)][rank]
    with Counted() as seen:
        bn.sync(nn.BatchNorm2d(CHANNELS), group)(x).sum().backward()
    return [*found, seen]


def single(rank, on_single, given):
    """Normalize the one value in the world, which rank 1 holds."""
    layer = Case((0, 1), ()).layer()
    bn.sync(bn.convert(layer, on_single=on_single))
    x = torch.full((rank, CHANNELS), 5.0, requires_grad=True)
    weights = {"sample_weight": torch.full((rank,), 2.0)} if given else {}
    if on_single == "error":
        return said(layer, x, **weights)
    y = layer(x, **weights)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy(), layer.num_batches_tracked.item()


def nothing(rank):
    """Train on no sample at all."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS))
    x = torch.zeros(0, CHANNELS, requires_grad=True)
    layer(x).sum().backward()
    return layer.running_mean.tolist(), layer.num_batches_tracked.item(), x.grad.shape, layer.weight.grad.tolist()


def poisoned(rank):
    """See a batch that is not finite on rank 1."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        layer(torch.full((2, CHANNELS), math.nan if rank else 1.0))
    return layer.running_mean.tolist(), layer.skipped_updates, layer.num_batches_tracked.item()


def without_gradient(rank):
    """Return the gradient where only rank 0 needs one."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS, affine=False, dtype=torch.float64))
    x, dy, *_ = Case((4, 4), (), torch.float64).shard(rank)
    x.requires_grad_(rank == 0)
    y = layer(x)
    (y * dy).sum().backward()
    plain = layer(x.detach())
    return x.grad, plain.requires_grad


def micro_batches(rank):
    """Collect two micro-batches, and one of another domain."""
    layer = bn.sync(bn.add_domains(bn.BatchNorm1d(CHANNELS, momentum=None, dtype=torch.float64), ["other"]))
    x = [Case((4, 2), (), torch.float64).shard(rank)[0] + i for i in range(3)]
    with bn.accumulate(layer):
        layer(x[0])
        layer(x[1])
        with bn.domain(layer, "other"):
            layer(x[2])
    return {name: v.numpy() for name, v in layer.named_buffers()}


def growing(rank):
    """See more ghost batches after fewer, on one rank only."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS, virtual_batch_size=2, momentum=1.0, dtype=torch.float64))
    found = []
    for samples in ((2, 2), (8, 4), (4, 0)):
        with Counted() as seen:
            x = Case(samples, (), torch.float64).shard(rank)[0].requires_grad_()
            y = layer(x)
            (y**3).sum().backward()
        found.append((seen, y.detach().numpy(), layer.running_mean.numpy().copy()))
    return found


def in_half(rank, dtype):
    layer = bn.sync(Case((6, 2)).layer().to(dtype))
    x, dy, *_ = Case((6, 2)).shard(rank)
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    (y * dy.to(dtype)).sum().backward()
    return [v.detach().double().numpy() for v in (y, x.grad, layer.weight.grad, layer.running_var)]


def under_autocast(rank):
    """Take bfloat16 from a convolution into a layer in float32."""
    layer = bn.sync(Case((6, 2)).layer())
    x, dy, *_ = Case((6, 2)).shard(rank)
    x = x.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    (y * dy).sum().backward()
    return [v.detach().double().numpy() for v in (y, x.grad, layer.weight.grad, layer.running_var)], str(y.dtype)


def with_residual(rank):
    """Compare what comes after the normalization with the plain layer."""
    case = Case((4, 2), (5,), torch.float64)
    x, other, *_ = case.shard(rank)
    lengths = torch.arange(len(x)) + 1
    full, plain = bn.sync(bn.convert(case.layer(), activation="silu")), bn.sync(case.layer())
    mask = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]
    y = plain(x, lengths=lengths)
    expected = torch.where(mask, nn.functional.silu(y + other), 0.0)
    return torch.equal(full(x, residual=other, lengths=lengths), expected)


def zero_weights(rank):
    """Train where every weight of rank 1 is zero."""
    layer = bn.sync(bn.BatchNorm1d(1, momentum=1.0))
    layer(torch.tensor([[1.0], [3.0]]) + 10 * rank, sample_weight=torch.full((2,), 1.0 - rank))
    return layer.running_mean.item()


def said(function, *arguments, **named):
    """Return the type and the message of the error that a call ends with."""
    try:
        function(*arguments, **named)
    except BatchNormError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def mismatched(rank):
    """Return what the layer says when ranks differ in width, dtype, option or layer; and that the group still works."""
    x = torch.randn(4, 3 + rank)
    wide = said(bn.sync(bn.BatchNorm1d(3 + rank)), x)
    cast = said(bn.sync(bn.BatchNorm1d(3)), torch.randn(4, 3, dtype=[torch.float32, torch.bfloat16][rank]))
    optional = said(bn.sync(bn.BatchNorm1d(3, on_single=["skip", "error"][rank])), torch.randn(4, 3))
    network = Holder("ab"[rank])
    named = said(network, torch.randn(4, 3))
    layer = bn.sync(bn.BatchNorm1d(3, momentum=1.0))
    (nn.Sequential(layer) if rank else nn.Sequential(nn.Sequential(layer)))(torch.full((2, 3), float(rank)))
    return {"width": wide, "dtype": cast, "option": optional, "layer": named}, layer.running_mean.tolist()


class Holder(nn.Module):
    """A model that calls one of its two layers."""

    def __init__(self, name):
        super().__init__()
        self.layers, self.name = nn.ModuleDict({name: bn.sync(bn.BatchNorm1d(3)) for name in "ab"}), name

    def forward(self, x):
        return self.layers[self.name](x)


def groups(rank):
    """Synchronize halves of four ranks."""
    halves = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine, foreign = halves[rank // 2], halves[1 - rank // 2]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.full((2, 1), float(rank))
    layers = [bn.sync(bn.BatchNorm1d(1, momentum=1.0), group) for group in (mine, mesh["tp"], mesh["dp"], None)]
    for layer in layers:
        layer(x)
    means = [layer.running_mean.item() for layer in layers]
    copied = copy.deepcopy(layers[0])
    copied(x + 1)
    theirs = nn.SyncBatchNorm(1, process_group=mine, momentum=1.0)
    kept = bn.sync(nn.Sequential(theirs, nn.BatchNorm1d(1, momentum=1.0)))
    kept(x)
    given = bn.sync(nn.SyncBatchNorm(1, process_group=mine, momentum=1.0), distributed.group.WORLD)
    return {
        "means": means,
        "copied": copied.running_mean.item(),
        "kept": [layer.running_mean.item() for layer in kept],
        "repr": [repr(layer.options.process_group) for layer in (*layers, given)],
        "foreign": said(bn.sync, nn.BatchNorm1d(1), foreign),
        "mesh": said(bn.sync, nn.BatchNorm1d(1), mesh),
        "pickled": said(pickle.dumps, layers[0]),
        "world": pickle.loads(pickle.dumps(layers[3])).options == layers[3].options,
        "traced": said(torch.func.vmap(bn.sync(bn.BatchNorm1d(1))), x[None]),
    }


OPTIONS = {"plain": None, "renorm": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}}
JOBS = {
    2: {
        **{("ddp", f, b, a): (parallel, f, b, a) for f in (1, 2) for b in (True, False) for a in (True, False)},
        "sharded": (sharded,),
        "compiled": (compiled, "aot_eager"),
        **{("recomputed", r, o): (recomputed, r, OPTIONS[o]) for r in (True, False) for o in OPTIONS},
        "recomputed after growing": (recomputed_after_growing,),
        "counted": (counted, {}),
        "ghosts counted": (counted, {"virtual_batch_size": 2}),
        **{
            ("single", how, given): (single, how, given)
            for how in ("error", "running", "skip")
            for given in (True, False)
        },
        "nothing": (nothing,),
        "poisoned": (poisoned,),
        "without gradient": (without_gradient,),
        "micro-batches": (micro_batches,),
        "growing": (growing,),
        **{("half", dtype): (in_half, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)},
        "autocast": (under_autocast,),
        "residual": (with_residual,),
        "zero weights": (zero_weights,),
        "mismatched": (mismatched,),
    },
    3: {("penalty", name): (penalty, case) for name, case in PENALTIES.items()},
    4: {"groups": (groups,)},
}
for key, case in STEPS.items():
    JOBS[len(case.samples)][key] = (step, case)


@functools.cache
def world(ranks):
    return on_ranks(Path(tempfile.mkdtemp()), ranks, JOBS[ranks])


def answers(ranks, name):
    """Return the answers of the ranks to one job; a failure there is one here."""
    returned, errors = world(ranks)
    failed = [error for (job, _), error in errors.items() if job == name]
    assert not failed, "\n".join(failed)
    return returned[name]
