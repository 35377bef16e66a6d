"""Keys for tests, made by openssl as an operator would make them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl_keys(folder: Path, kind: str = "ED25519") -> tuple[Path, Path]:
    """A private and a public key in PEM, by the two commands of docs/testimony.md."""
    folder.mkdir(exist_ok=True)
    private, public = folder / "private.pem", folder / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", kind, "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public
