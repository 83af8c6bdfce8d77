"""``halo apply``: the plan and the bundle, in one go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from halo.bundle import Applied, write_bundle
from halo.errors import RecipeError
from halo.events import Listener
from halo.manifest import read_manifest
from halo.planning import Planner, thread_pool
from halo.settings import Settings
from halo.staging import refuse_unusable


def default_output(source: Path) -> Path:
    """``NAME-halo`` in the working directory."""
    return Path(f"{source.resolve().name.removesuffix('.gguf')}-halo")


def apply(settings: Settings, output: Path, force: bool, listen: Listener) -> Applied:
    """Make a bundle.

    Raises:
        HaloError: any bad input or failure; ``output`` is untouched then.
    """
    refuse_unusable(output, force)
    with thread_pool(settings.threads) as (pool, threads):
        plan = Planner(settings, pool, threads, listen).plan()
        return write_bundle(plan, output, force, pool, listen)


def repeat(recipe_file: Path, settings: Settings, output: Path, force: bool, listen: Listener) -> Applied:
    """Make the bundle of a manifest again: the same bytes from the same source on the same kind of machine.

    The recipe's calibration settings and context take the place of the settings'; a calibration text or imatrix that is
    not packaged must be given again.
    """
    recipe = read_manifest(recipe_file)
    record = recipe.calibration
    if record.text.startswith("imatrix ") and settings.imatrix is None:
        raise RecipeError(f"{recipe_file}: was made with {record.text}; give that file with --imatrix")
    if settings.imatrix is None and record.text not in ("packaged", "none") and settings.calibration_file is None:
        settings = replace(settings, calibration_file=Path(record.text))
    settings = replace(
        settings, calibration_tokens=record.tokens, context=int(recipe.budget["context"]), save_imatrix=None
    )
    refuse_unusable(output, force)
    with thread_pool(settings.threads) as (pool, threads):
        plan = Planner(settings, pool, threads, listen).repeat(recipe)
        return write_bundle(plan, output, force, pool, listen)
