"""Text to calibrate on and to measure with: the packaged text, or a user's file, cut into windows of token ids."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

from halo.errors import SourceError

PARTS = ("prose", "dialogue", "code", "maths", "formats", "languages")


def packaged_text(split: str) -> str:
    """HALO's own text: ``calibration`` or ``heldout`` (disjoint), all kinds one after another."""
    folder = resources.files("halo") / "data" / "text" / split
    return "\n\n".join((folder / f"{part}.txt").read_text(encoding="utf-8") for part in PARTS)


def read_text(path: Path) -> str:
    """A user's text file.

    Raises:
        SourceError: missing, not UTF-8, or without any text in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path}: the text cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    if not text.strip():
        raise SourceError(f"{path}: the text is empty; give a file with some thousand words")
    return text


def windows(ids: np.ndarray, n_tokens: int, length: int, bos: int | None) -> np.ndarray:
    """Windows spread evenly over a text, so that a few of them still hold every kind of text in it.

    Args:
        ids: the whole text's token ids, shape (n,).
        n_tokens: how many tokens are wanted, rounded up to whole windows and cut to what the text has.
        length: of a window. A text shorter than one window becomes one shorter window.
        bos: takes the place of each window's first token, as llama-imatrix does it (tools/imatrix/imatrix.cpp); None to
            leave it.

    Returns:
        int32 of shape (windows, length).

    Raises:
        SourceError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise SourceError("the calibration text has fewer than two tokens; give a longer one")
    length = min(length, len(ids))
    available = len(ids) // length
    wanted = max(1, min(available, -(-n_tokens // length)))
    starts = (np.arange(wanted) * available // wanted) * length
    out = np.stack([ids[s : s + length] for s in starts]).astype(np.int32)
    if bos is not None:
        out[:, 0] = bos
    return out
