"""Read the archive of a ``torch.export`` program without trusting it.

``torch.export.load`` unpickles, evaluates and imports what an archive asks for. So every entry is read here, held against a
closed list of what a program of tensors needs, and written into a fresh archive, which is all that torch gets to see.
"""

import ast
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import DataError

__all__ = ["checked_archive"]

_PROGRAM, _SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+")
_MARKS = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|")
_DOTTED = re.compile(r"[\w.]*")
# operators of torch but the one that opens files, and Python's arithmetic on sizes
_CALLS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|torch\.(_?sym_\w+)|math\.(ceil|floor|trunc|sqrt)|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|abs|pow|eq|ne|lt|le|gt|ge|getitem|and_|or_|not_)"
)
# what the size of an axis may be written with; sympy evaluates the text
_FUNCTIONS = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Le|Lt|Ge|Gt|And|Or|Not|Piecewise|FloorDiv|CleanDiv|"
    "CeilDiv|IntTrueDiv|PythonMod|ModularIndexing|ToFloat|TruncToInt"
)
_WORDS = frozenset(("True", "False", "oo", "int_oo"))
_SYMBOL = re.compile(r"[suz]\w*\d+")
LARGEST_POWER = 8
_PATTERNS = {
    "target": _CALLS,
    "name": _IDENTIFIER,
    "forward_arg_names": _IDENTIFIER,
    "fqn": _DOTTED,
    "path_name": re.compile(r"(weight|tensor)_\d+"),
}
_NAMED = ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values", "range_constraints")
_REFUSED = ("as_operator", "as_custom_obj", "as_graph", "custom_obj", "use_pickle")
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def checked_archive(path: Path) -> BytesIO:
    """Return an archive with what is known to be harmless of a ``.pt2`` file.

    Raises:
        DataError: an entry that is not known, damaged, or would be executed.
    """
    entries = _entries(path)
    for name in (_PROGRAM, _SAMPLE, *_CONFIGS):
        if name not in entries:
            raise DataError(f"{path} must be a program saved by torch.export.save, it has no {name}: it may be cut off")
    try:
        entries[_PROGRAM] = _checked_program(path, entries[_PROGRAM])
        for name in _CONFIGS:
            _check_config(path, name, entries)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} must hold what torch.export.save writes, some of it is missing: {error!r}") from error
    try:
        torch.load(BytesIO(entries[_SAMPLE]), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} must hold tensors in {_SAMPLE}, it holds something else: {error}") from error
    fresh = BytesIO()
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(f"model/{name}", data)
    fresh.seek(0)
    return fresh


def _entries(path: Path) -> dict[str, bytes]:
    """Return the entries of an archive without the folder that they are all in; their checksums are looked at."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            entries = {name.partition("/")[2]: archive.read(name) for name in names}
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} must be a program saved by torch.export.save, it can't be read: {error}") from error
    if len({name.partition("/")[0] for name in names}) != 1 or len({name.casefold() for name in entries}) != len(names):
        raise DataError(f"{path} must hold one folder with different names, it may have been tampered with")
    for name in entries:
        known = name in (_PROGRAM, _SAMPLE, *_CONFIGS, *_MARKS) or _RECORDS.fullmatch(name) or name.startswith("extra/")
        if not known:
            raise DataError(
                f"{path} must hold a program and tensors, it holds {name}, which would be executed or unpickled"
            )
    return {name: data for name, data in entries.items() if not name.startswith("extra/")}


def _json(path: Path, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{path} must hold JSON in {name}, it is damaged: {error}") from error


def _checked_program(path: Path, data: bytes) -> bytes:
    program = _json(path, _PROGRAM, data)
    for holder, key, value in _items(program):
        if key == "metadata":
            # stack traces and the names of functions, which would be looked up
            holder[key] = {}
        elif key == "guards_code":
            holder[key] = []
        elif key in ("in_spec", "out_spec"):
            _check_container(path, _json(path, key, value.encode())[1])
        else:
            _check_entry(path, key, value)
    return json.dumps(program).encode()


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether an expression is arithmetic of symbols and numbers, without powers that take for ever."""
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and _FUNCTIONS.fullmatch(node.func.id) is not None
        named = all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in node.keywords)
        small = not known or node.func.id != "Pow" or _is_small(node.args[-1])  # type: ignore[attr-defined]
        return known and named and small and all(map(_is_arithmetic, node.args))
    if isinstance(node, ast.Name):
        return node.id in _WORDS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        word = isinstance(node.value, str) and _SYMBOL.fullmatch(node.value) is not None
        return word or (isinstance(node.value, int | float) and abs(node.value) < 2**63)
    parts = [
        child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.operator | ast.unaryop | ast.cmpop)
    ]
    operators = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv
    fine = isinstance(node, ast.UnaryOp | ast.Compare) or (
        isinstance(node, ast.BinOp) and isinstance(node.op, operators)
    )
    return fine and all(map(_is_arithmetic, parts))


