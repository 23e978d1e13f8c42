"""The command line: one sub-command for each verb, a thin shell."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import batchnorm
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.rooms import require

__all__ = ["main"]

T = TypeVar("T")

USER_ERROR, INTERRUPTED, CLOSED = 2, 130, 141
LONGEST = 600

_BENCHES = {
    "compare": "time, scaling and memory of the main job",
    "fold": "folding beside other tools: what goes, what goes wrong, time and latency",
    "effects": "what each option of the layers does to a small network",
    "recalibrate": "recalibration beside other tools, its cost, and what it gives back",
    "observe": "what observing costs: a pass over data, and a training with a monitor",
    "sync": "synchronized layers: exactness and cost on processes of this machine",
    "op": "batch normalization and ReLU beside torch, torch.compile, JAX and the copies that are the floor",
    "layer": "speed and exactness of a layer beside PyTorch's own, in training and evaluation, tiny and large",
    "network": "training steps of whole networks with PyTorch's layers and with ours",
    "memory": "what a training step keeps for its backward, with and without recomputing",
    "keras": "Keras's layer and ours on every backend, exactness and time of a training; keras.applications through the verbs",
    "check": "what check finds of planted faults, what it says of healthy models, causes of a gap, and its cost",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 with findings, or 2 after an error that the user can mend."""
    words = sys.argv[1:] if arguments is None else arguments
    given = _parser().parse_args(words)
    given.words = words
    try:
        code: int | None = given.run(given)
    except BatchNormError as error:
        print(f"batchnorm: {_sentence(error)}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\nbatchnorm: stopped; {given.stopped}", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except BrokenPipeError:
        # who reads has heard enough; nothing may be left for the interpreter to write at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    return code or 0


def _sentence(error: object) -> str:
    """Return an error in one line; frameworks' own texts in it may be pages long."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchnorm", description="Batch normalization through the whole life of a network."
    )
    parser.add_argument("--version", action="version", version=f"batchnorm {batchnorm.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_compare(verbs)
    _add_summary(verbs)
    _add_rewrites(verbs)
    _add_recalibrate(verbs)
    _add_observe(verbs)
    _add_check(verbs)
    _add_convert(verbs)
    _add_bench(verbs)
    return parser


def _add_compare(verbs: Any) -> None:
    verb = _verb(verbs, "compare", _compare, "find out on your data whether, where and how batch normalization helps")
    verb.set_defaults(stopped="what was finished is kept, the same command continues")
    add = verb.add_argument
    add("data", help="digits, a .csv .tsv .parquet .npz or IDX file, a folder of IDX files or of class folders")
    add("--target", metavar="COLUMN", help="the column of labels, for tables")
    add("--drop", type=_words, default=(), metavar="A,B", help="columns to leave out, for tables")
    add("--image-size", type=_size, metavar="WxH", help="scale the images of a folder")
    out = Path("comparison")
    add("--out", type=Path, default=out, metavar="DIR", help="report, rows and model (comparison)")
    add(
        "--model",
        default="mlp",
        help="mlp, cnn, resmlp or package.module:factory; keras:dense, keras:cnn or keras:package.module:factory (mlp)",
    )
    add("--arms", type=_words, metavar="A,B", help="names of arms (none,before,after)")
    add("--arm", action="append", default=[], metavar="ARM", help="a name, or 'name: norm=batch, batch_size=8'")
    add("--learning-rates", type=_numbers, metavar="A,B", help="the grid (0.01 to 10)")
    add("--seeds", type=int, default=10, metavar="N", help="paired runs of each arm and rate (10)")
    add("--steps", type=int, default=500, metavar="N", help="steps of each run (500)")
    add("--batch-size", type=int, default=64, metavar="N", help="rows a step (64)")
    add("--threshold", type=float, metavar="A", help="accuracy for 'steps to' (90 %% of the way to the best)")
    add("--margins", type=_margins, metavar="A,B", help="log-loss and accuracy that would not matter (0.03,0.01)")
    add("--jobs", type=int, metavar="N", help="local processes (one a core)")
    add("--parallel", default="processes", metavar="HOW", help="processes, dask or ray (processes)")
    add("--cluster", metavar="ADDRESS", help="of the Dask or Ray cluster")


def _compare(given: argparse.Namespace) -> None:
    options = {
        key: value for key, value in vars(given).items() if key not in ("run", "stopped", "words", "arms", "arm")
    }
    lab = require("batchnorm.lab", "lab")
    if options["learning_rates"] is None:
        del options["learning_rates"]
    if given.margins:
        options["margins"] = lab.Margins(*given.margins)
    if given.arms or given.arm:
        options["arms"] = [*(given.arms or ()), *given.arm]
    found = lab.compare(options.pop("data"), progress=True, **options)
    _say(
        found.best.summary,
        "",
        found,
        "",
        f"report: {found.out / 'report.html'}",
        *map("model: {}".format, found.best.files),
        *filter(None, [found.best.left_out]),
    )


def _add_summary(verbs: Any) -> None:
    verb = _verb(verbs, "summary", _summary, "list a network's layers: shapes, trainable numbers, running statistics")
    verb.add_argument("model", help="a .onnx, .keras or .pt2 file, or package.module:factory")
    verb.add_argument(
        "--weights", type=Path, metavar="FILE", help="a .safetensors or .pt file of tensors, for a factory"
    )
    verb.add_argument(
        "--input", type=_named_shape, action="append", metavar="1,3,224,224", help="shape of an input, or NAME=shape"
    )


def _summary(given: argparse.Namespace) -> None:
    models = import_module("batchnorm.models")
    model = models.load(given.model, given.weights)
    _say(batchnorm.summary(model, models.adapt(model).example(given.input or [])))


def _add_rewrites(verbs: Any) -> None:
    _add_rewrite(
        verbs, "fold", "remove batch normalization from a trained network, and prove that nothing else changed"
    )
    _add_rewrite(verbs, "strip-bias", "remove the biases that batch normalization subtracts again")
    pruning = _add_rewrite(verbs, "prune", "remove the channels whose γ is (near) zero")
    pruning.add_argument(
        "--threshold", type=float, default=0.0, metavar="T", help="the largest |γ| that counts as zero (0)"
    )


def _add_rewrite(verbs: Any, name: str, what: str) -> argparse.ArgumentParser:
    verb = _verb(verbs, name, _rewrite, what)
    verb.set_defaults(verb=name.replace("-", "_"))
    add = verb.add_argument
    add("model", help="a .onnx, .keras or .pt2 file, or package.module:factory")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="what to write, in the format of its ending")
    add("--weights", type=Path, metavar="FILE", help="a .safetensors or .pt file of tensors, for a factory")
    add(
        "--input",
        type=_named_shape,
        action="append",
        metavar="1,3,224,224",
        help="shape of an input, or NAME=shape; once for each input (a file may know its own)",
    )
    return verb


def _rewrite(given: argparse.Namespace) -> None:
    shell = import_module("batchnorm.fold.shell")
    options = {"threshold": given.threshold} if given.verb == "prune" else {}
    _say(shell.run(given.verb, given.model, given.out, weights=given.weights, inputs=given.input or [], **options))


def _add_recalibrate(verbs: Any) -> None:
    verb = _verb(verbs, "recalibrate", _recalibrate, "replace running statistics by those of a whole data set, exactly")
    add = verb.add_argument
    add("model", help="a .onnx, .keras or .pt2 file, or package.module:factory")
    add(
        "--data",
        required=True,
        metavar="DATA",
        help="a .npy or .npz of inputs, package.module:factory of batches, or what compare takes",
    )
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="what to write, in the format of its ending")
    add("--weights", type=Path, metavar="FILE", help="a .safetensors or .pt file of tensors, for a factory")
    add("--method", choices=("one-pass", "sequential"), default="one-pass", help="sequential: exact in evaluation")
    add("--batch-size", type=int, default=64, metavar="N", help="samples of a batch of arrays (64)")
    add("--batches", type=int, metavar="N", help="read at most so many batches")
    add("--samples", type=int, metavar="N", help="stop after so many samples")
    add("--prior", type=float, metavar="N", help="the stored statistics count as N samples (0)")
    add("--tolerance", type=float, metavar="T", help="stop when the statistics have settled to this")
    _add_reading(add)


def _add_reading(add: Callable[..., Any]) -> None:
    add("--target", metavar="COLUMN", help="the column of labels to leave out, for tables")
    add("--drop", type=_words, default=(), metavar="A,B", help="columns to leave out, for tables")
    add("--image-size", type=_size, metavar="WxH", help="scale the images of a folder")


def _data(given: argparse.Namespace) -> Any:
    data = import_module("batchnorm.datafiles").read(given.data)
    if data is not None:
        return data
    lab = require("batchnorm.lab", "lab")
    return lab.load_data(given.data, target=given.target, drop=given.drop, image_size=given.image_size).x


def _recalibrate(given: argparse.Namespace) -> None:
    shell = import_module("batchnorm.recalibrate.shell")
    data = _data(given)
    names = ("weights", "batch_size", "method", "batches", "samples", "prior", "tolerance")
    said = shell.run(given.model, data, given.out, **{name: getattr(given, name) for name in names})
    if said:
        _say(said)


def _add_observe(verbs: Any) -> None:
    verb = _verb(
        verbs, "observe", _observe, "hold what reaches each layer against what it stores, in one pass over data"
    )
    add = verb.add_argument
    add("model", help="a .onnx, .keras or .pt2 file, or package.module:factory")
    add(
        "--data",
        required=True,
        metavar="DATA",
        help="a .npy or .npz of inputs, package.module:factory of batches, or what compare takes",
    )
    add("--weights", type=Path, metavar="FILE", help="a .safetensors or .pt file of tensors, for a factory")
    add("--batch-size", type=int, default=64, metavar="N", help="samples of a batch of arrays (64)")
    add("--batches", type=int, metavar="N", help="read at most so many batches")
    add("--samples", type=int, metavar="N", help="stop after so many samples")
    add("--use", choices=("batch", "running"), default="batch", help="what layers normalize by (batch)")
    add("--format", choices=("text", "json"), default="text", help="of what is said (text)")
    _add_reading(add)


def _observe(given: argparse.Namespace) -> None:
    shell = import_module("batchnorm.observe.shell")
    names = ("weights", "batch_size", "batches", "samples", "use")
    said = shell.run(given.model, _data(given), form=given.format, **{name: getattr(given, name) for name in names})
    if said:
        _say(said)


def _add_check(verbs: Any) -> None:
    verb = _verb(verbs, "check", _check, "find what is wrong with the batch normalization in a model, and mend it")
    add = verb.add_argument
    add("model", nargs="?", help="a .onnx, .keras or .pt2 file, or package.module:factory")
    add("--weights", type=Path, metavar="FILE", help="a .safetensors or .pt file of tensors, for a factory")
    add("--input", type=_named_shape, action="append", metavar="1,3,224,224", help="shape of an input, or NAME=shape")
    add("--data", metavar="DATA", help="a .npy or .npz of inputs, package.module:factory, or what compare takes")
    add("--batch-size", type=int, default=64, metavar="N", help="samples of a batch of arrays (64)")
    add("--batches", type=int, metavar="N", help="read at most so many batches")
    mode = verb.add_mutually_exclusive_group()
    mode.add_argument("--training", dest="training", action="store_true", default=None, help="it is to be trained")
    mode.add_argument("--inference", dest="training", action="store_false", help="it is to be used as it is")
    add("--select", metavar="BN1,BN203", help="only rules whose codes begin so")
    add("--ignore", metavar="BN304", help="no rules whose codes begin so")
    add("--format", choices=("text", "json", "sarif", "html"), help="of the report (text, or what -o ends in)")
    add("-o", "--out", type=Path, metavar="FILE", help="where the report goes (html: check.html)")
    add("--fix", type=Path, metavar="OUT", help="write a mended model")
    add("--list", action="store_true", help="list all rules")
    _add_reading(add)


def _check(given: argparse.Namespace) -> int:
    shell = import_module("batchnorm.check.shell")
    if given.list:
        _say(shell.list_rules())
        return 0
    if given.model is None:
        raise OptionError("check needs a model: a .onnx, .keras or .pt2 file, or package.module:factory")
    names = ("weights", "batch_size", "batches", "training", "select", "ignore", "out", "fix")
    outcome = shell.run(
        given.model,
        inputs=given.input or [],
        data=None if given.data is None else _data(given),
        form=given.format,
        command=shlex.join(["batchnorm", *given.words]),
        **{name: getattr(given, name) for name in names},
    )
    if outcome.said:
        _say(outcome.said)
    for line in outcome.beside:
        print(f"batchnorm: {_sentence(line)}", file=sys.stderr)  # noqa: T201
    return int(outcome.code)


def _add_convert(verbs: Any) -> None:
    verb = _verb(
        verbs, "convert", _convert, "give a model the numbers of the same network in another framework, proved"
    )
    add = verb.add_argument
    add("source", help="whose numbers: a .onnx, .keras or .pt2 file, or package.module:factory")
    add("target", help="whose layers, their numbers are replaced: likewise; the file itself stays as it is")
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="what to write, in a format of the target's framework",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a .safetensors or .pt file of tensors, for a source that is a factory",
    )
    add(
        "--input",
        type=_named_shape,
        action="append",
        metavar="1,3,224,224",
        help="shape of an input of the source, or NAME=shape (a file may know its own)",
    )


def _convert(given: argparse.Namespace) -> None:
    shell = import_module("batchnorm.translation.shell")
    _say(shell.run(given.source, given.target, given.out, weights=given.weights, inputs=given.input or []))


def _add_bench(verbs: Any) -> None:
    verb = _verb(verbs, "bench", _bench, "measure the figures of README and docs on this machine")
    verb.add_argument("what", choices=list(_BENCHES), help="; ".join(f"{k}: {v}" for k, v in _BENCHES.items()))
    verb.add_argument(
        "part",
        nargs="*",
        help="of fold: torchvision, transformers, timm, adversarial, graphs, speed; of recalibrate: checks, speed, repairs; "
        "of check: planted, healthy, gap, speed; of keras: variance, fit, applications",
    )
    verb.add_argument(
        "--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="raw values as JSON (benchmarks)"
    )
    verb.add_argument("--quick", action="store_true", help="a small grid, to see that it works")


def _bench(given: argparse.Namespace) -> None:
    bench = require(f"batchnorm.bench.{given.what}", "lab")
    if given.part and given.what not in ("fold", "recalibrate", "check", "keras"):
        raise OptionError(f"bench {given.what} has no parts, got {' '.join(given.part)}")
    _say(bench.run(given.out, *given.part, quick=given.quick))


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int | None], what: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    verb.set_defaults(run=run, stopped="nothing was written")
    return verb


def _say(*lines: object) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[float, ...]:
    return _read(text, "numbers with commas between them", lambda: tuple(float(word) for word in _words(text)))


def _margins(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if len(numbers) != 2 or min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"must be two positive numbers, as in 0.03,0.01, got {text!r}")
    return numbers


def _shape(text: str) -> tuple[int, ...]:
    return _read(text, "sizes with commas between them", lambda: tuple(int(word) for word in _words(text)))


def _named_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, shape = text.rpartition("=")
    return name if equals else "", _shape(shape)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return _read(text, "width and height, as in 32x32", lambda: (int(width), int(height)))


def _read(text: str, what: str, convert: Callable[[], T]) -> T:
    try:
        return convert()
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
