"""What an import is told, which are the flags of ``python -m train.import_peft``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from train.common.command_line import Words
from train.common.errors import UsageError


@dataclass(frozen=True)
class ImportConfig:
    """Turn an adapter that PEFT wrote elsewhere into an adapter folder, for a text classifier of any prompt method, LoRA
    or another method that PEFT can merge.

    Its logits for ten texts are compared with those of `PeftModel.from_pretrained` before the folder appears.
    """

    source: str
    """folder by `PeftModel.save_pretrained` or the Trainer (`checkpoint-100`, or the folder with all of them), or a name
    on the Hugging Face hub"""
    _: KW_ONLY
    out: Path
    """folder for the adapter; it appears when it was compared with PEFT, or not at all"""
    base_model: str | None = None
    """base model: minilm, smollm2, a hub name or a folder (default: the one that the adapter names)"""
    labels: Words = ()
    """labels in the order of the logits (default: those of the base model's config.json, else label_0,label_1,...)"""
    multi_label: bool = False
    """a text has any number of the labels, not one (default: what the base model's config.json has as problem_type)"""
    single: bool = False
    """a text is one sentence (default, unless --text-columns names two)"""
    pair: bool = False
    """a text is a pair of sentences"""
    text_columns: Words = ()
    """one or two text columns of your files, such as premise,hypothesis (default: text, or sentence1,sentence2)"""
    label_column: str = "label"
    """label column of your files"""
    validation_file: Path | None = None
    """labelled rows (.csv, .jsonl or .parquet), on which the adapter is scored"""
    task_id: int | None = None
    """number of the task whose prompt is taken, for MULTITASK_PROMPT_TUNING"""
    allow_bin: bool = False
    """read adapter_model.bin, a pickle, with `torch.load(weights_only=True)`, where there are no safetensors"""
    overwrite: bool = False
    """replace an older adapter at --out"""

    def __post_init__(self) -> None:
        if self.single and self.pair:
            raise UsageError("--single and --pair exclude each other. Leave one of them out.")
        n_columns = len(self.text_columns)
        if n_columns > 2 or len(set(self.text_columns)) != n_columns:
            raise UsageError(f"--text-columns {','.join(self.text_columns)}: name one column, or two different ones.")
        if n_columns and ((n_columns == 1 and self.pair) or (n_columns == 2 and self.single)):
            raise UsageError(
                f"--text-columns names {n_columns}, which is not what {'--pair' if self.pair else '--single'} says. "
                "Leave one of the two out."
            )
        if self.label_column in self.columns:
            raise UsageError(
                f"--label-column {self.label_column} is one of --text-columns too. Name the column of the class."
            )
        if self.task_id is not None and self.task_id < 0:
            raise UsageError(f"--task-id {self.task_id}: give 0 or a number above it.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns, one or two."""
        return self.text_columns or (("sentence1", "sentence2") if self.pair else ("text",))
