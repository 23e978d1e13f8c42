"""Files of ONNX models: whole, cut off, hostile, and in the place of something else."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from batchnorm.errors import DataError, OptionError, OutputError
from batchnorm.fold import fold
from batchnorm.models import load as load_any
from batchnorm.onnx import files
from batchnorm.onnx.files import load, save
from batchnorm.summary import summary
from onnx_graphs import Build, folded, ops


def network():
    b = Build("float32")
    y = b.node("Conv", b.input(["n", 3, 8, 8]), b.random(16, 3, 3, 3, name="w"), name="conv")
    return b.model(b.norm(y, 16))


@pytest.fixture
def path(tmp_path):
    onnx.save(network(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def apart(tmp_path):
    """A model whose weights are in a file of their own."""
    onnx.save(network(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    return tmp_path / "net.onnx"


def test_there_and_back(path, tmp_path):
    model = load(path)
    assert model == network()
    save(model, tmp_path / "new.onnx")
    assert load_any(str(tmp_path / "new.onnx")) == model
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "new.onnx"]


def test_folding_a_file(path):
    assert ops(fold(str(path)).model) == ["Conv"]
    assert ops(fold(path).model) == ["Conv"]


def test_weights_in_another_file(apart):
    model = load(apart)
    assert model == network()
    folded(model, bound=1e-5)


def test_weights_beyond_one_message(path, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1000)
    save(load(path), tmp_path / "large.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "net.onnx"]
    assert load(tmp_path / "large.onnx") == network()


def test_a_large_model_is_folded_by_way_of_a_file(path, monkeypatch):
    for room in ("files", "model", "running"):
        monkeypatch.setattr(f"batchnorm.onnx.{room}.LIMIT", 100)
    result = folded(load(path), bound=1e-5)
    assert ops(result.model) == ["Conv"]


def test_nothing_is_written_in_part(path, monkeypatch):
    before = path.read_bytes()

    def break_off(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(OutputError, match="No space left"):
        save(network(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match=r"net\.onnx"):
        save(network(), tmp_path / "none" / "net.onnx")


def zipped():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("data.pkl", b"")
    return data.getvalue()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no graph with a version"),
        (b"hello world, this is text", "something else, damaged or cut off|holds no graph"),
        (zipped(), "it is a zip archive"),
        (pickle.dumps(Bomb()), "it is a pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "it is an HDF5 file"),
        (bytes(1000), "something else, damaged or cut off"),
        (b"\x08\x08", "holds no graph with a version"),
    ],
)
def test_what_is_no_model(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "net.onnx")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.onnx must be an ONNX model that can be read: No such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(DataError, match="Is a directory"):
        load(tmp_path)


def test_a_file_that_is_cut_off_anywhere(path):
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        # what is left may be a message, but never a valid model
        with pytest.raises((DataError, OptionError)):
            fold(load(path))


def test_a_file_with_a_flipped_bit(path, rng):
    data = path.read_bytes()
    for _ in range(60):
        place, broken = rng.integers(len(data)), bytearray(data)
        broken[place] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            # a number may have become a NaN of the kind that warns
            with np.errstate(invalid="ignore"):
                result = fold(load(path))
        except (DataError, OptionError):
            continue
        # a weight, a name or a number was flipped: another model, folded or declined
        assert len(result.folded) + len(result.kept) <= 1


def claim(path, **about):
    """Change what a model says of the file that its first weight is in."""
    model = onnx.load(path, load_external_data=False)
    entries = {e.key: e.value for e in model.graph.initializer[0].external_data} | about
    del model.graph.initializer[0].external_data[:]
    for key, value in entries.items():
        if value is not None:
            model.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"location": "../secret"}, r"in its own folder, got the location '\.\./secret': it was not opened"),
        ({"location": "/etc/passwd"}, "it was not opened"),
        ({"location": "sub/../../secret"}, "it was not opened"),
        ({"location": "..\\secret"}, "it was not opened"),
        ({"location": "link"}, "it was not opened"),
        ({"location": "there/secret"}, "it was not opened"),
        ({"location": ""}, "it was not opened"),
        ({"location": "a\0b"}, "it was not opened"),
        ({"location": "."}, "ordinary file"),
        ({"location": "pipe"}, "ordinary file"),
        ({"location": "none"}, "the weights 'w' of .* must be in none: No such file"),
        ({"length": "99999999999"}, "must be 1,728 bytes, net.data has .* and 99,999,999,999 of them"),
        ({"length": "-1"}, "must be 1,728 bytes"),
        ({"offset": "-8"}, "at offset -8"),
        ({"offset": "1000000"}, "at offset 1,000,000"),
        ({"length": "1720"}, "1,720 of them"),
        ({"length": None, "offset": "0"}, "damaged, cut off or another one"),
        ({"offset": "zero"}, "whole numbers as offset and length"),
    ],
)
def test_weights_from_somewhere_else(apart, tmp_path, about, words):
    (tmp_path.parent / "secret").write_bytes(bytes(1728))
    (tmp_path / "link").symlink_to(tmp_path.parent / "secret")
    (tmp_path / "there").symlink_to(tmp_path.parent)
    os.mkfifo(tmp_path / "pipe")
    claim(apart, **about)
    with pytest.raises(DataError, match=words):
        load(apart)


def test_weights_of_a_constant_are_looked_at_too(apart):
    model = network()
    tensor = TensorProto(name="t", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    apart.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="it was not opened"):
        load(apart)


def test_weights_that_are_cut_off(apart):
    data = apart.with_name("net.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged, cut off or another one"):
        load(apart)


def test_weights_that_were_not_loaded(apart):
    with pytest.raises(DataError, match=r"'w' must be in the model.*onnx\.load"):
        fold(onnx.load(apart, load_external_data=False))


@pytest.mark.parametrize("dims", [[2**40], [2**31, 2**31, 2**31], [8, 3, 3, 4], [-8, 3, 3, 3], [0]])
def test_sizes_that_are_not_true(dims):
    model = network()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    with pytest.raises(DataError, match=r"tensor 'w' .*must h"):
        fold(model)


def test_a_model_that_breaks_the_standard():
    model = network()
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(DataError, match=r"must be valid ONNX, the checker says: .*nowhere"):
        fold(model)


def test_a_summary():
    rows = summary(network()).layers
    assert [(row.name, row.kind, row.output_shape, row.parameters, row.statistics) for row in rows] == [
        ("conv", "Conv", (None, 16, 6, 6), 432, 0),
        ("bn", "BatchNormalization", (None, 16, 6, 6), 64, 32),
    ]
    assert not any(row.trainable for row in rows)
    assert "464 frozen" in str(summary(network(), np.zeros((5, 3, 8, 8))))
