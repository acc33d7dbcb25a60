"""Names of what a recording consists of: made of ids only, the same whoever writes it."""

import re
from dataclasses import dataclass

from cria_dist.records import Site

MANIFEST = "manifest.json"
FOLDERS = ("activations", "moments")
COMMIT = re.compile(r"commits/(layer-\d+\.[^/]+)/shard-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Slice:
    """Units ``start`` to ``stop - 1`` of a site: all of them, or those of one tensor-parallel rank."""

    start: int
    stop: int


def signals_name(site: Site, shard: int, units: Slice) -> str:
    """The signals of one (site, shard, slice)."""
    return f"activations/{site.key}/{_shard(shard)}.{_units(units)}.parquet"


def moments_name(site: Site, shard: int, units: Slice) -> str:
    """The moments of one (site, shard, slice)."""
    return f"moments/{site.key}/{_shard(shard)}.{_units(units)}.safetensors"


def commit_name(site: Site, shard: int) -> str:
    """The commit record of one (site, shard)."""
    return f"commits/{site.key}/{_shard(shard)}.json"


def commit_of(name: str) -> tuple[Site, int] | None:
    """Inverse of :func:`commit_name`; None for a name of another version."""
    match = COMMIT.fullmatch(name)
    return (Site.from_key(match[1]), int(match[2])) if match else None


def _shard(shard: int) -> str:
    return f"shard-{shard:05d}"


def _units(units: Slice) -> str:
    return f"units-{units.start:05d}-{units.stop:05d}"
