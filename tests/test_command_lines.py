"""Every command line: help for every flag, one sentence for a mistake, settings from a YAML file."""

import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TextIO

import pytest
from cyclopts import App, Parameter

from demo.__main__ import DemoConfig, PageServingConfig
from demo.__main__ import main as demo
from export.__main__ import main as export
from export.fold.config import ExportConfig
from tests.measure.growth import ScaleConfig
from tests.measure.growth import main as growth
from train.__main__ import command_of
from train.__main__ import main as train
from train.common.command_line import Command
from train.common.console import say
from train.common.errors import ModelError, UsageError
from train.config import TrainConfig

COMMANDS = {
    "train.__main__": "--out x",
    "train.evaluate": "adapter --file f",
    "train.import_peft": "source --out x",
    "export.__main__": "adapter --out x",
    "export.score.__main__": "bundle --in f --out g",
    "export.serve.__main__": "bundle",
    "export.bench.__main__": "adapter bundle",
    "export.triton": "bundle --out x",
    "demo.__main__": "",
    "tests.measure.training": "",
    "tests.measure.growth": "bundle",
    "tests.measure.ray_scoring": "bundle",
}
"""Modules with a `main`, and the words that each needs."""

Parse = Callable[[Sequence[str]], object]
FULL = (
    "error: standard output cannot be written (No space left on device). What the command makes is complete, but for lines "
    "that are lost. Send them elsewhere.\n"
)
B = Path("b")
TRAIN = TrainConfig(out=B, seeds=(1, 2), average=0.01, swap_sentences=True)
EXPORT = ExportConfig((Path("a"), B), out=Path("c"), validation_files=(Path("f"), Path("[g]")))


@pytest.mark.parametrize(("name", "words"), COMMANDS.items())
def test_every_flag_is_explained_and_suggested_for_a_misspelt_one(
    name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(name)
    app = App(default_parameter=Parameter(negative=()))
    app.default(module.main.kind)
    arguments = app.assemble_argument_collection(parse_docstring=True)
    flags = {item.name: item.parameter.help for item in arguments if item.parse and not item.children}
    assert [flag for flag, text in flags.items() if not text] == []
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.split()
    assert [flag for flag in flags if flag not in shown] == []
    assert ("--config" in shown) == (name in {"train.__main__", "export.__main__", "demo.__main__"})
    *_, flag = flags
    assert module.main([*words.split(), f"{flag}x"]) == 2
    see = f"See python -m {name.removesuffix('.__main__')} --help."
    assert capsys.readouterr().err == f"error: Unknown option: {flag}x. Did you mean {flag}? {see}\n"


@pytest.mark.parametrize(("name", "words"), COMMANDS.items())
def test_no_number_is_rounded_where_a_whole_one_is_wanted(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(name).main
    app = App(default_parameter=Parameter(negative=()))
    app.default(main.kind)
    arguments = app.assemble_argument_collection(parse_docstring=True)
    flags = {item.name: str(item.hint) for item in arguments if item.parse and re.search(r"\bint\b", str(item.hint))}
    for flag, value in product(flags, ("2.5", "3.0", "0x10", "1_0", "1e3", "two", "4,2.5")):
        wrong = value.rpartition(",")[2] if flags[flag].startswith("tuple") else value
        assert main([*words.split(), f"{flag}={value}"]) == 2
        assert capsys.readouterr().err == f"error: {flag} {wrong}: give a whole number.\n"
        if main.takes_settings:
            (tmp_path / "run.yaml").write_text(f"{flag.removeprefix('--')}: '{value}'")
            at = f"--config {tmp_path / 'run.yaml'}"
            assert main([*words.split(), *at.split()]) == 2
            assert capsys.readouterr().err == f"error: {flag} {wrong} from {at}: give a whole number.\n"


@pytest.mark.parametrize(
    ("parse", "words", "expected"),
    [
        (train.parse, "--out=a --out b --seeds '1, 2' --average 1e-2 --swap-sentences", TRAIN),
        (train.parse, command_of(TRAIN).removeprefix("python -m train "), TRAIN),
        (export.parse, "a b --out c --validation-file f [g]", EXPORT),
        (export.parse, "--validation-file f [g] --out c --precision auto -- a b", EXPORT),
        (demo.parse, "--engine ray --http-host h", DemoConfig(engine="ray", serving=PageServingConfig(host="h"))),
        (growth.parse, "b --tasks '' --batch-waits 0,2.5", ScaleConfig(B, tasks=(), waits_ms=(0.0, 2.5))),
    ],
)
def test_a_command_line_becomes_its_dataclass(parse: Parse, words: str, expected: object) -> None:
    assert parse(shlex.split(words)) == expected


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (None, 0, ""),
        (ModelError("No model."), 2, "error: No model.\n"),
        (
            PermissionError(13, "Permission denied", "a/config.json"),
            2,
            "error: a/config.json: permission denied. Give the user of this process the right to it, or give another "
            "path.\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            MemoryError(),
            2,
            "error: There is not enough memory (MemoryError). Give a smaller --batch-size, or the process more.\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 128 bytes.\nat x.cpp"),
            2,
            "error: There is not enough memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 128 bytes.). "
            "Give a smaller --batch-size, or the process more.\n",
        ),
        (
            ModelError("It does not run."),
            2,
            "error: There is not enough memory (CUDA out of memory). Give a smaller --batch-size, or the process more.\n",
        ),
    ],
)
def test_the_exit_status_tells_how_a_command_ended(
    error: BaseException | None, status: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: TrainConfig) -> None:
        if error and "CUDA" in printed:
            raise error from RuntimeError("CUDA out of memory")
        if error:
            raise error

    assert Command(TrainConfig, run, "python -m train")(["--out", "a", "--batch-size", "64"]) == status
    assert capsys.readouterr().err == printed


