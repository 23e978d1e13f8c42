import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from batchnorm.errors import OptionError, WorkerError
from batchnorm.lab import grid
from batchnorm.lab.arms import ARMS
from batchnorm.lab.data import load_data
from batchnorm.lab.train import Recipe, Task

DATA = load_data("digits")
RECIPE = Recipe("mlp", 8, 64)
TASKS = [Task(ARMS[arm], 0.1, seed) for arm in ("none", "before") for seed in range(3)]
TIMES = ("seconds", "memory_mb", "worker")


def rows(**options):
    finished = dict(grid.run(TASKS, RECIPE, DATA, **options))
    return [{k: v for k, v in finished[task].items() if k not in TIMES} for task in TASKS]


@pytest.fixture(scope="module")
def expected():
    return rows(jobs=1)


def test_two_processes_give_the_same_rows_with_one_thread_each(expected):
    got = rows(jobs=2)
    assert got == expected
    assert {row["threads"] for row in got} == {1}


def test_a_dask_cluster_gives_the_same_rows(expected):
    """A real cluster: a scheduler and two workers of two threads, which share torch's global generator."""
    import dask
    from distributed import LocalCluster

    from processes import warm

    warm()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
    ):
        assert rows(parallel="dask", cluster=cluster.scheduler_address) == expected


def test_a_ray_cluster_gives_the_same_rows(expected):
    port = str(_free_port())
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    # a socket's path may have 107 characters, which pytest's folders exceed
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        start = [ray, "start", "--head", "--block", "--port", port, "--num-cpus", "1", "--include-dashboard=false"]
        start += ["--disable-usage-stats", "--temp-dir", folder]
        with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
            try:
                _wait_for(int(port))
                program = (
                    "import sys; sys.path.insert(0, sys.argv[2]); import test_grid; "
                    "print(test_grid.rows(parallel='ray', cluster='127.0.0.1:' + sys.argv[1]) == test_grid.rows(jobs=1))"
                )
                command = [sys.executable, "-c", program, port, os.path.dirname(__file__)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
            finally:
                head.terminate()
    assert done.stdout.strip().endswith("True"), done.stderr


def test_no_cluster_is_said():
    nobody = f"127.0.0.1:{_free_port()}"
    with pytest.raises(
        OptionError, match=f"--parallel ray needs a running cluster at --cluster HOST:PORT, got {nobody}"
    ):
        list(grid.run(TASKS, RECIPE, DATA, parallel="ray", cluster=nobody))
    with pytest.raises(
        OptionError, match=f"--parallel dask needs a running cluster at --cluster .*got 'tcp://{nobody}'"
    ):
        list(grid.run(TASKS, RECIPE, DATA, parallel="dask", cluster=f"tcp://{nobody}"))
    with pytest.raises(OptionError, match="parallel must be one of processes, dask, ray, got 'threads'"):
        grid.run(TASKS, RECIPE, DATA, parallel="threads")


def test_a_worker_that_dies_is_said(elsewhere):
    (elsewhere / "deadly.py").write_text(
        "import os\nfrom torch import nn\n"
        "class Deadly(nn.Linear):\n    def forward(self, x): os._exit(9)\n"
        "def make(shape, classes, arm): return Deadly(3, classes)\n"
    )
    with pytest.raises(WorkerError, match=r"a worker process died.*the finished runs are kept"):
        list(grid.run(TASKS, Recipe("deadly:make", 8, 64), DATA, jobs=2))


def test_nothing_to_do_starts_nothing():
    assert list(grid.run([], RECIPE, DATA, parallel="dask", cluster="tcp://nowhere:1")) == []


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(port):
    import time

    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no Ray at port {port} after a minute")
