"""Signatures of bundles and adapters, made and checked through ``python -m export``, with right and wrong keys."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from export.__main__ import main
from export.bundle import load_bundle
from export.score import main as score_main
from export.signing import INSTALL, PASSWORD_VARIABLE, verify_bundle
from tests.conftest import ROOT, Data, flip_bit
from train.adapter import load_adapter
from train.errors import BundleError, UsageError
from train.files import write_record

Folders = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Keys:
    """The files of a pair of keys."""

    private: Path
    public: Path


PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def write_keys(folder: Path, key: PrivateKey, encryption: KeySerializationEncryption | None = None) -> Keys:
    folder.mkdir(parents=True)
    keys = Keys(folder / "key.pem", folder / "key.pub")
    keys.private.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption() if encryption is None else encryption)
    )
    keys.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_keys(tmp_path_factory.mktemp("keys") / "mine", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_keys(tmp_path_factory.mktemp("keys") / "other", ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture
def signed(bundle: Folders, keys: Keys, tmp_path: Path, capsys: Capture) -> Path:
    """A copy of a bundle, signed with `keys`."""
    folder = tmp_path / "signed"
    shutil.copytree(bundle("bert"), folder)
    assert sign(folder, keys) == 0
    capsys.readouterr()
    return folder


def sign(folder: Path, keys: Keys) -> int:
    return main([str(folder), "--sign", "--private-key", str(keys.private)])


def verify(folder: Path, keys: Keys) -> int:
    return main([str(folder), "--verify", "--public-key", str(keys.public)])


def error_of(capsys: Capture) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def payload_of(folder: Path) -> dict[str, str]:
    """What `model.sig` says of each file, read without our code."""
    signature = json.loads((folder / "model.sig").read_text())
    statement = json.loads(base64.b64decode(signature["dsseEnvelope"]["payload"]))
    return {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}


@pytest.mark.parametrize("kind", ["bundle", "adapter"])
def test_a_signed_folder_is_what_it_was_and_says_who_signed_what(
    kind: str, bundle: Folders, adapter: Folders, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    source = (bundle if kind == "bundle" else adapter)("bert")
    folder = tmp_path / "f"
    shutil.copytree(source, folder)
    # What the library would leave out by itself.
    (folder / ".gitattributes").write_text("*.onnx filter=lfs\n")
    names = {path.name for path in folder.iterdir()}
    capsys.readouterr()
    assert sign(folder, keys) == 0
    assert f"{len(names)} files signed" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == names | {"model.sig"}
    # Every file, the record among them, by the hash that anybody can compute.
    assert payload_of(folder) == {name: sha256(folder / name) for name in names}
    assert verify(folder, keys) == 0
    said = capsys.readouterr().out
    assert f"a {kind} of " in said.replace("an adapter", "a adapter")
    assert sha256(keys.public) in said
    # Whoever does not ask for a signature is not disturbed by one.
    if kind == "bundle":
        before, after = load_bundle(source), load_bundle(folder)
        assert before.tasks == after.tasks
    else:
        assert load_adapter(source).sha256 == load_adapter(folder).sha256


def test_other_programs_can_check_the_signature(signed: Path, keys: Keys) -> None:
    """The library's own command line, with nothing of ours."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    flags = ["--signature", str(signed / "model.sig"), "--public_key", str(keys.public)]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    flip_bit(signed / "tokenizer.json", 100)
    assert subprocess.run([*command, *flags], capture_output=True, check=False).returncode != 0


def test_a_wrong_key_is_refused(signed: Path, other_keys: Keys, capsys: Capture) -> None:
    assert verify(signed, other_keys) == 2
    error = error_of(capsys)
    assert "is signed with another key" in error
    assert sha256(other_keys.public)[:12] in error
    with pytest.raises(BundleError, match="is signed with another key"):
        load_bundle(signed, public_key=other_keys.public)


def test_a_signature_that_only_claims_to_be_of_the_right_key_is_refused(
    signed: Path, keys: Keys, other_keys: Keys, capsys: Capture
) -> None:
    """Made with another key, with the name of the right one written into it."""
    assert sign(signed, other_keys) == 0
    capsys.readouterr()
    path = signed / "model.sig"
    signature = json.loads(path.read_text())
    signature["verificationMaterial"]["publicKey"]["hint"] = sha256(keys.public)
    path.write_text(json.dumps(signature))
    assert verify(signed, keys) == 2
    assert "was not made with" in error_of(capsys)


@pytest.mark.parametrize(
    "name", ["manifest.json", "model.onnx", "tokenizer.json", "config.json", "special_tokens_map.json"]
)
def test_one_flipped_bit_after_the_signature_is_found_and_named(
    name: str, signed: Path, keys: Keys, capsys: Capture
) -> None:
    flip_bit(signed / name, 50)
    assert verify(signed, keys) == 2
    assert f"is not what was signed: {name} was changed" in error_of(capsys)


