"""Keys of signed checkpoints: files as openssl makes them, and everything that is no such file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import keys
from pipeline.errors import UsageError
from tests.signing import openssl_keys


def test_what_one_signs_the_other_verifies(tmp_path: Path) -> None:
    """Keys that openssl made sign and verify; another text, signature or key does not."""
    private, public = openssl_keys(tmp_path)
    other = openssl_keys(tmp_path / "other")[1]

    signature = keys.signer(private)(b"text")

    assert len(signature) == 64
    assert keys.verifier(public)(signature, b"text")
    assert not keys.verifier(public)(signature, b"Text")
    assert not keys.verifier(public)(b"\0" + signature[1:], b"text")
    assert not keys.verifier(public)(b"", b"text")
    assert not keys.verifier(other)(signature, b"text")


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                                     b"\0" * 100_000])  # fmt: skip
def test_a_file_without_a_key_is_said(tmp_path: Path, content: bytes) -> None:
    """One sentence names the file and what is allowed."""
    path = tmp_path / "key.pem"
    path.write_bytes(content)

    for load, what in ((keys.signer, "private"), (keys.verifier, "public")):
        with pytest.raises(UsageError, match=rf"key.pem holds no {what} key; allowed is Ed25519"):
            load(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    """So is a folder."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match=f"The private key {path} cannot be read"):
            keys.signer(path)


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    """RSA would do, but there is one kind; and neither half of a pair is taken for the other."""
    private, public = openssl_keys(tmp_path, "RSA")
    with pytest.raises(UsageError, match="of another kind; only Ed25519"):
        keys.signer(private)
    with pytest.raises(UsageError, match="of another kind; only Ed25519"):
        keys.verifier(public)

    private, public = openssl_keys(tmp_path / "right")
    with pytest.raises(UsageError, match="holds no private key"):
        keys.signer(public)
    with pytest.raises(UsageError, match="holds no public key"):
        keys.verifier(private)


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    """Nobody is there to type it."""
    private, _ = openssl_keys(tmp_path)
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", private, "-aes256", "-passout", "pass:secret", "-out", locked], check=True
    )

    with pytest.raises(UsageError, match="without a password"):
        keys.signer(locked)


def test_without_the_package_it_is_named(tmp_path: Path) -> None:
    """Where cryptography is not installed, one sentence says what to install; nothing else needs it."""
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path; from pipeline import agent, keys, replay\n"
        "keys.signer(Path('x'))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "UsageError: Keys need the package cryptography: pip install 'bindsnoop[signing]'." in done.stderr
