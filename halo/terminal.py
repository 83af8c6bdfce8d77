"""What the command line draws: progress on stderr, results on stdout. ``NO_COLOR`` and pipes are respected (rich)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.style import Style
from rich.table import Table
from rich.text import Text

from halo.budget import human
from halo.events import Event, Listener, Notice
from halo.heatmap import HeatMap, heat_map, warmth

if TYPE_CHECKING:
    from halo.bundle import Applied
    from halo.inspection import Inspection
    from halo.plan import Plan
    from halo.policy import Policy

_VERBS = {
    "read": "reading",
    "calibrate": "calibrating",
    "damage": "measuring damage",
    "fold": "folding",
    "quantise": "quantising",
    "verify": "running it once",
    "bundle": "writing the bundle",
}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed, unit = task.speed, task.fields["unit"]
        if not speed or unit not in ("tokens", "weights", "tensors", "sites"):
            return Text("")
        scaled, prefix = (speed / 1e6, "M") if speed >= 1e6 else (speed / 1e3, "k") if speed >= 1e4 else (speed, "")
        return Text(f"{scaled:.1f} {prefix}{unit}/s" if prefix else f"{speed:.0f} {unit}/s")


class _LiveDisplay:
    """A bar a stage, with rate and time left."""

    def __init__(self, bars: Bars):
        self.bars, self.stage = bars, ""
        self.task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.bars.console.print(f"note: {event.text}", markup=False, highlight=False)
            return
        if event.stage != self.stage or self.task is None:
            self.stage = event.stage
            self.task = self.bars.add_task(
                _VERBS.get(event.stage, event.stage), total=event.total, unit=event.unit, item=""
            )
        self.bars.update(
            self.task, completed=event.done, total=event.total, item=event.item if event.done < event.total else ""
        )


class _PlainDisplay:
    """A line a stage, for pipes and logs."""

    def __init__(self, console: Console):
        self.console, self.stage = console, ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.console.print(f"note: {event.text}", markup=False, highlight=False, soft_wrap=True)
        elif event.stage != self.stage:
            self.stage = event.stage
            self.console.print(f"{_VERBS.get(event.stage, event.stage)} ...", markup=False, highlight=False)


@contextmanager
def display(silent: bool) -> Iterator[Listener]:
    """A listener that draws on stderr; nothing at all when ``silent``."""
    console = Console(stderr=True)
    if silent:
        yield lambda event: None
    elif not console.is_terminal:
        yield _PlainDisplay(console)
    else:
        columns = (
            TextColumn("{task.description:<18}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), _Rate(),
            TimeRemainingColumn(compact=True), TextColumn("{task.fields[item]}", markup=False),
        )  # fmt: skip
        with Bars(*columns, console=console) as bars:
            yield _LiveDisplay(bars)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, Text(value))
    return table


def _types_line(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _heat(kind: str) -> Style:
    """From blue (few bits) to red (many)."""
    at = warmth(kind)
    return Style(
        color="black", bgcolor=f"rgb({int(90 + 165 * at)},{int(190 - 70 * abs(at - 0.5) * 2)},{int(255 - 175 * at)})"
    )


def _heat_table(found: HeatMap) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("block", justify="right")
    for role in found.roles:
        table.add_column(role, no_wrap=True)
    for block, kinds in found.rows:
        cells = [Text(f" {k:<8}", style=_heat(k)) if k else Text("") for k in kinds]
        table.add_row(str(block), *cells)
    return table


def _show_heat_map(console: Console, found: HeatMap) -> None:
    if found.rows:
        console.print(_heat_table(found))
    for name, kind in found.outside.items():
        console.print(Text(f"{name}  ") + Text(f" {kind} ", style=_heat(kind)))


def show_plan(plan: Plan, every_tensor: bool) -> None:
    """The table of what would be done."""
    console = Console()
    _show_heat_map(console, heat_map({name: kind.name for name, kind in plan.chosen.items()}))
    console.print(
        _table(
            [
                ("file", f"{human(plan.file_bytes)} ({plan.file_bytes} bytes), {plan.bpw:.3f} bits per weight"),
                ("budget", f"{plan.budget['asked']}: {human(float(str(plan.budget['file_bytes'])))}"),
                ("types", _types_line(dict(plan.type_counts()))),
                ("folding", f"{len(plan.fold_exponents)} places" if plan.fold_exponents else "none"),
                ("memory", f"{human(plan.expected_memory)} at {plan.context} tokens (estimated)"),
            ]
        )
    )
    if every_tensor:
        table = Table("tensor", "shape", "type", "bytes", "damage", "worth", box=None, pad_edge=False)
        for name, kind in plan.chosen.items():
            tensor, found = plan.checkpoint.tensors[name], plan.damage.get(name)
            damage = f"{found.by_type[kind.name]:.3g}" if found and kind.name in found.by_type else ""
            worth = f"{plan.worth[name]:.3g}" if name in plan.worth else ""
            table.add_row(
                name, "x".join(map(str, tensor.shape)), kind.name, str(kind.nbytes(tensor.n_elements)), damage, worth
            )
        console.print(table)


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    return {
        "file_bytes": plan.file_bytes,
        "bpw": plan.bpw,
        "budget": plan.budget,
        "context": plan.context,
        "expected_memory": plan.expected_memory,
        "fold_exponents": plan.fold_exponents,
        "notes": plan.notes,
        "tensors": {
            name: {
                "type": kind.name,
                "damage": plan.damage[name].by_type.get(kind.name) if name in plan.damage else None,
                "worth": plan.worth.get(name),
            }
            for name, kind in plan.chosen.items()
        },
    }


def applied_record(done: Applied) -> dict[str, Any]:
    """A bundle as plain values: its path and its manifest."""
    return {"path": str(done.path)} | asdict(done.manifest)


def show_applied(done: Applied) -> None:
    """The short table at the end of ``apply``."""
    manifest = done.manifest
    counts: dict[str, int] = {}
    for record in manifest.tensors.values():
        counts[record.type] = counts.get(record.type, 0) + 1
    substituted = sum(record.substitution is not None for record in manifest.tensors.values())
    measured = manifest.measured
    held = sum(v for v in measured["buffers"].values() if isinstance(v, int))
    rows = [
        ("bundle", str(done.path)),
        ("size", f"{human(manifest.file['bytes'])}, {manifest.file['bpw']:.3f} bits per weight"),
        ("types", _types_line(counts)),
        ("folding", f"{len(manifest.fold_exponents)} places" if manifest.fold_exponents else "none"),
        ("memory", f"{human(held)} at {measured['context']} tokens (measured: llama.cpp's buffers)"),
        ("substitutions", str(substituted) if substituted else "none"),
        ("it says", done.smoke.text.replace("\n", " ")),
    ]
    Console().print(_table(rows))


def show_inspection(found: Inspection, every_tensor: bool) -> None:
    """A file's types, bytes and damage."""
    console = Console()
    console.print(
        _table(
            [
                ("file", str(found.path)),
                ("model", f"{found.name} ({found.architecture}), {found.n_params / 1e6:.1f} M parameters"),
                ("size", f"{human(found.file_bytes)}, {found.bpw:.3f} bits per weight"),
            ]
        )
    )
    table = Table("type", "tensors", "bytes", "mean damage", box=None, pad_edge=False, header_style="bold")
    for kind in sorted({t.type for t in found.tensors}):
        views = [t for t in found.tensors if t.type == kind]
        known = [t.damage for t in views if t.damage is not None]
        table.add_row(
            kind,
            str(len(views)),
            human(sum(t.nbytes for t in views)),
            f"{sum(known) / len(known):.3g}" if known else "",
        )
    console.print(table)
    _show_heat_map(console, found.heat_map())
    if every_tensor:
        listing = Table("tensor", "shape", "type", "bytes", "damage", box=None, pad_edge=False, header_style="bold")
        for t in found.tensors:
            damage = "" if t.damage is None else f"{t.damage:.3g}"
            listing.add_row(t.name, "x".join(map(str, t.shape)), t.type, str(t.nbytes), damage)
        console.print(listing)


def policy_record(policy: Policy) -> dict[str, Any]:
    """A policy's card as plain values."""
    return {
        "name": policy.name,
        "head": policy.head,
        "family": policy.family,
        "feature_set": policy.features.name,
        "sha256": policy.sha256,
        "card": policy.card,
    }


def show_policies(policies: list[Policy], in_full: bool) -> None:
    """Shipped policies, a line each, or one card in full."""
    console = Console()
    if in_full:
        for policy in policies:
            rows = [
                ("name", policy.name),
                ("head", policy.head),
                ("family", policy.family),
                ("features", policy.features.name),
            ]
            console.print(_table(rows + [(key, str(value)) for key, value in policy.card.items()]))
        return
    table = Table("policy", "head", "family", "summary", box=None, pad_edge=False, header_style="bold")
    for policy in policies:
        table.add_row(policy.name, policy.head, policy.family, Text(str(policy.card.get("summary", ""))))
    console.print(table)
