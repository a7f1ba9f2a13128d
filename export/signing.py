"""Signatures: who made a bundle or an adapter. Its hashes alone tell of accidents, as anybody can make them anew.

    model.sig    in the folder: the SHA-256 of every other file, signed with an elliptic-curve key

The optional package `model_signing` makes and checks it (OpenSSF Model Signing, a Sigstore bundle with an in-toto
statement), so that other programs can do so too; no network is needed. A pair of keys:

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle import BUNDLE, load_bundle
from train.adapter import ADAPTER, load_adapter
from train.errors import PromptfoldError, UsageError, first_line
from train.files import SIGNATURE, FolderKind, sha256_of_file, write_whole
from train.limits import MAX_RECORD_BYTES, MIB, check_entries, check_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

INSTALL = "pip install model-signing==1.1.1 pyopenssl==26.4.0"
"""model-signing imports pyOpenSSL and does not say so to pip."""

PASSWORD_VARIABLE = "PROMPTFOLD_KEY_PASSWORD"  # noqa: S105 -- a name
"""The environment variable with the password of a private key: a flag would show in the list of processes."""

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAKE_KEYS = (
    "Make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
    "openssl ec -in key.pem -pubout -out key.pub"
)
_MAX_KEY_BYTES = MIB


@dataclass(frozen=True)
class Signed:
    """A folder and the signature over every file in it.

    Attributes:
        folder: where it lies.
        kind: "bundle" or "adapter".
        key_sha256: of the public key in the form that openssl writes, so mostly of the file itself.
        files: the names of what is signed.
    """

    folder: Path
    kind: str
    key_sha256: str
    files: tuple[str, ...]


def kind_of(folder: Path) -> FolderKind:
    """Whether a folder is a bundle or an adapter, by its record.

    Raises:
        UsageError: it is neither.
    """
    for kind in (BUNDLE, ADAPTER):
        if (folder / kind.record).is_file():
            return kind
    raise UsageError(
        f"{folder} is neither a bundle nor an adapter: it has no {BUNDLE.record} and no {ADAPTER.record}. "
        "Give a folder that `python -m export` or `python -m train` wrote."
    )


def check_private_key(path: Path) -> None:
    """See that a private key can sign, before any work is done.

    Raises:
        UsageError: it cannot, or the package that signs is not installed.
    """
    _import_library()
    _load_private_key(path)


def sign_folder(folder: Path, private_key: Path) -> Signed:
    """Sign a bundle or an adapter; an older signature is replaced.

    Args:
        private_key: an elliptic-curve key in PEM; its password, if it has one, is in `PASSWORD_VARIABLE`.

    Raises:
        UsageError: the key cannot be used, the folder is neither or cannot be written, or a package is not installed.
        BundleError, AdapterError: a file of it was changed since its hash was recorded.
    """
    _import_library()
    from model_signing import signing

    key = _load_private_key(private_key)
    kind = kind_of(folder)
    # What is damaged shall not get a signature that says otherwise.
    (load_bundle if kind is BUNDLE else load_adapter)(folder)
    files = _files_to_sign(folder, kind)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / SIGNATURE
        config = signing.Config().set_hashing_config(_hashing())
        # The library's hint says str, and it hands the password on to one that takes bytes.
        password: Any = key.password
        config.use_elliptic_key_signer(private_key=private_key, password=password).sign(folder, made)
        content = made.read_bytes()
    try:
        write_whole(folder / SIGNATURE, content)
    except OSError as cause:
        raise UsageError(
            f"{folder / SIGNATURE} cannot be written ({cause.strerror or cause}). Sign a copy elsewhere."
        ) from cause
    return Signed(folder, kind.name, _sha256_of_key(key.key.public_key()), files)


def verify_bundle(folder: Path, public_key: Path) -> Signed:
    """Check that a bundle is signed, and every file of it as it was then; `load_bundle` does so on demand.

    Raises:
        BundleError: it is not signed with that key, or a file was changed, added or removed since.
        UsageError: the key cannot be used, or a package is not installed.
    """
    return check_signature(folder, BUNDLE, public_key)


def check_signature(folder: Path, kind: FolderKind, public_key: Path) -> Signed:
    """The same of a folder of a kind.

    Args:
        public_key: in PEM, of the one whose signature is wanted.

    Raises:
        kind.error: it is not signed with that key, or a file was changed, added or removed since.
        UsageError: the key cannot be used, or a package is not installed.
    """
    _import_library()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    if not folder.is_dir():
        raise kind.error(f"There is no {kind.name} folder {folder}. Give one that `{kind.command}` wrote.")
    key_sha256 = _sha256_of_key(_load_public_key(public_key))
    files = _files_to_sign(folder, kind)
    path = folder / SIGNATURE
    if not path.is_file():
        raise kind.error(
            f"{folder} is not signed: it has no {SIGNATURE}. Ask whoever made it for a signed copy, or sign your own: "
            f"python -m export {folder} --sign --private-key KEY"
        )
    check_file(path, MAX_RECORD_BYTES, kind.error, "Take another copy.")
    content = path.read_bytes()
    statement = _read_statement(content, path, kind)
    if statement.key_sha256 != key_sha256:
        raise kind.error(
            f"{folder} is signed with another key (SHA-256 {statement.key_sha256[:12]}…) than {public_key} "
            f"(SHA-256 {key_sha256[:12]}…). Do not use it unless you know whose key that is."
        )
    with tempfile.TemporaryDirectory() as scratch:
        # What is checked is what was read.
        copy = Path(scratch) / SIGNATURE
        copy.write_bytes(content)
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(_hashing())
        try:
            verifier.verify(folder, copy)
        except InvalidSignature as cause:
            raise kind.error(
                f"{path} was not made with {public_key}, or was changed. Do not use {folder}; take another copy."
            ) from cause
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as cause:
            trouble = _difference(folder, files, statement) or first_line(cause)
            raise kind.error(f"{folder} is not what was signed: {trouble}. Take another copy.") from cause
    # A signature of another program may leave files out, as its owner liked.
    if unsigned := sorted(set(files) - set(statement.sha256)):
        raise kind.error(f"{path} leaves out {', '.join(unsigned)}. Ask for a copy that is signed as a whole.")
    return Signed(folder, kind.name, key_sha256, files)


def describe(signed: Signed) -> str:
    """For people: who signed what, and what it is.

    Raises:
        BundleError, AdapterError: the folder cannot be used all the same.
    """
    if signed.kind == BUNDLE.name:
        bundle = load_bundle(signed.folder)
        what = f"a bundle of {bundle.base_model} for {', '.join(task.name for task in bundle.tasks)}"
    else:
        adapter = load_adapter(signed.folder)
        what = f"an adapter of {adapter.model} for {adapter.task.name}"
    return (
        f"{signed.folder}: {what}; {len(signed.files)} files, all as they were signed with the key of SHA-256 "
        f"{signed.key_sha256}"
    )


def _files_to_sign(folder: Path, kind: FolderKind) -> tuple[str, ...]:
    """The names of all files but the signature; a folder within is refused, as nobody looks into it.

    Raises:
        kind.error: as `check_entries`, or there is a folder.
    """
    check_entries(folder, kind.error, kind.remedy)
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            raise kind.error(f"{folder} holds a folder, {path.name}; signed are files alone. Remove it.")
        if path.name != SIGNATURE:
            names.append(path.name)
    return tuple(names)


@dataclass(frozen=True)
class _Statement:
    """What a signature says, true or not.

    Attributes:
        key_sha256: of the public key that belongs to it.
        sha256: by file name.
    """

    key_sha256: str
    sha256: dict[str, str]


def _read_statement(content: bytes, path: Path, kind: FolderKind) -> _Statement:
    try:
        signature = json.loads(content)
        statement = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
        return _Statement(
            key_sha256=str(signature["verificationMaterial"]["publicKey"]["hint"]),
            sha256={str(entry["name"]): str(entry["digest"]) for entry in statement["predicate"]["resources"]},
        )
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise kind.error(f"{path} is no signature made with a key. Take another copy.") from cause


def _difference(folder: Path, files: tuple[str, ...], statement: _Statement) -> str:
    """What changed since a statement was signed, in words; empty where nothing did."""
    parts = [f"{name} is missing" for name in sorted(set(statement.sha256) - set(files))]
    for name in files:
        if name not in statement.sha256:
            parts.append(f"{name} was added")
        elif sha256_of_file(folder / name) != statement.sha256[name]:
            parts.append(f"{name} was changed")
    return ", ".join(parts)


def _hashing() -> Any:
    """Every file but the signature, also those that git keeps, which the library would leave out."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _import_library() -> None:
    try:
        import model_signing.signing
        import model_signing.verifying  # noqa: F401
    except ImportError as cause:
        raise UsageError(f"Signatures need a package that is not installed ({cause}). Run: {INSTALL}") from cause


