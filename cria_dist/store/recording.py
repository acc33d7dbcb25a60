"""The recording of one round: shard files, their commit records, the manifest that readers trust.

Every (site, shard) is committed on its own, so that a run may go on with another schedule than it began with.
Shapes: N units, M sampled tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.records import Moments, Site
from cria_dist.store import activations, moments
from cria_dist.store.names import FOLDERS, MANIFEST, Slice, commit_name, commit_of, moments_name, signals_name
from cria_dist.store.storage import Storage

SCHEMA_VERSION = 3


@dataclass(frozen=True, slots=True)
class Recording:
    """Where the recording of one round lies and what it is a recording of.

    Attributes:
        storage: holds ``activations/``, ``moments/``, ``commits/`` and ``manifest.json``.
        digest: digest of everything the content depends on (weights, tokens, record settings, seed).
        owner: the run that opened it, where runs share it: what they pass between workers they keep apart.
    """

    storage: Storage
    digest: str
    owner: str = ""

    def write_signals(self, site: Site, shard: int, units: Slice, table: activations.SignalTable) -> dict[str, object]:
        """Store the signals of one (site, shard); returns rows, bytes and sha256 for the commit record."""
        facts = self.storage.write_with(
            signals_name(site, shard, units), lambda sink: activations.encode(table, site.key, sink)
        )
        return {"rows": table.rows, **facts}

    def write_moments(
        self, site: Site, shard: int, units: Slice, sums: tuple[int, np.ndarray, np.ndarray]
    ) -> dict[str, object]:
        """Store count, total [units] and Gram rows [units, N] of one (site, shard); returns bytes and sha256."""
        return self.storage.write_with(
            moments_name(site, shard, units), lambda sink: sink.write(moments.encode(*sums, units.start))
        )

    def commit(self, site: Site, shard: int, width: int, dtype: str, parts: Sequence[Mapping[str, Any]]) -> None:
        """Declare a (site, shard) finished; ``parts`` cover the units in order, one per slice."""
        record = {
            "schema": SCHEMA_VERSION,
            "digest": self.digest,
            "width": width,
            "dtype": dtype,
            "parts": list(parts),
        }
        self.storage.write(commit_name(site, shard), files.to_json(record))

    def committed(self) -> set[tuple[Site, int]]:
        """Every (site, shard) finished by a run with the same digest whose files still have their sizes.

        Raises:
            DataError: a commit record is damaged.
        """
        sizes = self._sizes()
        found: set[tuple[Site, int]] = set()
        for name in self.storage.sizes("commits"):
            record, whose = self._read(name), commit_of(name)
            of_ours = (record.get("schema"), record.get("digest")) == (SCHEMA_VERSION, self.digest)
            if whose and of_ours and _is_whole(*whose, record, sizes):
                found.add(whose)
        return found

    def write_manifest(self, sites: Iterable[Site], shards: int) -> None:
        """Merge the commit records, in order, into the manifest."""
        commits = {
            site.key: [self._read(commit_name(site, shard)) for shard in range(shards)] for site in sorted(sites)
        }
        record = {"schema": SCHEMA_VERSION, "digest": self.digest, "sites": commits}
        self.storage.write(MANIFEST, files.to_json(record))

    def is_complete(self) -> bool:
        """Whether a manifest of the same digest is there and every file it names has its size."""
        if MANIFEST not in self.storage.sizes(""):
            return False
        manifest, sizes = self.manifest(), self._sizes()
        return manifest["digest"] == self.digest and all(
            _is_whole(Site.from_key(key), shard, commit, sizes)
            for key, commits in manifest["sites"].items()
            for shard, commit in enumerate(commits)
        )

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            DataError: missing, damaged, or of another schema version.
        """
        manifest = self._read(MANIFEST)
        if manifest.get("schema") != SCHEMA_VERSION:
            raise DataError(
                f"{self.storage.where(MANIFEST)} has schema {manifest.get('schema')}, this version reads "
                f"{SCHEMA_VERSION}; record into another folder"
            )
        return manifest

    def shards(self, site: Site, only: Collection[str] = ()) -> Iterator[tuple[Slice, activations.StoredSignals]]:
        """The files of a site in the order of its tokens, one at a time: units of the slice and what is stored.

        Args:
            site: the site.
            only: read these signals; by default all.

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        for shard, commit in enumerate(self._commits(site)):
            for part in commit["parts"]:
                units = Slice(part["start"], part["stop"])
                yield units, self._signals_of(site, shard, part, only)

    def hidden(self, site: Site, shard: int) -> activations.StoredSignals:
        """The hidden states around a layer in one shard; ``site`` is the layer's ``block``, which is never sliced.

        Raises:
            DataError: the file is missing or damaged; the message names it.
        """
        [part] = self._commits(site)[shard]["parts"]
        return self._signals_of(site, shard, part)

    def _signals_of(
        self, site: Site, shard: int, part: Mapping[str, Any], only: Collection[str] = ()
    ) -> activations.StoredSignals:
        name = signals_name(site, shard, Slice(part["start"], part["stop"]))
        content, sha256 = self.storage.read(name), part["signals"]["sha256"]
        return activations.decode(content, self.storage.where(name), sha256, only)

    def signals(self, site: Site) -> dict[str, np.ndarray]:
        """All sampled tokens of a site, float32 [N, M] by signal name, in token order.

        Takes the memory of the result and of one file.
        """
        width, tokens, dtype = self.shape(site)
        whole: dict[str, np.ndarray] = {}
        first = 0
        for units, stored in self.shards(site):
            for signal, tiles in stored.tiles.items():
                target_NM = whole.setdefault(signal, np.empty((width, tokens), dtype=np.float32))
                for start, words_TN in tiles:
                    at, rows = units.start + start, len(words_TN)
                    target_TN = target_NM[at : at + words_TN.shape[1], first : first + rows].T
                    activations.to_float32(words_TN, dtype, target_TN)
            first += stored.rows if units.stop == width else 0
        return whole

    def shape(self, site: Site) -> tuple[int, int, str]:
        """Units, sampled tokens and data type of a site's signals."""
        commits = self._commits(site)
        tokens = sum(commit["parts"][0]["signals"]["rows"] for commit in commits)
        return commits[0]["width"], tokens, commits[0]["dtype"]

    def moments(self, site: Site, shards: int | None = None) -> Moments:
        """Moments of a site over all calibration tokens, or the first shards': float64 sums over shards in order."""
        commits = self._commits(site)[:shards]
        width = commits[0]["width"]
        total_N, gram_NN, count = np.zeros(width), np.zeros((width, width)), 0
        for shard, commit in enumerate(commits):
            for part in commit["parts"]:
                units = Slice(part["start"], part["stop"])
                name = moments_name(site, shard, units)
                sums = moments.decode(self.storage.read(name), self.storage.where(name), part["moments"]["sha256"])
                total_N[units.start : units.stop] += sums.total_U
                sums.add_to(gram_NN)
                count += sums.count if units.stop == width else 0
        moments.mirror(gram_NN)
        return Moments(count, total_N, gram_NN)

    def _commits(self, site: Site) -> list[dict[str, Any]]:
        return self.manifest()["sites"][site.key]

    def _sizes(self) -> dict[str, int]:
        return {name: size for folder in FOLDERS for name, size in self.storage.sizes(folder).items()}

    def _read(self, name: str) -> dict[str, Any]:
        record = files.from_json(self.storage.read(name), self.storage.where(name))
        if not isinstance(record, dict):
            raise DataError(
                f"{self.storage.where(name)} is not a record of ours; delete it and run the same command again"
            )
        return record


def _is_whole(site: Site, shard: int, record: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    for part in record["parts"]:
        units = Slice(part["start"], part["stop"])
        names = {"signals": signals_name(site, shard, units), "moments": moments_name(site, shard, units)}
        if any(kind in part and sizes.get(name) != part[kind]["bytes"] for kind, name in names.items()):
            return False
    return True
