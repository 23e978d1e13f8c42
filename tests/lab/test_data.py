import gzip
import struct

import numpy as np
import polars as pl
import pytest
from PIL import Image

from batchnorm.errors import DataError
from batchnorm.lab.data import load_data


@pytest.fixture
def table(rng):
    return pl.DataFrame({"a": rng.normal(size=40), "b": rng.integers(0, 9, 40), "kind": ["x", "y"] * 20})


def write_idx(path, values, opener=open):
    codes = {"uint8": 8, "int32": 12, "float32": 13}
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, codes[str(values.dtype)], values.ndim, *values.shape)
    with opener(path, "wb") as file:
        file.write(head + values.astype(values.dtype.newbyteorder(">")).tobytes())


def write_mnist(folder, rng, n=40, opener=open, ending=""):
    for name, count in (("train", n), ("t10k", n // 2)):
        images = rng.integers(0, 256, (count, 6, 5)).astype(np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", images, opener)
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", (np.arange(count) % 4).astype(np.uint8), opener)


def write_images(folder, rng, sizes=((8, 8),), classes=("cat", "dog")):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(6):
            width, height = sizes[i % len(sizes)]
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path, table, separator):
    table.write_csv(tmp_path / "t.csv", separator=separator)
    data = load_data(tmp_path / "t.csv", target="kind")
    assert data.x.shape == (40, 2)
    assert data.classes == ("x", "y")
    assert data.y[:4].tolist() == [0, 1, 0, 1]


def test_csv_with_byte_order_mark_and_bools(tmp_path):
    rows = "".join(f"{i},{i % 2 == 0},{i % 3}\n".lower() for i in range(30))
    (tmp_path / "t.csv").write_bytes("\ufeffa,even,label\n".encode() + rows.encode())
    data = load_data(tmp_path / "t.csv", target="label")
    assert data.x[:2].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_parquet_and_drop(tmp_path, table):
    table.with_columns(note=pl.lit("text")).write_parquet(tmp_path / "t.parquet")
    data = load_data(tmp_path / "t.parquet", target="kind", drop=("note",))
    np.testing.assert_array_equal(data.x[:, 0], table["a"].to_numpy().astype(np.float32))


@pytest.mark.parametrize("shape", [(30, 7), (30, 4, 5), (30, 3, 8, 9), (30, 8, 9, 3)])
def test_npz_in_all_layouts(tmp_path, rng, shape):
    np.savez(tmp_path / "d.npz", x=rng.normal(size=shape), y=np.arange(30) % 3)
    data = load_data(tmp_path / "d.npz")
    assert data.x.shape == {2: (30, 7), 3: (30, 1, 4, 5), 4: (30, 3, 8, 9)}[len(shape)]
    assert data.x.dtype == np.float32


def test_npz_with_its_own_test_set(tmp_path, rng):
    x, y = rng.normal(size=(30, 4)), np.repeat(["b", "a", "c"], 10)
    np.savez(tmp_path / "d.npz", x=x, y=y, x_test=x[:9], y_test=y[:9])
    split = load_data(tmp_path / "d.npz").split(3)
    assert (len(split.y_train), len(split.y_val), len(split.y_test)) == (24, 6, 9)
    assert set(split.y_test) == {1}


@pytest.mark.parametrize(("opener", "ending"), [(open, ""), (gzip.open, ".gz")])
def test_idx_folder_and_file(tmp_path, rng, opener, ending):
    write_mnist(tmp_path, rng, opener=opener, ending=ending)
    data = load_data(tmp_path)
    assert data.x.shape == (40, 1, 6, 5)
    assert data.x_test.shape == (20, 1, 6, 5)
    assert load_data(tmp_path / f"train-images-idx3-ubyte{ending}").fingerprint == data.fingerprint


def test_folder_of_class_folders(tmp_path, rng):
    write_images(tmp_path, rng, classes=("dog", "cat"))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"\0")
    data = load_data(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.x.shape == (12, 3, 8, 8)
    assert load_data(tmp_path, image_size=(5, 4)).x.shape == (12, 3, 4, 5)


def test_split_is_stratified_disjoint_and_by_seed():
    data = load_data("digits")
    first, again, other = data.split(0), data.split(0), data.split(1)
    sizes = [len(y) for y in (first.y_train, first.y_val, first.y_test)]
    assert sizes == [1078, 359, 360]
    np.testing.assert_array_equal(first.x_train, again.x_train)
    assert not np.array_equal(first.y_train, other.y_train)
    rows = np.concatenate([first.x_train, first.x_val, first.x_test]).reshape(1797, -1)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, data.x.reshape(1797, -1)))
    assert np.ptp(np.bincount(first.y_test)) <= 2


def test_the_fingerprint_is_of_the_values(rng):
    x, y = rng.normal(size=(20, 3)), np.arange(20) % 2
    assert load_data((x, y)).fingerprint == load_data((x.copy(), y.copy())).fingerprint
    assert load_data((x + 1, y)).fingerprint != load_data((x, y)).fingerprint
    assert load_data((x, 1 - y)).fingerprint != load_data((x, y)).fingerprint


