"""The steps of a sequential repair: which there are, what each waits for, where what passes between them lies."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cria_dist.models import depth
from cria_dist.records import Site
from cria_dist.stages import boundary
from cria_dist.stages.record import RecordTask
from cria_dist.stages.repair import is_repaired
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage


@dataclass(frozen=True, slots=True)
class SequentialTask:
    """What every worker is told.

    Attributes:
        record: the model, the calibration examples and how they go through it.
        kept: survivors per site key, in the model's numbering.
        widths: units of every site, by its key.
        ridge: relative ridge of the least squares.
        folder: where ``<site>.safetensors`` goes.
        digest: digest of the plan, the recording and the repair settings.
    """

    record: RecordTask
    kept: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    ridge: float
    folder: Path
    digest: str

    @property
    def sites(self) -> list[Site]:
        """Those with units that stay, in the order in which a token meets them."""
        return sorted(Site.from_key(key) for key, units in depth.within_layers(self.kept).items() if units)

    @property
    def streams(self) -> tuple[Recording, Recording]:
        """Where hidden states between two layers lie: of the model as it is, and as it will be."""
        folder = self.folder / "streams"
        whole, left = LocalStorage(folder / "whole"), LocalStorage(folder / "left")
        return Recording(whole, self.digest), Recording(left, self.digest)

    @property
    def sums(self) -> LocalStorage:
        """Where sums of products of one (site, shard) lie."""
        return LocalStorage(self.folder / "sums" / self.digest[:16])

    def is_changed(self, site: Site) -> bool:
        """Whether units leave the site; the others keep their weights."""
        return len(self.kept[site.key]) < self.widths[site.key]

    def forget(self, site: Site) -> None:
        """Remove the sums of a site that is solved."""
        for name in self.sums.sizes(site.key):
            self.sums.delete(name)

    def clear_others(self) -> None:
        """Remove what a repair of another plan needed on its way and left when it was interrupted."""
        passing = (self.folder / "streams" / name / boundary.FOLDER for name in ("whole", "left"))
        for folder in (self.folder / "sums", *passing):
            for one in folder.glob("*"):
                if one.name != self.digest[:16]:
                    shutil.rmtree(one, ignore_errors=True)

    def clear(self) -> None:
        """Remove what was needed on the way."""
        for name in ("streams", "sums"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Observe:
    """Sums of products at a site, over one shard."""

    site: Site
    shard: int

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"repair of {self.site.key}, shard {self.shard}"

    @property
    def name(self) -> str:
        """Name of the sums."""
        return f"{self.site.key}/shard-{self.shard:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Solve:
    """The output weights of a site, from the sums of all shards."""

    site: Site

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"repair of {self.site.key}"


@dataclass(frozen=True, slots=True)
class Advance:
    """Take a shard past a layer whose sites are solved."""

    layer: int
    shard: int

    def __str__(self) -> str:
        """As in messages and logs."""
        return f"repaired layer {self.layer}, shard {self.shard}"


Step = Observe | Solve | Advance


def steps(task: SequentialTask, shards: int) -> dict[Step, tuple[Step, ...]]:
    """The work items that are left, in an order in which they can be done, and what each of them waits for."""
    left = [site for site in task.sites if not is_repaired(task.folder, site, task.digest)]
    if not left:
        return {}
    found: dict[Step, tuple[Step, ...]] = {}
    before: dict[int, tuple[Step, ...]] = dict.fromkeys(range(shards), ())

    def advance(layer: int, shard: int) -> None:
        step = Advance(layer, shard)
        found[step], before[shard] = before[shard], (step,)

    first, last = left[0].layer, left[-1].layer
    for shard, reached in enumerate(_reached(task, first, shards)):
        for layer in range(reached, first):
            advance(layer, shard)
    observed = task.sums.sizes("")
    for layer in range(first, last + 1):
        for site in (one for one in left if one.layer == layer):
            looks = [Observe(site, shard) for shard in range(shards) if task.is_changed(site)]
            looks = [look for look in looks if look.name not in observed]
            found |= {look: before[look.shard] for look in looks}
            seen = {look.shard for look in looks}
            # of shards that nobody looks at as well: what comes next waits for this step alone
            rest = dict.fromkeys(step for shard, waits in before.items() if shard not in seen for step in waits)
            found[Solve(site)] = (*looks, *rest)
            before = dict.fromkeys(before, (Solve(site),))
        for shard in range(shards if layer < last else 0):
            advance(layer, shard)
    return found


def _reached(task: SequentialTask, layer: int, shards: int) -> list[int]:
    """For every shard the last layer up to this one that both of its hidden states are stored before."""
    whole, left = (boundary.stored(stream) for stream in task.streams)
    there = whole & left
    return [max((at for at, one in there if one == shard and at <= layer), default=0) for shard in range(shards)]


def solver_bytes(signals: int, outputs: int) -> int:
    """Peak of solving a site, doubles: both parts of the sums, their total, what is factored, and what comes of it."""
    return 8 * (6 * signals**2 + 7 * signals * outputs)
