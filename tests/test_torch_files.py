"""Files of torch programs: there and back, cut off, and hostile ones, of which nothing may be executed."""

import contextlib
import io
import json
import logging
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.errors import BatchNormError, DataError, OptionError, OutputError
from batchnorm.fold import fold
from batchnorm.summary import summary
from batchnorm.torch.files import load, save


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def exported(dynamic=False):
    sizes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(network(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The entries of a file as torch writes it, in order."""
    path = tmp_path_factory.mktemp("good") / "net.pt2"
    torch.export.save(exported(), path)
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that hostile code would create, in a folder that modules are imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "executed"


def written(path, entries):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in entries:
            archive.writestr(name, data)
    return path


def edited(entries, ending, change):
    assert sum(name.endswith(ending) for name, _ in entries) == 1
    return [(name, change(data) if name.endswith(ending) else data) for name, data in entries]


def edited_json(entries, ending, change):
    def edit(data):
        document = json.loads(data)
        changed = change(document)
        return json.dumps(document if changed is None else changed).encode()

    return edited(entries, ending, edit)


def program(entries, change):
    return edited_json(entries, "models/model.json", change)


def renamed(entries, old, new):
    assert any(old in name for name, _ in entries)
    return [(name.replace(old, new), data) for name, data in entries]


def root(entries):
    return entries[0][0].split("/")[0]


def as_pt(value):
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def evil(marker):
    """Return an object that writes a file when it is unpickled."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    return Evil()


def code(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_comes_back_as_it_was(tmp_path, dynamic):
    before = exported(dynamic)
    save(before, tmp_path / "net.pt2", None)
    after = load(tmp_path / "net.pt2")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(after.module()(x), before.module()(x))
    assert list(after.state_dict) == list(before.state_dict)
    if dynamic:
        assert after.module()(torch.randn(5, 3, 8, 8)).shape[0] == 5
    assert [f.name for f in tmp_path.iterdir()] == ["net.pt2"]


class Sizes(nn.Module):
    """Asks for sizes, so that its program does arithmetic on them."""

    def __init__(self):
        super().__init__()
        self.net, self.linear = network(), nn.Linear(4, 2)

    def forward(self, x, *, y=None):
        h = self.net(x)
        n, c, height, width = h.shape
        h = h.reshape(n, c, height * width).mean(2)
        return {"a": self.linear(h), "b": (h if y is None else h + y, x[:, :, : height // 2 + 1])}


def test_a_program_with_arithmetic_on_sizes_and_named_inputs_is_read(tmp_path):
    sizes = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}, "y": None}
    args, named = (torch.randn(3, 3, 9, 8),), {"y": torch.randn(1, 4)}
    before = torch.export.export(Sizes().eval(), args, named, dynamic_shapes=sizes)
    torch.export.save(before, tmp_path / "net.pt2")
    after = load(tmp_path / "net.pt2")
    x = torch.randn(4, 3, 10, 12)
    expected, got = before.module()(x, **named), after.module()(x, **named)
    assert torch.equal(got["a"], expected["a"])
    assert all(torch.equal(a, b) for a, b in zip(got["b"], expected["b"], strict=True))


def test_a_module_is_written_as_a_program_that_computes_the_same(tmp_path):
    model, x = network(), torch.randn(2, 3, 8, 8)
    save(model, tmp_path / "net.pt2", x)
    assert torch.equal(load(tmp_path / "net.pt2").module()(x), model(x))


def test_a_folded_file_can_be_read_and_folded_again(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    save(fold(exported()).model, tmp_path / "net.pt2", None)
    again = load(tmp_path / "net.pt2")
    torch.testing.assert_close(again.module()(x), network()(x))
    assert fold(again).folded == ()


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_tensors_come_back_as_they_were(tmp_path, ending):
    from safetensors.torch import load_file

    model = network()
    # views and shared memory are no matter
    model[0].weight.data = model[0].weight.data.transpose(2, 3)
    model.tied = nn.Conv2d(3, 4, 3)
    model.tied.weight = model[0].weight
    save(model, tmp_path / f"net{ending}", None)
    found = load_file(tmp_path / "net.safetensors") if ending == ".safetensors" else torch.load(tmp_path / "net.pt")
    assert list(found) == list(model.state_dict()) or sorted(found) == sorted(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_what_can_not_be_exported_is_said_and_nothing_is_written(tmp_path):
    class Python(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    (tmp_path / "net.pt2").write_text("of yesterday")
    with pytest.raises(OptionError, match=r"export.*write .safetensors instead"):
        save(Python(), tmp_path / "net.pt2", torch.randn(3))
    assert (tmp_path / "net.pt2").read_text() == "of yesterday"
    assert [f.name for f in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.parametrize("ending", [".pt2", ".safetensors", ".pt"])
def test_a_folder_that_is_missing_is_an_error_of_ours(tmp_path, ending):
    with pytest.raises(OutputError, match="must be a file that can be written"):
        save(network(), tmp_path / "absent" / f"net{ending}", torch.randn(2, 3, 8, 8))


# --- damaged ------------------------------------------------------------------------------------------------

DAMAGED = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "cut off": lambda data: data[: len(data) // 2],
    "cut off at the end": lambda data: data[:-4],
    "start missing": lambda data: data[200:],
    "a pickle": lambda data: pickle.dumps({"a": 1}),
    "an empty zip": lambda data: b"PK\5\6" + 18 * b"\0",
    "weights of torch": lambda data: as_pt({"weight": torch.ones(2)}),
    "a flipped byte": lambda data: data[:300] + bytes([data[300] ^ 255]) + data[301:],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, good, damage):
    path = written(tmp_path / "net.pt2", good)
    data = DAMAGED[damage](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(DataError, match=r"net\.pt2 must"):
        load(path)


@pytest.mark.parametrize(
    "ending", ["models/model.json", "model_weights_config.json", "model_constants_config.json", "weight_0", "model.pt"]
)
@pytest.mark.parametrize("how", ["without", "empty", "half", "nonsense"])
def test_a_file_with_a_damaged_part_is_refused(tmp_path, good, ending, how):
    changes = {"empty": lambda d: b"", "half": lambda d: d[: len(d) // 2], "nonsense": lambda d: b"[1, {}]"}
    if how == "without":
        entries = [(name, data) for name, data in good if not name.endswith(ending)]
    else:
        entries = edited(good, ending, changes[how])
    path = written(tmp_path / "net.pt2", entries)
    with pytest.raises(DataError, match=r"net\.pt2 must"):
        load(path)


# --- hostile ------------------------------------------------------------------------------------------------


def sample_inputs(marker):
    return as_pt(((torch.randn(2, 3, 8, 8),), {"z": evil(marker)}))


def pickled_sample_inputs(good, marker):
    return edited(good, "sample_inputs/model.pt", lambda _: sample_inputs(marker))


def pickled_sample_inputs_beside_good_ones(good, marker):
    return [*good, (f"{root(good)}/data/sample_inputs/model.pt", sample_inputs(marker))]


def good_sample_inputs_beside_pickled_ones(good, marker):
    return [*pickled_sample_inputs(good, marker), *[entry for entry in good if "sample_inputs" in entry[0]]]


def sample_inputs_in_capitals(good, marker):
    return renamed(pickled_sample_inputs(good, marker), "model.pt", "model.PT")


def sample_inputs_without_ending(good, marker):
    return renamed(pickled_sample_inputs(good, marker), "model.pt", "model.pT")


def with_pickles(document):
    document["config"]["0.weight"]["use_pickle"] = True


def pickled_weight(good, marker):
    entries = edited_json(good, "model_weights_config.json", with_pickles)
    return edited(entries, "weight_0", lambda _: as_pt(evil(marker)))


def pickled_weight_whose_configuration_is_there_twice(good, marker):
    return [*pickled_weight(good, marker), *[entry for entry in good if "weights_config" in entry[0]]]


def pickled_weight_whose_configuration_is_in_capitals(good, marker):
    return renamed(pickled_weight(good, marker), "model_weights_config.json", "model_weights_config.JSON")


def pickled_tensors_of_an_older_format(good, marker):
    return [*good, (f"{root(good)}/data/weights/model.pt", as_pt({"0.weight": evil(marker)}))]


def pickled_constants_of_an_older_format(good, marker):
    return [*good, (f"{root(good)}/data/constants/model.pt", as_pt({"c": evil(marker)}))]


ONE_BYTE = {
    "dtype": 1, "sizes": [], "requires_grad": False, "device": {"type": "cpu", "index": None}, "strides": [],
    "storage_offset": {"as_int": 0}, "layout": 7,
}  # fmt: skip


def constant(good, name, data, path=None):
    entry = {"path_name": path or name, "is_param": False, "use_pickle": False, "tensor_meta": ONE_BYTE}
    entries = edited_json(good, "model_constants_config.json", lambda _: {"config": {"c": entry}})
    return [*entries, (f"{root(good)}/data/constants/{name}", data)]


def opaque_object(good, marker):
    return constant(good, "opaque_obj_0", pickle.dumps(evil(marker)))


def opaque_object_in_capitals(good, marker):
    return constant(good, "OPAQUE_OBJ_0", pickle.dumps(evil(marker)), "opaque_obj_0")


def opaque_object_in_another_place(good, marker):
    entries = constant(good, "x", b"", "opaque_obj_0/../../other")
    return [*entries, (f"{root(good)}/data/constants/opaque_obj_0/../../other", pickle.dumps(evil(marker)))]


def custom_object(good, marker):
    return constant(good, "custom_obj_0", as_pt(evil(marker)))


def custom_object_in_capitals(good, marker):
    return constant(good, "Custom_Obj_0", as_pt(evil(marker)), "custom_obj_0")


def shared_library(good, marker):
    return [*good, (f"{root(good)}/data/aotinductor/model/model.wrapper.so", b"\x7fELF")]


def compiled_code(good, marker):
    return [*good, (f"{root(good)}/data/aotinductor/model/model.cpp", b"int main(){}")]


def with_size(good, text):
    def change(document):
        for value in document["graph_module"]["graph"]["tensor_values"].values():
            if value["sizes"]:
                value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return program(good, change)


def size_that_is_code(good, marker):
    return with_size(good, code(marker))


def size_that_executes(good, marker):
    return with_size(good, f"exec({code(marker)!r})")


def size_that_reaches_attributes(good, marker):
    return with_size(good, f"Symbol('s0').__class__.__init__.__globals__['__builtins__']['exec']({code(marker)!r})")


def size_that_is_code_in_a_program_of_another_ending(good, marker):
    return renamed(size_that_is_code(good, marker), "models/model.json", "models/model.jsox")


def size_that_is_code_in_capitals(good, marker):
    return renamed(size_that_is_code(good, marker), "models/model.json", "models/model.JSON")


def size_that_is_code_under_an_escaped_key(good, marker):
    entries = size_that_is_code(good, marker)
    return edited(entries, "models/model.json", lambda data: data.replace(b'"expr_str"', b'"\\u0065xpr_str"'))


def size_that_is_code_under_two_keys(good, marker):
    entries = size_that_is_code(good, marker)
    return edited(
        entries, "models/model.json", lambda data: data.replace(b'"expr_str"', b'"expr_str": "2", "expr_str"')
    )


def with_target(good, target):
    def change(document):
        document["graph_module"]["graph"]["nodes"][-1]["target"] = target

    return program(good, change)


def target_of_the_system(good, marker):
    return with_target(good, "torch.os.system")


def target_that_loads_a_library(good, marker):
    return with_target(good, "torch.ops.load_library")


def target_of_a_program_of_another_ending(good, marker):
    return renamed(with_target(good, "torch.os.system"), "models/model.json", "models/model.jsox")


def target_that_is_built_in(good, marker):
    return with_target(good, "builtins.eval")


def target_of_an_extension(good, marker):
    return with_target(good, "#os.system")


def target_that_loads_a_pickle(good, marker):
    return with_target(good, "torch.load")


def target_that_writes_a_file(good, marker):
    def change(document):
        graph = document["graph_module"]["graph"]
        graph["nodes"].append({
            **graph["nodes"][-1], "target": "torch.ops.aten.from_file.default", "name": "mapped",
            "outputs": [{"as_tensor": {"name": "mapped"}}],
            "inputs": [
                {"name": "filename", "arg": {"as_string": str(marker)}, "kind": 1},
                {"name": "shared", "arg": {"as_bool": True}, "kind": 2},
                {"name": "size", "arg": {"as_int": 4}, "kind": 2},
            ],
        })  # fmt: skip
        four = {"sizes": [{"as_int": 4}], "strides": [{"as_int": 1}]}
        graph["tensor_values"]["mapped"] = graph["tensor_values"]["relu"] | four
        graph["outputs"] = [{"as_tensor": {"name": "mapped"}}]
        output = document["graph_module"]["signature"]["output_specs"][0]
        output["user_output"]["arg"]["as_tensor"]["name"] = "mapped"

    return program(good, change)


def argument_that_is_a_function(good, marker):
    def change(document):
        node = document["graph_module"]["graph"]["nodes"][-1]
        node["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}

    return program(good, change)


def structure(good, marker, spec):
    (marker.parent / "brought_along.py").write_text(f"open({str(marker)!r}, 'w').close()\nfactory = dict\n")
    leaf = {"type": None, "context": None, "children_spec": []}

    def change(document):
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, {**spec, "children_spec": [leaf]}])

    return program(good, change)


def structure_that_imports_an_enumeration(good, marker):
    keys = [{"__enum__": True, "fqn": "brought_along:factory", "name": "a"}]
    return structure(good, marker, {"type": "builtins.dict", "context": json.dumps(keys)})


def structure_that_imports_a_default(good, marker):
    context = {
        "default_factory_module": "brought_along", "default_factory_name": "factory", "dict_context": ["a"],
    }  # fmt: skip
    return structure(good, marker, {"type": "collections.defaultdict", "context": context})


def name_of_an_input_that_is_code(good, marker):
    name = f"z={code(marker)}"

    def change(document):
        for node in document["graph_module"]["graph"]["nodes"]:
            for given in node["inputs"]:
                given["name"] = "self" if given["name"] == "input" else given["name"]
        text = json.dumps(document).replace('"input"', json.dumps(name)).replace('"self"', '"input"')
        return json.loads(text)

    return program(good, change)


def name_of_a_value_that_is_code(good, marker):
    # an assignment to it and a use of it are both Python
    name = f"({code(marker)} or __import__('types').SimpleNamespace()).a"
    return program(good, lambda document: json.loads(json.dumps(document).replace('"conv2d"', json.dumps(name))))


def name_of_an_argument_that_is_code(good, marker):
    def change(document):
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [f"x={code(marker)}"]

    return program(good, change)


def keyword_that_is_code(good, marker):
    def change(document):
        node = document["graph_module"]["graph"]["nodes"][-1]
        node["inputs"].append({"name": f"z={code(marker)}, y", "arg": {"as_int": 1}, "kind": 2})

    return program(good, change)


def guard_that_is_code(good, marker):
    return program(good, lambda document: document.update(guards_code=[code(marker)]))


HOSTILE = (
    pickled_sample_inputs, pickled_sample_inputs_beside_good_ones, good_sample_inputs_beside_pickled_ones,
    sample_inputs_in_capitals, sample_inputs_without_ending, pickled_weight,
    pickled_weight_whose_configuration_is_there_twice, pickled_weight_whose_configuration_is_in_capitals,
    pickled_tensors_of_an_older_format, pickled_constants_of_an_older_format, opaque_object, opaque_object_in_capitals,
    opaque_object_in_another_place, custom_object, custom_object_in_capitals, shared_library, compiled_code,
    size_that_is_code, size_that_executes, size_that_reaches_attributes,
    size_that_is_code_in_a_program_of_another_ending, size_that_is_code_in_capitals,
    size_that_is_code_under_an_escaped_key, size_that_is_code_under_two_keys, target_of_the_system,
    target_that_loads_a_library, target_of_a_program_of_another_ending, target_that_is_built_in, target_of_an_extension,
    target_that_loads_a_pickle, target_that_writes_a_file, argument_that_is_a_function,
    structure_that_imports_an_enumeration, structure_that_imports_a_default, name_of_an_input_that_is_code,
    name_of_a_value_that_is_code, name_of_an_argument_that_is_code, keyword_that_is_code, guard_that_is_code,
)  # fmt: skip


def use(path):
    """Do with a file all that a user does; our errors are fine."""
    try:
        model = load(path)
    except DataError as error:
        return str(error)
    for verb in (fold, summary, lambda loaded: loaded.module()(torch.randn(2, 3, 8, 8))):
        try:
            verb(model)
        except BatchNormError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_nothing_of_a_hostile_file_is_executed(tmp_path, good, marker, attack):
    path = written(tmp_path / "net.pt2", attack(good, marker))
    said = use(path)
    assert not marker.exists()
    # guards are not read at all, everything else is refused
    assert "net.pt2 must" in said or attack is guard_that_is_code


def test_an_archive_that_two_readers_read_differently_is_refused_or_harmless(tmp_path, good, marker):
    """Python's reader adds the length of whatever stands before an archive to all offsets, torch's does not."""

    def parts(entries):
        data = written(tmp_path / "part.pt2", entries).read_bytes()
        end = data.rfind(b"PK\5\6")
        size, start = struct.unpack("<II", data[end + 12 : end + 20])
        return data[:start], data[start : start + size], data[end:]

    first, directory, _ = parts(pickled_sample_inputs(good, marker))
    second, harmless, end = parts(good)
    assert len(directory) == len(harmless)
    moved, i = bytearray(harmless), 0
    while i < len(moved):
        lengths = struct.unpack("<HHH", moved[i + 28 : i + 34])
        (offset,) = struct.unpack("<I", moved[i + 42 : i + 46])
        moved[i + 42 : i + 46] = struct.pack("<I", offset + len(first) - len(second))
        i += 46 + sum(lengths)
    end = end[:12] + struct.pack("<II", len(directory), len(first)) + end[20:]
    path = tmp_path / "net.pt2"
    path.write_bytes(first + directory + second + bytes(moved) + end)
    use(path)
    assert not marker.exists()


def test_the_fixtures_would_execute_code(tmp_path, good, marker):
    """A test of the tests: torch's own reader does what ours must not do."""
    path = written(tmp_path / "net.pt2", pickled_sample_inputs(good, marker))
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert marker.exists()


class OddNames(nn.Module):
    """Inputs and layers that are called as keys of the format are."""

    def __init__(self):
        super().__init__()
        self.name, self.use_pickle, self.target = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, metadata, guards_code, in_spec):
        return {"target": self.name(metadata), "x y": self.use_pickle(guards_code) + self.target(in_spec)}


def test_a_harmless_program_with_odd_names_is_read(tmp_path):
    inputs = tuple(torch.randn(3, 2, 3))
    before = torch.export.export(OddNames(), inputs)
    torch.export.save(before, tmp_path / "net.pt2")
    after = load(tmp_path / "net.pt2").module()(*inputs)
    assert all(torch.equal(after[key], value) for key, value in before.module()(*inputs).items())


def test_nothing_is_said_beside_the_error(tmp_path, good, monkeypatch):
    """Torch logs a traceback where a tensor is cut off, into the stream that was there when it was imported."""
    said = []
    monkeypatch.setattr(logging.Logger, "handle", lambda _, record: said.append(record))
    path = written(tmp_path / "net.pt2", edited(good, "weight_0", lambda data: data[: len(data) // 2]))
    with pytest.raises(DataError, match=r"net\.pt2 must"):
        load(path)
    assert said == []


@pytest.mark.timeout(30)
def test_a_size_that_would_take_for_ever_is_refused(tmp_path, good):
    path = written(tmp_path / "net.pt2", with_size(good, "Integer(9)**9**9**9**9"))
    assert "net.pt2 must" in use(path)
