"""Which exponent each folding site takes: the one with the least damage at the types the allocation chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from halo.checkpoint.base import Checkpoint
from halo.damage import importance_of, relative_error
from halo.events import Listener, Progress
from halo.folding import Folding, Site, channel_magnitude, fold
from halo.gguf_types import GGUFType
from halo.sampling import sample_rows
from halo.statistics import Statistics
from halo.threads import ordered_map

EXPONENTS = (0.125, 0.25, 0.375, 0.5, 0.625)
# The damage is measured on sampled rows, good to a few per cent: a smaller gain is as likely none.
_LEAST_GAIN = 0.02


def search(
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    statistics: Statistics,
    chosen: Mapping[str, GGUFType],
    worth: Mapping[str, float],
    pool: ThreadPoolExecutor,
    threads: int,
    listen: Listener,
) -> dict[str, float]:
    """Exponent by site key, for the sites where folding lowers the damage of the readers.

    Args:
        chosen: types before folding; readers kept as floats do not count.
        worth: weight of each tensor's damage.
    """

    def one(site: Site) -> float:
        magnitude = channel_magnitude(site, statistics)
        readers = [n for n in site.readers if n in chosen and chosen[n].family != "float"]
        if magnitude is None or not readers:
            return 0.0
        samples = {n: sample_rows(checkpoint.tensors[n])[1] for n in readers}

        def cost(folding: Folding) -> float:
            total = 0.0
            for name, rows in samples.items():
                importance = folding.importance(name, importance_of(name, statistics))
                scaled = folding.apply(name, rows, slice(None)) if name in folding.columns else rows
                total += worth[name] * relative_error(scaled, chosen[name], importance)
            return total

        unfolded = cost(Folding())
        best, exponent = min((cost(Folding(columns=fold(site, magnitude, e).columns)), e) for e in EXPONENTS)
        return exponent if best < unfolded * (1 - _LEAST_GAIN) else 0.0

    out: dict[str, float] = {}
    for done, (site, exponent) in enumerate(zip(sites, ordered_map(pool, one, sites, ahead=2 * threads), strict=True)):
        listen(Progress("fold", done + 1, len(sites), "sites", site.key))
        if exponent:
            out[site.key] = exponent
    return out


def build(sites: Sequence[Site], statistics: Statistics, exponents: Mapping[str, float]) -> Folding:
    """The folding of recorded exponents."""
    folding = Folding()
    for site in sites:
        magnitude = channel_magnitude(site, statistics)
        if magnitude is not None and exponents.get(site.key):
            folding.add(fold(site, magnitude, exponents[site.key]))
    return folding