@dataclass(frozen=True)
class _PrivateKey:
    """A private key, and the password of its file, where that has one."""

    key: "EllipticCurvePrivateKey"
    password: bytes | None


def _load_private_key(path: Path) -> _PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path, "--private-key")
    password = None
    with _key_failures(path, "--private-key", "private"):
        try:
            key = load_pem_private_key(content, None)
        except TypeError as cause:  # it is encrypted
            password = os.environ.get(PASSWORD_VARIABLE, "").encode()
            if not password:
                raise UsageError(
                    f"--private-key {path} is encrypted. Set the environment variable {PASSWORD_VARIABLE} to its password."
                ) from cause
            key = load_pem_private_key(content, password)
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _wrong_kind(path, "--private-key", key)
    return _PrivateKey(key, password)


def _load_public_key(path: Path) -> "EllipticCurvePublicKey":
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read_key(path, "--public-key")
    with _key_failures(path, "--public-key", "public"):
        key = load_pem_public_key(content)
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _wrong_kind(path, "--public-key", key)
    return key


def _read_key(path: Path, flag: str) -> bytes:
    check_file(path, _MAX_KEY_BYTES, UsageError, f"Give {flag} a key in PEM. {_MAKE_KEYS}")
    return path.read_bytes()


@contextmanager
def _key_failures(path: Path, flag: str, kind: str) -> Iterator[None]:
    """Turn what cryptography raises into a `UsageError`."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except PromptfoldError:
        raise
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        raise UsageError(
            f"{flag} {path} is no {kind} key in PEM, or its password is another ({first_line(cause)}). {_MAKE_KEYS}"
        ) from cause


def _wrong_kind(path: Path, flag: str, key: object) -> UsageError:
    curve = getattr(getattr(key, "curve", None), "name", "")
    found = f"on the curve {curve}" if curve else f"of the kind {type(key).__name__}"
    return UsageError(f"{flag} {path} is a key {found}; taken are keys on {', '.join(_CURVES)}. {_MAKE_KEYS}")


def _sha256_of_key(key: "EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