def test_a_stranger_who_makes_the_hashes_anew_is_found_by_the_signature_alone(
    signed: Path, keys: Keys, capsys: Capture
) -> None:
    from export.bundle import BUNDLE
    from train.files import content_of

    flip_bit(signed / "config.json", 100)
    manifest = json.loads((signed / "manifest.json").read_text())
    signature = (signed / "model.sig").read_bytes()
    (signed / "manifest.json").unlink()
    write_record(signed, BUNDLE, content_of(manifest))
    load_bundle(signed)  # the hashes fit again
    # What is written anew is no longer signed; he puts the old signature back.
    assert not (signed / "model.sig").exists()
    (signed / "model.sig").write_bytes(signature)
    assert verify(signed, keys) == 2
    assert "config.json was changed, manifest.json was changed" in error_of(capsys)
    with pytest.raises(BundleError, match="is not what was signed"):
        load_bundle(signed, public_key=keys.public)


def test_a_file_more_or_less_is_found(signed: Path, keys: Keys, capsys: Capture) -> None:
    (signed / "vocab.txt").write_text("more")
    assert verify(signed, keys) == 2
    assert "vocab.txt was added" in error_of(capsys)
    (signed / "vocab.txt").unlink()
    (signed / "special_tokens_map.json").unlink()
    assert verify(signed, keys) == 2
    assert "special_tokens_map.json is missing" in error_of(capsys)


