"""The ``halo`` command: reads options, calls one function of the library, draws what it returns.

Nothing heavy is imported before a command runs: ``halo --help`` must stay under 0.3 s.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halo import __version__
from halo.errors import HaloError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# rich's help would triple the time of --help.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixed-precision GGUF for your device: a checkpoint in, a verified bundle out.",
)

Source = Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face folder or GGUF file.", show_default=False)]
PolicyName = Annotated[str, typer.Option("--policy", metavar="NAME|FILE", help="Shipped policy or a policy file.")]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Budget: bits per weight of the whole file.")]
Size = Annotated[str | None, typer.Option("--size", help="Budget: size of the whole file, such as 90MB or 3.5GiB.")]
DeviceFile = Annotated[
    str | None, typer.Option("--device", metavar="FILE", help="Device profile (TOML); default: this machine.")
]
TypeSet = Annotated[
    str | None, typer.Option("--type-set", help="cpu, cuda, metal, k, legacy, all, or types separated by commas.")
]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", metavar="REGEX=TYPE", help="Fix the type of matching tensors; repeatable.")
]
Fold = Annotated[bool, typer.Option("--fold/--no-fold", help="Search scale folding.")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="Calibration text; default: the packaged text.")
]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", min=2, help="Tokens to calibrate on.")]
ImatrixFile = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Use this imatrix (GGUF) instead of calibrating.")
]
SaveImatrix = Annotated[
    Path | None, typer.Option("--save-imatrix", metavar="FILE", help="Write the calibration's imatrix.")
]
Context = Annotated[int | None, typer.Option("--ctx", min=1, help="Context the expected memory is told for.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads; default: all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]

DEFAULT_TOKENS = 16384  # settings.DEFAULT_CALIBRATION_TOKENS; a test keeps them equal


def _settings(
    source: Path, policy: str, bpw: float | None, size: str | None, pins: list[str] | None, **rest: Any
) -> Any:
    from halo.budget import parse_size
    from halo.errors import BudgetError
    from halo.settings import Settings

    if bpw is not None and size is not None:
        raise BudgetError("--bpw and --size are two budgets; give one")
    return Settings(source, policy, bpw, parse_size(size) if size is not None else None, pins=tuple(pins or ()), **rest)


@app.command()
def apply(
    source: Source,
    policy: PolicyName = "llama-arch",
    bpw: Bpw = None,
    size: Size = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Bundle folder; default: NAME-halo here.")
    ] = None,
    device: DeviceFile = None,
    type_set: TypeSet = None,
    pin: Pins = None,
    fold: Fold = True,
    calibration: CalibrationFile = None,
    calibration_tokens: CalibrationTokens = DEFAULT_TOKENS,
    imatrix: ImatrixFile = None,
    save_imatrix: SaveImatrix = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Repeat the bundle of a halo.json.")
    ] = None,
    ctx: Context = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a ready GGUF bundle of a checkpoint."""
    from halo import pipeline, terminal

    settings = _settings(
        source, policy, bpw, size, pin, device=device, type_set=type_set, fold=fold, calibration_file=calibration,
        calibration_tokens=calibration_tokens, imatrix=imatrix, save_imatrix=save_imatrix, context=ctx, threads=threads,
    )  # fmt: skip
    target = output or pipeline.default_output(source)
    with terminal.display(quiet or json) as listen:
        if recipe is not None:
            done = pipeline.repeat(recipe, settings, target, force, listen)
        else:
            done = pipeline.apply(settings, target, force, listen)
    if json:
        terminal.print_json(terminal.applied_record(done))
    elif not quiet:
        terminal.show_applied(done)


@app.command()
def plan(
    source: Source,
    policy: PolicyName = "llama-arch",
    bpw: Bpw = None,
    size: Size = None,
    device: DeviceFile = None,
    type_set: TypeSet = None,
    pin: Pins = None,
    fold: Fold = True,
    calibration: CalibrationFile = None,
    calibration_tokens: CalibrationTokens = DEFAULT_TOKENS,
    imatrix: ImatrixFile = None,
    save_imatrix: SaveImatrix = None,
    ctx: Context = None,
    threads: Threads = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what apply would do; write nothing."""
    from halo import terminal
    from halo.planning import make_plan

    settings = _settings(
        source, policy, bpw, size, pin, device=device, type_set=type_set, fold=fold, calibration_file=calibration,
        calibration_tokens=calibration_tokens, imatrix=imatrix, save_imatrix=save_imatrix, context=ctx, threads=threads,
    )  # fmt: skip
    with terminal.display(quiet or json) as listen:
        made = make_plan(settings, listen)
    if json:
        terminal.print_json(terminal.plan_record(made))
    elif not quiet:
        terminal.show_plan(made, tensors)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE|GGUF", help="A bundle's folder or any GGUF file.", show_default=False)
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
) -> None:
    """Types, bytes and damage of a GGUF or bundle, and a heat map of blocks and roles."""
    from halo import terminal
    from halo.inspection import inspect_file

    found = inspect_file(path)
    if json:
        terminal.print_json(found.to_record())
    else:
        terminal.show_inspection(found, tensors)


@app.command()
def policies(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE]", help="Show one card in full.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Shipped policies and their cards."""
    from halo import terminal
    from halo.policy_file import load, shipped

    found = [load(name)] if name else [load(str(path)) for path in shipped()]
    if json:
        terminal.print_json([terminal.policy_record(p) for p in found])
    else:
        terminal.show_policies(found, in_full=name is not None)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"halo {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say_interrupted() -> None:
    print("halo: interrupted; nothing was written", file=sys.stderr)


def main() -> None:
    """Entry point: bad input ends in one line on stderr and exit code 2; Ctrl-C in 130."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except HaloError as error:
        print(f"halo: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as end:
        # typer ends a KeyboardInterrupt itself with this code, and without a word.
        if end.code == EXIT_INTERRUPTED:
            _say_interrupted()
        raise
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
