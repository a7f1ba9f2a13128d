"""Command lines: each is one frozen dataclass, whose fields give the type, default and help of its flags."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import yaml  # type: ignore[import-untyped]
from cyclopts import App, ArgumentCollection, Parameter, Token, convert, exceptions
from cyclopts.config import Dict

from train.common.child import signals_kept
from train.common.console import lasting_streams, names
from train.common.errors import PromptfoldError, UsageError
from train.common.limits import MAX_COUNT, MAX_THREADS
from train.common.machine import give_libraries_usable_cores, memory_trouble

BROKEN_PIPE = 141
"""The exit status that a shell shows of a program whose output lost its reader: 128 and SIGPIPE's number."""
_SIZES = ("batch_size", "chunk_rows", "encoder_hidden_size", "virtual_tokens", "max_length", "threads")
"""Flags that decide how much memory is needed."""

T = TypeVar("T")


def _split_at_commas(kind: Any, tokens: Sequence[Token]) -> Any:
    words = [token.evolve(value=word) for token in tokens for word in names(token.value)]
    return convert(kind, words) if words else ()


Words = Annotated[tuple[str, ...], Parameter(converter=_split_at_commas, n_tokens=1, metavar="WORD,...")]
"""Comma-separated words, ``--text-columns premise,hypothesis``; one that holds a comma in quotes. May be given twice."""
WholeNumbers = Annotated[tuple[int, ...], Parameter(converter=_split_at_commas, n_tokens=1, metavar="INT,...")]
Numbers = Annotated[tuple[float, ...], Parameter(converter=_split_at_commas, n_tokens=1, metavar="FLOAT,...")]


@dataclass(frozen=True)
class Command(Generic[T]):
    """A program: ``main = Command(Config, run, "python -m x")``, and ``main(argv)`` returns its exit status."""

    kind: type[T]
    """First fields are positional arguments, those after a `KW_ONLY` are flags, the string below a field is its help,
    and the first paragraph of the docstring describes the program."""
    run: Callable[[T], None]
    name: str
    """What a user types, such as ``python -m train``."""
    example: str = ""
    takes_settings: bool = False
    """Whether ``--config`` names a YAML file with settings."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run; without ``argv`` on the words that this process was started with.

        0 when it finished, 2 with one line on standard error where the user can put right what went wrong (a path that
        may not be read or written is always such a thing, and so are memory and standard output), 130 after Ctrl-C, 141
        when it finished after the reader of its output had gone. Anything else is a bug of ours and keeps its traceback.
        """
        give_libraries_usable_cores()
        with lasting_streams() as failure:
            try:
                status = self._run(sys.argv[1:] if argv is None else argv)
            except SystemExit:
                if failure() is None:
                    raise
                status = 0
            cause = failure()
            if cause is None or status:
                return status
            if isinstance(cause, BrokenPipeError):
                return BROKEN_PIPE
            print(
                f"error: standard output cannot be written ({cause.strerror}). What the command makes is complete, but for "
                "lines that are lost. Send them elsewhere.",
                file=sys.stderr,
            )
            return 2

    def _run(self, argv: Sequence[str]) -> int:
        config: T | None = None
        try:
            with signals_kept():
                config = self.parse(argv)
                self.run(config)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if what := memory_trouble(error):
                words = f"There is not enough memory ({what}). {_what_to_lower(config)}"
            elif isinstance(error, PromptfoldError):
                words = str(error)
            elif isinstance(error, PermissionError) and error.filename is not None:
                words = (
                    f"{error.filename}: permission denied. Give the user of this process the right to it, or give another "
                    "path."
                )
            else:
                raise
            print(f"error: {words}", file=sys.stderr)
            return 2
        return 0

    def parse(self, argv: Sequence[str]) -> T:
        """Read a command line; ``--help`` prints the flags and exits. Every mistake is a `UsageError`."""
        app = App(
            name=self.name,
            help=(self.kind.__doc__ or "").partition("\n\n")[0],
            help_epilogue=self.example,
            version_flags=[],
            default_parameter=Parameter(negative=(), allow_repeating=True, json_list=False, show_default=_show_default),
        )
        app["--help"].show = False

        @dataclass(frozen=True, kw_only=True)
        class WithSettings(self.kind):  # type: ignore[name-defined]
            config: Annotated[Path | None, Parameter(metavar="FILE")] = None
            """YAML file of settings by the flags' names, such as `batch_size: 16`; flags win over it"""

        app.config = (_read_settings, _check_whole_numbers) if self.takes_settings else (_check_whole_numbers,)
        app.default(WithSettings if self.takes_settings else self.kind)
        try:
            parsed = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        except exceptions.CycloptsError as cause:
            spare = cause.unused_tokens if isinstance(cause, exceptions.UnusedCliTokensError) else None
            what = f'There is no place for "{spare[0]}".' if spare else cause
            raise UsageError(f"{what} See {self.name} --help.") from cause
        if parsed is None:
            sys.exit(0)  # the help was printed
        return self.kind(**{name: value for name, value in vars(parsed).items() if name != "config"})


