"""The recording of one round: shard files, their commit records, the manifest that readers trust."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.records import ActivationShard, Moments, Site
from cria_dist.store import activations, moments

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recording:
    """Where the recording of one round lies and what it is a recording of.

    Attributes:
        folder: round folder; holds ``activations/``, ``moments/`` and ``manifest.json``.
        digest: digest of everything the content depends on (weights, tokens, record settings, seed).
    """

    folder: Path
    digest: str

    def signal_path(self, site: Site, shard: int) -> Path:
        """Parquet file of one (site, shard)."""
        return self.folder / "activations" / site.key / f"shard-{shard:05d}.parquet"

    def moments_path(self, site: Site, shard: int) -> Path:
        """Moments of one (site, shard)."""
        return self.folder / "moments" / site.key / f"shard-{shard:05d}.safetensors"

    def commit_path(self, shard: int) -> Path:
        """Commit record of one shard; exists only when all its files do."""
        return self.folder / "activations" / "commits" / f"shard-{shard:05d}.json"

    @property
    def manifest_path(self) -> Path:
        """The manifest, written last."""
        return self.folder / "manifest.json"

    def commit(self, shard: int, sites: Mapping[str, Any], dtype: str) -> None:
        """Declare a shard finished."""
        record = {"digest": self.digest, "shard": shard, "dtype": dtype, "sites": dict(sites)}
        files.write_json(self.commit_path(shard), record)

    def is_committed(self, shard: int) -> bool:
        """Whether the shard was finished by a run with the same digest and its files are still whole in size."""
        path = self.commit_path(shard)
        if not path.is_file():
            return False
        record = files.read_json(path)
        return record["digest"] == self.digest and all(
            _has_size(self.signal_path(Site.from_key(key), shard), facts["signals"]["bytes"])
            and _has_size(self.moments_path(Site.from_key(key), shard), facts["moments"]["bytes"])
            for key, facts in record["sites"].items()
        )

    def write_manifest(self, shards: int) -> None:
        """Merge the commit records of all shards, in order, into the manifest."""
        commits = [files.read_json(self.commit_path(shard)) for shard in range(shards)]
        record = {"schema": SCHEMA_VERSION, "digest": self.digest, "shards": commits}
        files.write_json(self.manifest_path, record)

    def is_complete(self) -> bool:
        """Whether a manifest of the same digest is there and every file it names has its size."""
        if not self.manifest_path.is_file():
            return False
        manifest = self.manifest()
        return manifest["digest"] == self.digest and all(
            self.is_committed(commit["shard"]) for commit in manifest["shards"]
        )

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            DataError: missing, damaged, or of another schema version.
        """
        manifest: Any = files.read_json(self.manifest_path)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA_VERSION:
            raise DataError(
                f"{self.manifest_path} has schema {schema}, this version reads {SCHEMA_VERSION}; "
                "record into another folder"
            )
        return manifest

    def signals(self, site: Site) -> dict[str, np.ndarray]:
        """All sampled tokens of a site, float32 [N, M] by signal name, in token order."""
        parts: dict[str, list[np.ndarray]] = {}
        for commit in self.manifest()["shards"]:
            facts = commit["sites"][site.key]["signals"]
            pointer = ActivationShard(
                site,
                commit["shard"],
                str(self.signal_path(site, commit["shard"])),
                facts["rows"],
                facts["width"],
                commit["dtype"],
            )
            for name, signal_TN in activations.read_shard(pointer, facts["sha256"]).items():
                parts.setdefault(name, []).append(signal_TN)
        return {name: np.ascontiguousarray(np.concatenate(blocks).T) for name, blocks in parts.items()}

    def moments(self, site: Site) -> Moments:
        """Moments of a site over all calibration tokens."""
        return moments.read_moments(
            [
                (self.moments_path(site, commit["shard"]), commit["sites"][site.key]["moments"]["sha256"])
                for commit in self.manifest()["shards"]
            ]
        )


def adopt(recording: Recording, root: Path) -> Path | None:
    """Take over a complete recording with the same digest from a neighbouring run (hard links, no bytes copied).

    A run that differs only in ratio, method or recovery has the same recording.

    Args:
        recording: the recording wanted.
        root: folder that holds the run folders.

    Returns:
        The folder it was taken from, or None if there is no such recording.
    """
    for manifest in sorted(root.glob("*/round-*/manifest.json")):
        other = Recording(manifest.parent, recording.digest)
        if manifest.parent == recording.folder or not _is_whole(other):
            continue
        for part in ("activations", "moments"):
            shutil.copytree(other.folder / part, recording.folder / part, copy_function=_link, dirs_exist_ok=True)
        _link(str(manifest), str(recording.manifest_path))
        return other.folder
    return None


def _is_whole(recording: Recording) -> bool:
    """A neighbour's damage is not ours to complain of."""
    try:
        return recording.is_complete()
    except DataError:
        return False


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    Path(target).hardlink_to(source)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