def test_a_signature_that_leaves_a_file_out_is_not_enough(signed: Path, keys: Keys, capsys: Capture) -> None:
    """As other programs can make it, with the right key: whoever holds it need not mean the whole folder."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    left_out = ["model.sig", "model.onnx"]
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=left_out)).sign(signed, signed / "model.sig")
    assert verify(signed, keys) == 2
    assert "leaves out model.onnx" in error_of(capsys)


def test_a_missing_signature_and_one_that_is_none_are_refused(signed: Path, keys: Keys, capsys: Capture) -> None:
    path = signed / "model.sig"
    good = json.loads(path.read_text())
    for content in (b"", b"{}", b"[]", b"\xff", b"[" * 100_000, json.dumps(good | {"dsseEnvelope": 1}).encode()):
        path.write_bytes(content)
        assert verify(signed, keys) == 2
        assert "model.sig is no signature made with a key" in error_of(capsys)
    for broken in (good | {"mediaType": "x"}, good | {"dsseEnvelope": good["dsseEnvelope"] | {"signatures": []}}):
        path.write_text(json.dumps(broken))
        assert verify(signed, keys) == 2
        assert "is not what was signed" in error_of(capsys)
    path.unlink()
    assert verify(signed, keys) == 2
    assert "is not signed: it has no model.sig" in error_of(capsys)
    with pytest.raises(BundleError, match="is not signed"):
        verify_bundle(signed, keys.public)


def test_keys_that_cannot_be_used_are_refused(signed: Path, keys: Keys, tmp_path: Path, capsys: Capture) -> None:
    brainpool = write_keys(tmp_path / "brainpool", ec.generate_private_key(ec.BrainpoolP256R1()))
    edwards = write_keys(tmp_path / "edwards", ed25519.Ed25519PrivateKey.generate())
    rivest = write_keys(tmp_path / "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    none = Keys(tmp_path / "none.pem", tmp_path / "none.pub")
    text = Keys(tmp_path / "text.pem", tmp_path / "text.pub")
    pipe = Keys(tmp_path / "pipe", tmp_path / "pipe")
    os.mkfifo(pipe.private)
    for path in (text.private, text.public):
        path.write_text("no key")
    swapped = Keys(keys.public, keys.private)
    before = (signed / "model.sig").read_bytes()
    for bad, words in (
        (none, "cannot be read (No such file or directory)"),
        (pipe, "is no plain file"),
        (text, "key in PEM"),
        (swapped, "key in PEM"),
        (brainpool, "on the curve brainpoolP256r1"),
        (edwards, "of the kind"),
        (rivest, "of the kind RSA"),
    ):
        for run in (sign, verify):
            assert run(signed, bad) == 2
            error = error_of(capsys)
            assert words in error
            assert "openssl ecparam" in error
    assert (signed / "model.sig").read_bytes() == before


def test_an_encrypted_key_needs_its_password(
    signed: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted = write_keys(
        tmp_path / "encrypted", ec.generate_private_key(ec.SECP521R1()), BestAvailableEncryption("pässword".encode())
    )
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert sign(signed, encrypted) == 2
    assert f"is encrypted. Set the environment variable {PASSWORD_VARIABLE}" in error_of(capsys)
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    assert sign(signed, encrypted) == 2
    assert "or its password is another" in error_of(capsys)
    monkeypatch.setenv(PASSWORD_VARIABLE, "pässword")
    assert sign(signed, encrypted) == 0
    assert verify(signed, encrypted) == 0


def test_a_password_for_a_key_that_has_none_does_not_matter(
    signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "needless")
    assert sign(signed, keys) == 0
    assert verify(signed, keys) == 0


def test_what_is_damaged_or_no_folder_of_ours_gets_no_signature(
    signed: Path, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    (signed / "model.sig").unlink()
    (signed / "folder").mkdir()
    assert sign(signed, keys) == 2
    assert "holds a folder, folder" in error_of(capsys)
    (signed / "folder").rmdir()
    flip_bit(signed / "model.onnx", 500)
    assert sign(signed, keys) == 2
    assert "model.onnx is damaged" in error_of(capsys)
    for folder in (tmp_path, tmp_path / "none"):
        assert sign(folder, keys) == 2
        assert "is neither a bundle nor an adapter" in error_of(capsys)
    assert not list(tmp_path.rglob("*.sig*"))
    with pytest.raises(BundleError, match="There is no bundle folder"):
        verify_bundle(tmp_path / "none", keys.public)


def test_a_bundle_is_signed_right_at_its_export_and_loses_its_signature_when_it_grows(
    adapter: Folders, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "b"
    key = ["--private-key", str(keys.private)]
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        shutil.copytree(adapter("bert"), folder)
    assert main([str(folders[0]), str(folders[1]), "--out", str(out), "--sign", *key]) == 0
    assert load_bundle(out, public_key=keys.public).precisions == ("fp32",)
    capsys.readouterr()
    assert main([str(folders[2]), "--out", str(out), "--add"]) == 0
    assert "the signature is gone" in capsys.readouterr().out
    assert not (out / "model.sig").exists()
    assert "model.sig" not in json.loads((out / "manifest.json").read_text())["sha256"]
    assert main([str(out), "--sign", *key]) == 0
    assert len(load_bundle(out, public_key=keys.public).tasks) == 3


def test_a_key_that_cannot_sign_is_found_before_the_export(
    adapter: Folders, no_leftovers: Path, capsys: Capture
) -> None:
    flags = ["--sign", "--private-key", str(no_leftovers / "none.pem")]
    assert main([str(adapter("bert")), "--out", str(no_leftovers / "b"), *flags]) == 2
    assert "none.pem cannot be read" in error_of(capsys)
    assert list(no_leftovers.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sign", "--sign and --private-key KEY belong together"),
        ("--private-key k", "--sign and --private-key KEY belong together"),
        ("--verify", "--verify and --public-key KEY belong together"),
        ("--out b --public-key k", "--verify and --public-key KEY belong together"),
        ("--verify --public-key k --out b", "--verify checks folders that are there"),
        ("--verify --public-key k --sign --private-key k", "--verify checks folders that are there"),
        ("--sign --private-key k --out b --layout triton", "--layout triton writes none"),
        ("", "--out is missing"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: str, words: str, capsys: Capture) -> None:
    assert main(["a", *flags.split()]) == 2
    assert words in error_of(capsys)


def test_a_file_is_labelled_only_by_a_bundle_with_the_right_signature(
    signed: Path, keys: Keys, other_keys: Keys, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    words = [str(signed), "--in", str(data.validation_file), "--threads", "1"]
    out = tmp_path / "x.csv"
    assert score_main([*words, "--out", str(out), "--public-key", str(other_keys.public)]) == 2
    assert "is signed with another key" in error_of(capsys)
    assert not out.exists()
    assert score_main([*words, "--out", str(out), "--public-key", str(keys.public)]) == 0
    assert out.exists()


def test_a_triton_model_does_not_carry_a_signature_of_other_files(signed: Path, tmp_path: Path) -> None:
    from export.triton import write_triton_repository

    model = write_triton_repository(load_bundle(signed), tmp_path / "models")
    assert not (model / "model.sig").exists()
    assert (model / "tokenizer.json").is_file()


@pytest.mark.parametrize("package", ["model_signing", "OpenSSL"])
def test_without_the_optional_packages_the_error_names_the_command(
    package: str, signed: Path, keys: Keys, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in {"model_signing", package}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for run in (sign, verify):
        assert run(signed, keys) == 2
        assert f"Run: {INSTALL}" in error_of(capsys)
    with pytest.raises(UsageError, match="pip install model-signing"):
        load_bundle(signed, public_key=keys.public)
    load_bundle(signed)


def test_the_versions_named_are_those_that_are_tested() -> None:
    from importlib.metadata import version

    assert f"model-signing=={version('model-signing')} pyopenssl=={version('pyOpenSSL')}" in INSTALL


def test_nothing_of_it_is_imported_until_it_is_needed() -> None:
    code = (
        "import sys, export.__main__, export.score, export.signing\n"
        "print([name for name in ('model_signing', 'cryptography', 'sigstore') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
