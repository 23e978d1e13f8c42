import subprocess
import sys

import pytest

from batchnorm.errors import OutputError
from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.store import Store
from batchnorm.lab.train import Task

TASK = Task(ARMS["none"], 0.1, 0)
EXPERIMENT = {"data": "abc", "steps": 5}


def test_a_row_survives_and_is_not_missing_again(tmp_path):
    other = Task(ARMS["none"], 0.1, 1)
    with Store(tmp_path / "out", EXPERIMENT) as store:
        store.add(TASK, {"arm": "none", "value": 0.1 + 0.2})
    with Store(tmp_path / "out", EXPERIMENT) as store:
        assert store.missing([TASK, other]) == [other]
        assert store.rows([TASK]) == [{"arm": "none", "value": 0.1 + 0.2}]


def test_an_arm_is_known_by_what_it_does_and_not_by_its_name(tmp_path):
    with Store(tmp_path, EXPERIMENT) as store:
        store.add(TASK, {"arm": "none"})
        same, different = Task(Arm("plain"), 0.1, 0), Task(Arm("none", bias=False), 0.1, 0)
        assert store.missing([same, different]) == [different]
        assert store.rows([same]) == [{"arm": "plain"}]


def test_rows_survive_a_process_that_is_killed(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from batchnorm.lab.arms import ARMS\n"
        "from batchnorm.lab.store import Store\n"
        "from batchnorm.lab.train import Task\n"
        "store = Store(Path(sys.argv[1]), {'data': 'abc', 'steps': 5})\n"
        "store.add(Task(ARMS['none'], 0.1, 0), {'arm': 'none'})\n"
        "store._rows.execute('BEGIN'); store._rows.execute(\"INSERT INTO runs VALUES ('half', 'ro')\")\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    with Store(tmp_path / "out", EXPERIMENT) as store:
        assert store.missing([TASK]) == []
        assert store._rows.execute("SELECT count(*) FROM runs").fetchone() == (1,)


def test_a_full_disk_is_said_and_what_was_there_is_kept(tmp_path):
    with Store(tmp_path, EXPERIMENT) as store:
        store.add(TASK, {"arm": "none"})
        store._rows.execute("PRAGMA max_page_count = 1")
        with pytest.raises(OutputError, match="database or disk is full; those before it are kept, make room"):
            store.add(Task(ARMS["none"], 0.1, 1), {"arm": "none", "curve": [0.5] * 100_000})
        assert store.missing([TASK]) == []


def test_another_experiment_is_refused_with_what_differs(tmp_path):
    Store(tmp_path, EXPERIMENT).close()
    with pytest.raises(OutputError, match=r"another comparison \(steps 5 there, 6 here\): choose another --out"):
        Store(tmp_path, EXPERIMENT | {"steps": 6})


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="must be new or of an earlier comparison"):
        Store(tmp_path, EXPERIMENT)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match=r"thesis.tex is a file"):
        Store(tmp_path / "thesis.tex", EXPERIMENT)


def test_a_store_that_is_no_database(tmp_path):
    (tmp_path / "runs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match="file is not a database"):
        Store(tmp_path, EXPERIMENT)


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be one that can be written"):
        Store(tmp_path / "file" / "out", EXPERIMENT)
