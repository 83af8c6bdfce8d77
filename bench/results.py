"""What every benchmark does with what it found: a Markdown table on stdout, a JSON file in ``bench/results``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with the option every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=_FOLDER, metavar="DIR", help=f"default: {_FOLDER}")
    return made


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers right, the first column left."""
    ruler = [":--", *["--:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (headers, ruler, *rows))


def write_result(folder: Path, name: str, machine: dict[str, Any], findings: dict[str, Any]) -> Path:
    """Write ``NAME.json``; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {"benchmark": name, "machine": machine, **findings}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def megabytes(nbytes: float) -> str:
    """For tables, where one unit for all rows reads best."""
    return f"{nbytes / 1e6:.1f}"
