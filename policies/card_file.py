"""A policy's card as Markdown, beside its ``.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from halo.staging import staged_file


def write_card(path: Path, name: str, card: Mapping[str, object]) -> None:
    """One line a value, tables for values that are mappings themselves."""
    lines = [f"# Policy `{name}`", ""]
    for key, value in card.items():
        title = key.replace("_", " ")
        if isinstance(value, Mapping):
            lines += ["", f"| {title} | |", "|---|---|", *(f"| {k} | {v} |" for k, v in value.items()), ""]
        else:
            lines.append(f"- **{title}**: {value}")
    with staged_file(path, force=True) as file:
        file.write(("\n".join(lines).rstrip() + "\n").encode())
