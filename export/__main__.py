"""``python -m export ADAPTER --out BUNDLE``: fold an adapter into an ONNX bundle. See ``--help``."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.console import Parser, names, run_main, say
from train.errors import UsageError
from train.files import SIGNATURE

if TYPE_CHECKING:
    from export.fold import ExportConfig


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export",
        description="Fold an adapter's learned prompt and head into one static ONNX graph, and prove it equal. "
        "Several adapters of one base model become one graph that is told of each row its task. With --sign or "
        "--verify and without --out, sign bundles and adapters, or check who signed them.",
        epilog="example: python -m export demo/adapters/minilm-mrpc --out bundles/minilm-mrpc",
    )
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="folder that `python -m train` wrote; where only signatures are made or checked, bundles too",
    )
    parser.add_argument("--out", type=Path, help="folder for the bundle")
    parser.add_argument(
        "--add", action="store_true", help="add the adapters to the bundle at --out, which holds several already"
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="fp32, fp16 (for CUDA), int8, or auto: whatever is fastest and passes the gate (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-file",
        dest="validation_files",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="labelled rows, a file for each adapter, that decide whether a precision is kept: no metric may fall by "
        "more than half a point (default: the file the adapter was validated with, where it still lies unchanged)",
    )
    parser.add_argument(
        "--ungated",
        action="store_true",
        help="make other precisions also where no labelled rows can say what they cost; they run only where named",
    )
    parser.add_argument("--text-columns", type=names, default=(), metavar="COLUMNS", help="that file's text columns")
    parser.add_argument("--label-column", metavar="COLUMN", help="its label column")
    parser.add_argument(
        "--layout",
        default="bundle",
        metavar="LAYOUT",
        help="bundle, or triton: a model in the repository at --out, as `python -m export.triton` makes it of a bundle "
        "(default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older bundle at --out")
    parser.add_argument(
        "--sign",
        action="store_true",
        help="sign the bundle at --out once it is written, or without --out the folders that are named; needs "
        "--private-key and the package model-signing",
    )
    parser.add_argument(
        "--private-key",
        type=Path,
        metavar="KEY",
        help="an elliptic-curve key in PEM; the password of an encrypted one is read from PROMPTFOLD_KEY_PASSWORD",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check that the folders that are named are signed with --public-key and are what was signed; export nothing",
    )
    parser.add_argument("--public-key", type=Path, metavar="KEY", help="of the one whose signature is wanted, in PEM")
    options = vars(parser.parse_args(argv))
    signatures = _Signatures(
        **{name: options.pop(name) for name in ("sign", "private_key", "verify", "public_key")},
        has_out=options["out"] is not None,
        layout=options["layout"],
    )
    if not signatures.has_out:
        signatures.run(options["adapters"])
        return
    if signatures.private_key is not None:
        from export.signing import check_private_key

        # The export takes its time; whether its result can be signed is known before.
        check_private_key(signatures.private_key)

    from export.fold import ExportConfig, export_adapters

    layout = options.pop("layout")
    for name in ("adapters", "validation_files"):
        options[name] = tuple(options[name])
    config = ExportConfig(**options)
    if layout == "triton":
        _export_to_triton(config)
        return
    if layout != "bundle":
        raise UsageError(f"--layout {layout}: choose bundle or triton.")
    was_signed = config.add and (config.out / SIGNATURE).is_file()
    bundle = export_adapters(config)
    if was_signed and not signatures.sign:
        say(f"{config.out} was signed for what it held before; the signature is gone. Sign it anew with --sign.")
    signatures.run([config.out])
    for graph in bundle.graphs:
        path = bundle.graph_path(graph.precision)
        difference = max(task.max_logit_difference for task in bundle.tasks)
        exact = f"largest logit difference {difference:.1e}" if graph.precision == "fp32" else "ungated"
        costs = [str(gate) for gate in graph.gates] or [exact]
        say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {'; '.join(costs)}")


@dataclass(frozen=True)
class _Signatures:
    """What is asked of signatures.

    Attributes:
        sign: whether to sign.
        private_key: with what.
        verify: whether to check.
        public_key: against what.
        has_out: whether something is exported, and signed then.
        layout: of what is exported.

    Raises:
        UsageError: the flags do not go together.
    """

    sign: bool
    private_key: Path | None
    verify: bool
    public_key: Path | None
    has_out: bool
    layout: str

    def __post_init__(self) -> None:
        for action, key, flags in (
            (self.sign, self.private_key, ("--sign", "--private-key")),
            (self.verify, self.public_key, ("--verify", "--public-key")),
        ):
            if action != (key is not None):
                raise UsageError(f"{flags[0]} and {flags[1]} KEY belong together. Give both or neither.")
        if not (self.has_out or self.sign or self.verify):
            raise UsageError("--out is missing: the folder for the bundle. See python -m export --help.")
        if self.verify and (self.has_out or self.sign):
            raise UsageError("--verify checks folders that are there. Leave --out and --sign out.")
        if self.sign and self.has_out and self.layout != "bundle":
            raise UsageError(
                f"--sign signs bundles; --layout {self.layout} writes none. Sign the bundle it comes from."
            )

    def run(self, folders: Sequence[Path]) -> None:
        """Sign folders, or check them, and say what was found."""
        if not (self.sign or self.verify):
            return
        from export.signing import check_signature, describe, kind_of, sign_folder

        for folder in folders:
            if self.private_key is not None:
                signed = sign_folder(folder, self.private_key)
                say(f"{folder}: {len(signed.files)} files signed with the key of SHA-256 {signed.key_sha256}")
            if self.public_key is not None:
                say(describe(check_signature(folder, kind_of(folder), self.public_key)))


def _export_to_triton(config: "ExportConfig") -> None:
    """Export into a bundle that nobody sees, and lay it out."""
    from export.fold import export_adapters, task_name
    from export.triton import check_model_place, write_triton_repository

    if config.add:
        raise UsageError("--add needs a bundle to add to. Add there first, then run python -m export.triton BUNDLE.")
    name = task_name(config.adapters[0])
    # The export takes its time; whether its result may be written is known before.
    check_model_place(config.out, name, overwrite=config.overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_adapters(replace(config, out=Path(scratch) / name))
        folder = write_triton_repository(bundle, config.out, name=name, overwrite=config.overwrite)
    say(f"{folder}: serve it with tritonserver --model-repository {config.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