def no_reader() -> TextIO:
    """A pipe whose other end is closed, as after ``| head -0``."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


UNWRITABLE = [(no_reader, 141, ""), (partial(Path("/dev/full").open, "w"), 2, FULL)]


@pytest.mark.parametrize(("open_output", "status", "printed"), UNWRITABLE, ids=["no reader", "full"])
@pytest.mark.parametrize("words", ["--help", "--out a"])
def test_output_that_cannot_be_written_ends_no_work(
    words: str,
    open_output: Callable[[], TextIO],
    status: int,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: TrainConfig) -> None:
        say("before")
        print("by a library")
        say("more")
        (tmp_path / "result").touch()
        say("after")

    with open_output() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert Command(TrainConfig, run, "python -m train")(words.split()) == status
        assert sys.stdout is output
    assert capsys.readouterr().err == printed
    assert (tmp_path / "result").exists() == (words != "--help")


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", rb"\u597d \xb1"), ("cp1252", b"\\u597d \xb1"), ("utf-8", "好 ±".encode())]
)
def test_a_character_that_the_output_lacks_is_written_as_its_number(
    encoding: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: TrainConfig) -> None:
        say("好 ±")
        raise UsageError("好 ±")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert Command(TrainConfig, run, "python -m train")(["--out", "a"]) == 2
    err.flush()
    assert out.buffer.getvalue() == written + b"\n"
    assert err.buffer.getvalue() == b"error: " + written + b"\n"


@pytest.mark.parametrize(
    ("parse", "settings", "flags", "same_as"),
    [
        (
            train.parse,
            "{text_columns: [a, b], label_column: no, average: 1e-2, swap_sentences: true, seeds: '3,4', epochs: 5, "
            "train-file: t.csv, validation_file: v.csv, out: o}",
            "--epochs 7",
            "--text-columns a,b --label-column no --average 1e-2 --swap-sentences --seeds 3,4 --epochs 7 "
            "--train-file t.csv --validation-file v.csv --out o",
        ),
        (export.parse, "{adapters: [a, b], validation_file: [f, g]}", "--out c", "a b --out c --validation-file f g"),
        (demo.parse, "engine: ray\nhttp_host: h\nbundle: b", "", "--engine ray --http-host h --bundle b"),
    ],
)
def test_settings_from_a_file_are_as_flags_which_win(
    parse: Parse, settings: str, flags: str, same_as: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(settings)
    assert parse([*flags.split(), f"--config={tmp_path / 'run.yaml'}"]) == parse(same_as.split())


@pytest.mark.parametrize(
    ("words", "settings", "sentence"),
    [
        ("", "", "Parameter --adapters requires an argument. See python -m export --help."),
        ("a --out b --no-add", "", "Unknown option: --no-add. Did you mean --add?"),
        ("a --out b --validation-file", "", "Parameter --validation-file requires at least 1 element. Got 0."),
        ("a --out b --precision fp8", "", 'Invalid value "fp8" for --precision. Choose from: "fp32", "fp16", "int8", '),
        ("a a --out b", "", "Two adapters are named a;"),
        ("a --out b --config none", "", "--config none cannot be read (No such file or directory). Give a YAML file."),
        ("{file}", "precison: int8", "Unknown option: --precison from {at}. Did you mean --precision? See python -m"),
        ("{file}", "config: c", "Unknown option: --config from {at}."),
        ("{file}", "add: [", "{at}, line 1: this is no YAML. Write one setting a line, such as `batch_size: 16`."),
        ("{file}", "precision: int8\nadd: true\nprecision: fp16", "{at}, line 3: precision is set twice. Keep one of"),
        ("{file}", "text_columns: a\ntext-columns: b", "{at}, line 2: text-columns is set twice. Keep one of them."),
        ("{file}", '{"add": true, "add": false}', "{at}, line 1: add is set twice. Keep one of them."),
        ("{file}", "- add", "{at} holds no settings. Write one setting a line"),
        ("{file}", "add: perhaps", 'Invalid value for [add] from {at}: unable to convert "perhaps" into bool.'),
    ],
)
def test_a_mistake_is_told_in_one_sentence(words: str, settings: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(settings)
    at = f"--config {tmp_path / 'run.yaml'}"
    with pytest.raises(UsageError) as caught:
        export.parse(words.format(file=f"a --out b {at}").split())
    assert str(caught.value).startswith(sentence.format(at=at))
