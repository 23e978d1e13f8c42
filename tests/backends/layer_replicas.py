"""A batch on two replicas: what each of them puts out, as a program of its own. Its argument is a folder."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np

from batchnorm.keras import BatchNormalization
from batchnorm.keras.internals import as_array

FOLDER = Path(sys.argv[1] if __name__ == "__main__" else ".")
OPTIONS = {"momentum": 0.6, "unbiased": True, "synchronized": True}
RNG = np.random.default_rng(0)
X, UPSTREAM = (RNG.normal(mean, 2, size=(8, 3)).astype("float32") for mean in (1e3, 0))
MASK = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
# samples of the first replica; with the mask the second one has no value, or one
SPLITS = {"uneven": 5, "empty": 8, "single": 7, "masked": 4}


def made(**options):
    """Return a layer with weights of its own."""
    layer = BatchNormalization(**OPTIONS, **options)
    layer.build((None, 3))
    for v in (layer.gamma, layer.beta):
        v.assign([0.5, 1.0, 2.0])
    return layer


def keep(name, **arrays):
    """Write what was found."""
    np.savez(FOLDER / f"{name}.npz", **{key: as_array(v) for key, v in arrays.items()})


def on_torch():
    """Be two processes, of which one imports torch and Keras."""
    import torch
    from torch import distributed

    other = os.fork()
    rank = 0 if other else 1

    distributed.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=rank, world_size=2)
    for name, first in SPLITS.items():
        part = slice(0, first) if rank == 0 else slice(first, None)
        layer = made()
        x = torch.tensor(X[part], requires_grad=True)
        mask = torch.tensor(MASK[part]) if name == "masked" else None
        y = layer(x, training=True, mask=mask)
        dx, *found = torch.autograd.grad(y, [x, layer.gamma.value, layer.beta.value], torch.tensor(UPSTREAM[part]))
        for g in found:
            distributed.all_reduce(g)
        mean, variance = layer.moving_mean, layer.moving_variance
        keep(f"{name}_{rank}", y=y, dx=dx, gamma=found[0], beta=found[1], mean=mean.value, variance=variance.value)
    distributed.destroy_process_group()
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))


def on_tensorflow():
    """Run on two logical CPUs."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for name, first in SPLITS.items():
        parts = [slice(0, first), slice(first, None)]
        with strategy.scope():
            layer = made()

        def step(x, upstream, mask, layer=layer, name=name):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask if name == "masked" else None)
            return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], upstream)

        def values(array, parts=parts):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(array[parts[context.replica_id_in_sync_group]])
            )

        @tf.function
        def run(*args, step=step):
            return strategy.run(step, args)

        y, (dx, *found) = run(values(X), values(UPSTREAM), values(MASK))
        split = [
            strategy.experimental_local_results(v)
            for v in (y, dx, *found, layer.moving_mean.value, layer.moving_variance.value)
        ]
        for rank in range(2):
            own = {
                key: v[rank if len(v) > 1 else 0]
                for key, v in zip(("y", "dx", "gamma", "beta", "mean", "variance"), split, strict=True)
            }
            own |= {"gamma": sum(map(as_array, split[2])), "beta": sum(map(as_array, split[3]))}
            keep(f"{name}_{rank}", **own)


def on_jax():
    """Run on two devices, in ``shard_map``, in ``pmap``, and on a batch that is sharded."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = made()
    state = [v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables]

    def step(x, upstream, mask):
        y, back, moved = jax.vjp(
            lambda x, w: layer.stateless_call(w, state[1], x, training=True, mask=mask), x, state[0], has_aux=True
        )
        dx, (gamma, beta) = back(upstream)
        return y, dx, gamma, beta, *moved

    def kept(name, y, dx, *others):
        for rank, part in enumerate((slice(0, 4), slice(4, None))):
            keep(
                f"{name}_{rank}",
                y=y[part],
                dx=dx[part],
                **dict(zip(("gamma", "beta", "mean", "variance"), others, strict=True)),
            )

    data, whole = PartitionSpec("data"), PartitionSpec()
    specs = {"mesh": mesh, "in_specs": (data,) * 3, "out_specs": (data, data, whole, whole, whole, whole)}
    kept("masked", *jax.jit(jax.shard_map(step, **specs))(X, UPSTREAM, MASK))
    halves = [v.reshape(2, 4, *v.shape[1:]) for v in (X, UPSTREAM, MASK)]
    y, dx, gamma, beta, mean, variance = jax.pmap(step, axis_name="replica")(*halves)
    kept("pmapped", y.reshape(X.shape), dx.reshape(X.shape), gamma.sum(0), beta.sum(0), mean[1], variance[1])
    sharded = [jax.device_put(v, NamedSharding(mesh, data)) for v in (X, UPSTREAM, MASK)]
    kept("sharded", *jax.jit(step)(*sharded))
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(**OPTIONS), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, UPSTREAM[:, :1], batch_size=4, shuffle=False, verbose=0)
    keep("fit", **{str(i): v for i, v in enumerate(model.get_weights())})


if __name__ == "__main__":
    name = keras.backend.backend()
    on_torch() if name == "torch" else on_tensorflow() if name == "tensorflow" else on_jax()
