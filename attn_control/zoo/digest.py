"""What tells the weights of two folders apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

CONTENT_LIMIT = 64_000_000  # bytes of weights that are cheap enough to hash whole


def weights_of(folder: Path) -> str:
    """A digest of all files that load: 16 hexadecimal digits. Of folders above `CONTENT_LIMIT`,
    names, sizes and times of change stand in for what the files hold.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    whole = sum(path.stat().st_size for path in files) <= CONTENT_LIMIT
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        stat = path.stat()
        digest.update(path.read_bytes() if whole else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
