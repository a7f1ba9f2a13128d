"""Options that every engine of `export.score` shares."""

from dataclasses import dataclass
from pathlib import Path

from export.bundle.folder import Bundle, load_bundle
from export.runtime.trial import try_bundle
from train.common.errors import UsageError
from train.data.tasks import Task

CHUNK_ROWS = 8192
"""Rows in memory at a time, and lost at most when a run is killed."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How something shall be labelled.

    Attributes:
        bundle: folder that `python -m export` wrote.
        task: name of the task, where the bundle holds several.
        text_columns: the file's, where they are not named as in training.
        label_column: the same of its labels.
        no_labels: whether to leave labels unread.
        all_probabilities: whether to write the probability of every label.
        batch_size: texts in one run of the graph.
        chunk_rows: rows in memory at a time.
        threads: on the CPU, of each process that holds the model; None to share all usable cores.
        resume: whether to go on with what an interrupted run left.
        overwrite: whether to replace an older output.
        untrusted: whether to open the bundle in a process of its own first (`export.runtime.trial.try_bundle`), and to run
            on the CPU, as it did there.
    """

    bundle: Path
    task: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    no_labels: bool = False
    all_probabilities: bool = False
    batch_size: int = 32
    chunk_rows: int = CHUNK_ROWS
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False
    untrusted: bool = False

    def check(self) -> None:
        """Refuse what no engine can do.

        Raises:
            UsageError: a number is too small, or two flags exclude each other.
        """
        for flag, number in (
            ("--batch-size", self.batch_size),
            ("--chunk-rows", self.chunk_rows),
            ("--threads", self.threads),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{flag} {number}: give a whole number of at least 1.")
        if self.no_labels and self.label_column is not None:
            raise UsageError("--no-labels and --label-column exclude each other. Give one of them.")

    def open(self) -> "Opened":
        """Open the bundle, and find the task with the columns that it has in this file.

        Raises:
            BundleError: the bundle cannot be used.
            UsageError: there is no such task, or several and none is named; or the columns do not fit it.
        """
        bundle = load_bundle(self.bundle)
        if self.untrusted:
            try_bundle(bundle)
        task = bundle.find_task(self.task).task
        return Opened(bundle, task.with_columns(self.text_columns, self.label_column, owner=self.bundle))


@dataclass(frozen=True)
class Opened:
    """A bundle, and which of its tasks labels with which of a file's columns."""

    bundle: Bundle
    task: Task
