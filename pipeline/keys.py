"""Keys of signed checkpoints: Ed25519, in PEM files.

In: a file. Out: a function that signs, or one that verifies. The package ``cryptography`` is imported nowhere else, and
only when a key is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import types

_Key = TypeVar("_Key")

MAX_FILE_BYTES = 64 * 1024


def signer(path: Path) -> Callable[[bytes], bytes]:
    """Signs with the private key of a file: a text to 64 bytes. UsageError when the file holds no such key."""
    with _installed():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

    def load(content: bytes) -> types.PrivateKeyTypes:
        return load_pem_private_key(content, password=None)

    key = _loaded(path, "private", load)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"The private key in {path} is of another kind; only Ed25519 is allowed.")
    return key.sign


def verifier(path: Path) -> Callable[[bytes, bytes], bool]:
    """Whether a signature, given first, is one over a text by the public key of a file. UsageError as ``signer``."""
    with _installed():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _loaded(path, "public", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"The public key in {path} is of another kind; only Ed25519 is allowed.")

    def good(signature: bytes, text: bytes) -> bool:
        try:
            key.verify(signature, text)
        except InvalidSignature:
            return False
        return True

    return good


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError("Keys need the package cryptography: pip install 'bindsnoop[signing]'.") from error


def _loaded(path: Path, what: str, load: Callable[[bytes], _Key]) -> _Key:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"The {what} key {path} cannot be read: {error.strerror}.") from error
    try:
        return load(content)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} holds no {what} key; allowed is Ed25519 in PEM, without a password.") from error
