"""Hand tasks to workers: local processes, a Dask cluster or a Ray cluster. Rows come back as they are finished."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from typing import Any

import psutil

from batchnorm.errors import MissingDependencyError, OptionError, WorkerError
from batchnorm.lab.data import Dataset
from batchnorm.lab.frameworks import framework_of
from batchnorm.lab.tasks import Recipe, Row, Task

__all__ = ["PARALLEL", "run"]

PARALLEL = ("processes", "dask", "ray")

Finished = Iterator[tuple[Task, Row]]
Environment = dict[str, str]


def run(
    tasks: Sequence[Task],
    recipe: Recipe,
    data: Dataset,
    *,
    jobs: int = 1,
    parallel: str = "processes",
    cluster: str | None = None,
) -> Finished:
    """Train every task and yield ``(task, row)`` in the order of their ends.

    Args:
        tasks: what to train.
        recipe: what all runs share.
        data: sent to every worker once, not with every task.
        jobs: local processes, one thread each; a cluster decides itself.
        parallel: ``"processes"``, ``"dask"`` or ``"ray"``.
        cluster: address of the scheduler; ``None`` takes the one that the environment names.

    Raises:
        OptionError: unknown ``parallel``, or no cluster at the address.
        MissingDependencyError: the cluster's package is not installed.
    """
    if parallel not in PARALLEL:
        raise OptionError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if not tasks:
        return iter(())
    if parallel == "processes":
        jobs = min(jobs, len(tasks))
        return _processes(tasks, recipe, data, jobs) if jobs > 1 else (_train(task, recipe, data, {}) for task in tasks)
    return (_dask if parallel == "dask" else _ray)(tasks, recipe, data, cluster)


def _train(task: Task, recipe: Recipe, data: Dataset, environment: Environment) -> tuple[Task, Row]:
    os.environ.update(environment)
    framework = framework_of(recipe.model)
    with framework.alone():
        return task, framework.train(task, recipe, data)[1]


def _train_for(
    parent: int, folder: str, task: Task, recipe: Recipe, data: Dataset, environment: Environment
) -> tuple[Task, Row]:
    _end_with(parent)
    if folder not in sys.path:
        # a worker that is used again may have started elsewhere
        sys.path.insert(0, folder)
    return _train(task, recipe, data, environment)


@cache
def _end_with(parent: int) -> None:
    """End this worker when its parent is gone: one that was killed can't stop its workers itself."""

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ignored() -> Iterator[None]:
    """Let processes that start inside of the context ignore Ctrl-C, which reaches them too: who started them ends them."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        # only there can it be changed, and only what Python has set can be set again
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _processes(tasks: Sequence[Task], recipe: Recipe, data: Dataset, jobs: int) -> Finished:
    from joblib import Parallel, delayed, parallel_config

    environment = framework_of(recipe.model).environment()
    calls = (delayed(_train_for)(os.getpid(), os.getcwd(), task, recipe, data, environment) for task in tasks)
    try:
        with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
            with _ignored():
                finished = Parallel(return_as="generator_unordered", batch_size=1)(calls)
            yield from finished
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died, perhaps for lack of memory; the finished runs are kept: the same command continues, "
            "with fewer --jobs it needs less memory"
        ) from error


def _dask(tasks: Sequence[Task], recipe: Recipe, data: Dataset, address: str | None) -> Finished:
    try:
        from distributed import Client
        from joblib import Parallel, delayed, parallel_config
    except ImportError as error:
        raise MissingDependencyError("--parallel dask needs Dask: pip install 'batchnorm[dask]'") from error
    try:
        client: Any = Client(address, timeout="10s") if address else Client.current()  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--parallel dask needs a running cluster at --cluster tcp://HOST:PORT, got {address!r}: {error}"
        ) from error
    try:
        environment = framework_of(recipe.model).environment()
        with parallel_config(backend="dask", n_jobs=-1, client=client, scatter=[data]):
            yield from Parallel(return_as="generator_unordered", batch_size=1)(
                delayed(_train)(task, recipe, data, environment) for task in tasks
            )
    finally:
        if address:
            client.close()


def _check_reachable(address: str | None) -> None:
    """Ask for a Ray cluster's port before Ray does, which would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise OptionError(
            f"--parallel ray needs a running cluster at --cluster HOST:PORT, got {address}: {error}"
        ) from error


def _ray(tasks: Sequence[Task], recipe: Recipe, data: Dataset, address: str | None) -> Finished:
    """Run on Ray by its own calls: joblib's Ray backend can't return rows one by one, and rows must be durable."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("--parallel ray needs Ray: pip install 'batchnorm[ray]'") from error
    ours = not ray.is_initialized()
    _check_reachable(address)
    try:
        ray.init(address=address or "auto", ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise OptionError(
            f"--parallel ray needs a running cluster at --cluster HOST:PORT, got {address!r}: {error}"
        ) from error
    try:
        remote, shared = ray.remote(num_cpus=1)(_train), ray.put(data)
        environment = framework_of(recipe.model).environment()
        pending = [remote.remote(task, recipe, shared, environment) for task in tasks]
        while pending:
            done, pending = ray.wait(pending)
            yield ray.get(done[0])
    finally:
        if ours:
            ray.shutdown()