def _show_default(value: Any) -> str | None:
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return None if value is None or value is False or value == "" else str(value)


def _read_settings(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the settings of the file at ``--config`` to the flags that are not on the command line (`App.config`)."""
    own = arguments["--config"]
    if not own.tokens:
        return
    source = f"--config {own.tokens[0].value}"
    remedy = "Write one setting a line, such as `batch_size: 16`."
    try:
        content = Path(own.tokens[0].value).read_bytes()
        # All values as text, as they are on the command line: 1e-3 would stay a string, and `no` would become False.
        settings = yaml.load(content, Loader=yaml.BaseLoader)  # noqa: S506 -- no objects
        root = yaml.compose(content, Loader=yaml.BaseLoader)
    except OSError as cause:
        raise UsageError(f"{source} cannot be read ({cause.strerror}). Give a YAML file.") from cause
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{where}: this is no YAML. {remedy}") from cause
    if not isinstance(settings, dict):
        raise UsageError(f"{source} holds no settings. {remedy}")
    flags: set[str] = set()
    for key, _ in root.value:
        if flag(key.value) in flags:
            raise UsageError(f"{source}, line {key.start_mark.line + 1}: {key.value} is set twice. Keep one of them.")
        flags.add(flag(key.value))
    others = ArgumentCollection(argument for argument in arguments if argument is not own)
    for name in settings:
        if others.get(flag(name), None) is None:
            raise exceptions.UnknownOptionError(
                token=Token(keyword=flag(name), source=source), argument_collection=others
            )
    Dict(settings, source=source)(app, commands, others)


def _check_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse all but whole numbers where one is wanted: cyclopts would round 2.5 (`App.config`)."""
    for argument in arguments:
        if not _is_whole(argument.hint):
            continue
        is_optional = type(None) in get_args(argument.hint)
        for token in argument.tokens:
            for word in names(token.value) if argument.hint == tuple[int, ...] else (token.value,):
                if not re.fullmatch("[+-]?[0-9]+", word) and not (is_optional and word.lower() in {"none", "null"}):
                    where = "" if token.source == "cli" else f" from {token.source}"
                    raise UsageError(f"{argument.name} {word}{where}: give a whole number.")


def _is_whole(hint: Any) -> bool:
    return hint is int or any(map(_is_whole, get_args(hint)))


def flag(name: str) -> str:
    """The flag of a field: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def _what_to_lower(config: object) -> str:
    """What needs less memory: the sizes among a command's flags that were raised, or all of them."""
    sizes = {item.name: item.default for item in fields(config) if item.name in _SIZES} if is_dataclass(config) else {}
    raised = [
        name
        for name, default in sizes.items()
        if (getattr(config, name) or 0) > (default if isinstance(default, int) else 0)
    ]
    flags = " or ".join(map(flag, raised or sizes))
    return f"Give a smaller {flags}, or the process more." if flags else "Give the process more."


def check_counts(config: object, *names: str) -> None:
    """Refuse numbers below 1 or above what any run has in these fields with a UsageError; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag(name)} {value}: give a whole number of at least 1.")
        most = MAX_THREADS if name == "threads" else MAX_COUNT
        if value is not None and value > most:
            raise UsageError(f"{flag(name)} {value}: give a whole number from 1 to {most}.")
