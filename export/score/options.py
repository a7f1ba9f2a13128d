"""Options that every engine of `export.score` shares."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from export.bundle.folder import Bundle, load_bundle
from export.runtime.trial import try_bundle
from train.common.command_line import Words, check_counts
from train.common.errors import UsageError
from train.config import REGRESSION
from train.data.files.options import ReadOptions
from train.data.tasks import Task


@dataclass(frozen=True)
class ScoreOptions:
    """How rows are labelled."""

    bundle: Path
    """folder that `python -m export` wrote"""
    _: KW_ONLY
    task: str | None = None
    """name of the task, where the bundle holds several"""
    text_columns: Words = ()
    """the file's text columns (default: the bundle's)"""
    label_column: str | None = None
    """the file's label column (default: the bundle's, where the file has it)"""
    delimiter: str | None = None
    """between the cells of a CSV file: one character, or comma, semicolon, tab, pipe (default: recognised)"""
    encoding: str | None = None
    """encoding of a text file, such as cp1252 (default: recognised)"""
    quote: str | None = None
    """around quoted cells of a CSV file: one character, or none (default: recognised)"""
    skip_bad_rows: bool = False
    """label the other rows where some cannot be used; these get no prediction, and the reason in a column `problem`"""
    no_labels: bool = False
    """leave labels unread and score nothing"""
    all_probabilities: bool = False
    """write the probability of every label"""
    batch_size: int = 32
    """texts in one run of the graph"""
    chunk_rows: int = 8192
    """rows in memory at a time, and lost at most when the run is killed"""
    threads: int | None = None
    """threads on the CPU, of each worker (default: all usable cores, shared out)"""
    resume: bool = False
    """go on with what an interrupted run left beside --out"""
    overwrite: bool = False
    """replace an older --out, or start an interrupted run anew"""
    untrusted: bool = False
    """open the bundle in a process of its own first, under limits of memory and time, and run it on the CPU"""

    def check(self) -> None:
        """Refuse what no engine can do with a `UsageError`."""
        check_counts(self, "batch_size", "chunk_rows", "threads")
        if self.no_labels and self.label_column is not None:
            raise UsageError("--no-labels and --label-column exclude each other. Give one of them.")

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions.parse(self.delimiter, self.encoding, self.quote)

    def open(self) -> "Opened":
        """Open the bundle and find the task, with the columns of this file; a BundleError or UsageError if it cannot be."""
        bundle = load_bundle(self.bundle)
        if self.untrusted:
            try_bundle(bundle)
        task = bundle.find_task(self.task).task
        if self.all_probabilities and task.kind == REGRESSION:
            raise UsageError(f"--all-probabilities: {self.bundle} predicts a number. Leave it out.")
        return Opened(bundle, task.with_columns(self.text_columns, self.label_column, owner=self.bundle))


@dataclass(frozen=True)
class Opened:
    """A bundle, and the task that labels a file, with that file's columns."""

    bundle: Bundle
    task: Task
