"""config.json, read with care: every value that reaches the GGUF is checked for its type first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from halo.errors import SourceError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SourceError: the file is missing, no JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is no valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: holds no JSON object; download it again")
    return data


def read_optional_json(path: Path) -> dict[str, Any]:
    """As ``read_json``, and an empty object for a file that is not there."""
    return read_json(path) if path.is_file() else {}


class Config:
    """config.json with ``text_config`` lifted to the top and a family's defaults below it.

    Attributes:
        path: of config.json, for messages.
        values: what was found; ``null`` counts as absent.
    """

    def __init__(self, path: Path, raw: dict[str, Any], defaults: dict[str, Any] | None = None):
        text = raw.get("text_config")
        merged = {**raw, **(text if isinstance(text, dict) else {})}
        self.path, self.raw = path, raw
        # An explicit null is kept where it means something (sliding_window: null switches the window off).
        self.explicit = merged
        self.values = {**(defaults or {}), **{k: v for k, v in merged.items() if v is not None}}

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def wrong(self, key: str, wanted: str) -> SourceError:
        return SourceError(
            f"{self.path}: {key} is {json.dumps(self.values.get(key))}, not {wanted}; mend or download it again"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            SourceError: absent without a default, or anything else.
        """
        value = self.values.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number.

        Raises:
            SourceError: absent without a default, or anything else.
        """
        return positive(self, key, self.values.get(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value.

        Raises:
            SourceError: anything else.
        """
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value


def positive(config: Config, key: str, value: Any) -> float:
    """``value`` as a positive finite float; SourceError naming ``key`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise SourceError(
            f"{config.path}: {key} is {json.dumps(value)}, not a positive number; mend or download it again"
        )
    return float(value)
