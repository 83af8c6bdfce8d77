"""What the pipeline reports while it works. The command line and the TUI draw these; the core never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A step of a stage.

    Attributes:
        stage: ``read``, ``calibrate``, ``damage``, ``fold``, ``quantise``, ``verify`` or ``bundle``.
        done, total: in ``unit``.
        item: the tensor or file at hand.
    """

    stage: str
    done: float
    total: float
    unit: str
    item: str = ""


@dataclass(frozen=True)
class Notice:
    """A sentence the user should read: a substitution, a quantised source, a worker that died and was restarted."""

    text: str


Event = Progress | Notice
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener for callers that want no progress."""