def _is_small(node: ast.AST) -> bool:
    """Whether an exponent is a small number: ``2``, ``Integer(2)``, ``Integer(-1)``."""
    inner = node.args[0] if isinstance(node, ast.Call) and node.args else node
    inner = inner.operand if isinstance(inner, ast.UnaryOp) else inner
    return isinstance(inner, ast.Constant) and isinstance(inner.value, int) and inner.value <= LARGEST_POWER


def _check_expression(path: Path, text: Any) -> None:
    try:
        fine = len(text) < 10_000 and _is_arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        fine = False
    if not fine:
        raise DataError(f"{path} must write the sizes of axes as arithmetic of symbols, got {str(text)[:80]!r}")


def _check_entry(path: Path, key: str, value: Any) -> None:
    if key == "expr_str":
        _check_expression(path, value)
    pattern = _PATTERNS.get(key, _DOTTED if key.endswith("_name") else None)
    texts = value if isinstance(value, list) else [value]
    if pattern is not None and any(isinstance(text, str) and not pattern.fullmatch(text) for text in texts):
        raise DataError(f"{path} must hold names and operators of torch, got {str(value)[:80]!r} for {key}")
    if key in _NAMED and any(not _IDENTIFIER.fullmatch(name) for name in value):
        raise DataError(f"{path} must hold names in {key}, got others")
    if any(key.startswith(word) for word in _REFUSED) and value:
        raise DataError(f"{path} must hold operators of torch and tensors only, it holds {key}")


def _check_container(path: Path, spec: Any) -> None:
    """Check how inputs are nested: in tuples, lists and dicts of Python, with names for keys."""
    context = json.loads(spec["context"]) if isinstance(spec["context"], str) else spec["context"]
    keys = context if isinstance(context, list) else []
    if spec["type"] not in _CONTAINERS or not (context is None or isinstance(context, list)):
        raise DataError(f"{path} must nest its inputs in tuples, lists and dicts, got {spec['type']}")
    if any(not isinstance(key, str) for key in keys):
        raise DataError(f"{path} must name its inputs by words, got {keys}")
    for child in spec["children_spec"]:
        _check_container(path, child)


def _check_config(path: Path, name: str, entries: dict[str, bytes]) -> None:
    config = _json(path, name, entries[name])
    for _, key, value in _items(config):
        _check_entry(path, key, value)
    folder = name.rpartition("/")[0]
    for tensor, record in config["config"].items():
        sizes = [size.get("as_int", 1) for size in record["tensor_meta"]["sizes"]]
        data = entries.get(f"{folder}/{record['path_name']}")
        if not _DOTTED.fullmatch(tensor) or data is None or (prod(sizes) and not data):
            raise DataError(f"{path} must hold all of its tensors, {tensor[:80]} is missing: it may be cut off")


def _items(document: Any, *, names: bool = False) -> Iterator[tuple[Any, str, Any]]:
    """Yield every entry of every object in a JSON document, outermost first, but for objects whose keys are names."""
    if isinstance(document, dict):
        for key, value in list(document.items()):
            if not names:
                yield document, key, value
            yield from _items(document[key], names=not names and key in (*_NAMED, "config"))
    elif isinstance(document, list):
        for item in document:
            yield from _items(item)