def bad_tables():
    """Return what is wrong, how to spoil a good table, and what must be said."""
    number = [float(i) for i in range(40)]
    return [
        ("text", {"city": ["Bern"] * 40}, "'city' holds text: encode as numbers, or leave out with --drop city"),
        ("constant", {"c": [3.0] * 40}, "'c' hold.* one value only: leave out with --drop c"),
        ("empty", {"e": [None] * 40}, "'e' hold.* no value at all: leave out with --drop e"),
        ("missing", {"m": [None, *number[1:]]}, "column 'm' has 1 missing, NaN or infinite, the first in data row 1"),
        ("nan", {"n": [*number[:-1], float("nan")]}, "column 'n' has 1 .*the first in data row 40"),
        ("inf", {"i": [1.0, float("inf"), *number[2:]]}, "column 'i' has 1 .*the first in data row 2"),
    ]


@pytest.mark.parametrize(("reason", "columns", "message"), bad_tables(), ids=[case[0] for case in bad_tables()])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_column_that_teaches_nothing(tmp_path, table, reason, columns, message, ending):
    path = tmp_path / f"t.{ending}"
    getattr(table.with_columns(**{k: pl.Series(v) for k, v in columns.items()}), f"write_{ending}")(path)
    with pytest.raises(DataError, match=message):
        load_data(path, target="kind")


def test_a_missing_target_names_the_columns(tmp_path, table):
    table.write_csv(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no target was named; choose one with --target: 'a', 'b', 'kind'"):
        load_data(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no column 'label'; choose one with --target: 'a', 'b', 'kind'"):
        load_data(tmp_path / "t.csv", target="label")
    with pytest.raises(DataError, match="no column 'z' to drop; it has 'a', 'b', 'kind'"):
        load_data(tmp_path / "t.csv", target="kind", drop=("z",))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x"] * 40, "at least two classes, all 40 rows are of class x"),
        ([*["x"] * 38, "y", "y"], "at least 5 rows to be split, class y has 2"),
        ([i / 10 for i in range(40)], "labels must be classes, but y holds fractions such as 0.1"),
        ([*["x"] * 20, *["y"] * 19, None], "must have a value in every row, 1 are missing"),
    ],
    ids=["one class", "rare class", "a quantity", "missing label"],
)
def test_labels_that_are_no_classes(tmp_path, table, labels, message):
    table.with_columns(kind=pl.Series(labels)).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "t.parquet", target="kind")


def test_a_quantity_in_whole_numbers():
    with pytest.raises(DataError, match="2000 distinct values: is it a quantity"):
        load_data((np.random.default_rng(0).normal(size=(2000, 2)), np.arange(2000)))


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "d.npz", "train-images-idx3-ubyte", "images/cat/0.png"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_refused_by_name(tmp_path, table, rng, name, damage):
    table.write_csv(tmp_path / "t.csv")
    table.write_parquet(tmp_path / "t.parquet")
    np.savez_compressed(tmp_path / "d.npz", x=rng.normal(size=(40, 3)), y=np.arange(40) % 2)
    write_mnist(tmp_path, rng)
    write_images(tmp_path / "images", rng)
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) * 2 // 3], "garbage": rng.bytes(500), "empty": b""}[damage])
    source = tmp_path / "images" if "images/" in name else path
    if (name, damage) == ("t.csv", "truncated"):
        # a text table that ends early is a shorter table, but its last row is not whole
        path.write_bytes(content[: content.rindex(b",")])
    with pytest.raises(DataError) as caught:
        load_data(source, target="kind")
    assert path.name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}] * 20, dtype=object), y=np.arange(20) % 2)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        load_data(tmp_path / "d.npz")


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder: .*nothing\.csv"):
        load_data(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="a sub-folder of images for each class, or IDX files; it holds neither"):
        load_data(tmp_path)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(DataError, match=r"must be a .csv, .tsv, .parquet, .npz or IDX file, or a folder; .*'.txt'"):
        load_data(tmp_path / "t.txt")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="must hold images, none was found"):
        load_data(tmp_path)


def test_images_of_several_sizes(tmp_path, rng):
    write_images(tmp_path, rng, sizes=((8, 8), (9, 7)))
    with pytest.raises(DataError, match=r"0.png is 8×8 and .*1.png is 9×7: choose one with --image-size"):
        load_data(tmp_path)


def test_idx_without_labels_or_with_too_few(tmp_path, rng):
    write_mnist(tmp_path, rng)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(DataError, match="holds 40 images, but train-labels-idx1-ubyte holds 7 labels"):
        load_data(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="needs its labels beside it, in train-labels-idx1-ubyte"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((20, 3)), np.arange(20) % 2, "the rows of x must differ, all 20 are the same"),
        (np.full((20, 3), np.nan), np.arange(20) % 2, "the first that is not is in row 1"),
        (np.eye(20)[:, :3] * 1e39, np.arange(20) % 2, "must be finite in float32"),
        (np.eye(20), np.eye(20), r"one label for each of the 20 rows, got the shape \(20, 20\)"),
        (np.eye(20), np.arange(19), r"one label for each of the 20 rows, got the shape \(19,\)"),
        (np.zeros(20), np.arange(20) % 2, r"got float64 of shape \(20,\)"),
        (np.full((20, 3), "a"), np.arange(20) % 2, r"got <U1 of shape \(20, 3\)"),
        (np.zeros((0, 3)), np.zeros(0), r"got float64 of shape \(0, 3\)"),
    ],
)
def test_arrays_that_can_not_be_learned_from(x, y, message):
    with pytest.raises(DataError, match=message):
        load_data((x, y))
