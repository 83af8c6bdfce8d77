"""The hash that names a source in the manifest."""

from __future__ import annotations

import hashlib

from halo.checkpoint.base import Checkpoint
from halo.errors import SourceError

_PIECE = 16 << 20


def source_hash(checkpoint: Checkpoint) -> str:
    """Hexadecimal SHA-256 over each file's name, length and contents, in the order of ``checkpoint.files``.

    Reads every byte of the source, 16 MB at a time. Folders do not count: a copied checkpoint has the same hash.

    Raises:
        SourceError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in checkpoint.files:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                while piece := file.read(_PIECE):
                    digest.update(piece)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
