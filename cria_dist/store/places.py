"""Where the recording of a round lies: in its folder, or in an object store that the folder points to.

A run that differs from a neighbour only in ratio, method or recovery takes over the neighbour's.
"""

import secrets
from dataclasses import replace
from pathlib import Path

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.store.names import FOLDERS, MANIFEST
from cria_dist.store.objects import ObjectStorage
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

POINTER = "recording.json"
"""Names the object store, and the run among those that share the recording."""
RECORDINGS = f"*/round-*/{MANIFEST}"
"""Below the folder that holds the run folders."""


def open_recording(folder: Path, url: str | None, digest: str) -> Recording:
    """The recording of a round, to be written or read.

    Args:
        folder: folder of the round; the recording lies there unless there is a URL.
        url: object store of the recordings, where they are named by their digest and shared by all runs.
        digest: digest of the recording.

    Raises:
        DataError: what an earlier attempt left in the folder is damaged.
    """
    pointer = folder / POINTER
    if url is None:
        pointer.unlink(missing_ok=True)
        return Recording(LocalStorage(folder), digest)
    storage = ObjectStorage(url, f"recording-{digest[:16]}")
    # drawn and kept, for folders on two machines may have the same path
    owner = _pointed(pointer).get("owner") or secrets.token_hex(8)
    files.write_json(pointer, {"url": storage.url, "folder": storage.folder, "owner": owner})
    return Recording(storage, digest, owner)


def recorded(folder: Path) -> Recording:
    """The complete recording of a round, wherever it lies.

    Raises:
        DataError: there is none in this folder, or its manifest is damaged.
    """
    there = _pointed(folder / POINTER)
    storage = ObjectStorage(there["url"], there["folder"]) if there else LocalStorage(folder)
    found = Recording(storage, "", there.get("owner", ""))
    return replace(found, digest=found.manifest()["digest"])


def _pointed(pointer: Path) -> dict[str, str]:
    """What the pointer of a round says; nothing if there is none."""
    return files.read_json(pointer) if pointer.is_file() else {}


def check(url: str | None) -> None:
    """Try an object store before anything is computed for it.

    Raises:
        ConfigError: it is not usable, with the reason.
    """
    if url is not None:
        ObjectStorage(url).probe()


def adopt(recording: Recording, root: Path) -> Path | None:
    """Take over a complete recording with the same digest from a neighbouring run, by hard links where they can be.

    A run that differs only in ratio, method or recovery has the same recording. One that has begun is resumed instead:
    it may share a damaged file with the neighbour. In an object store recordings are named by their digest, so runs
    share them without this.

    Args:
        recording: the recording wanted.
        root: folder that holds the run folders.

    Returns:
        The folder it was taken from, or None if there is no such recording.
    """
    if not isinstance(recording.storage, LocalStorage) or recording.committed():
        return None
    folder = recording.storage.folder

    def take(manifest: Path) -> bool:
        other = LocalStorage(manifest.parent)
        if other.folder == folder or not _is_complete(Recording(other, recording.digest)):
            return False
        names = [name for part in (*FOLDERS, "commits") for name in sorted(other.sizes(part))]
        for name in (*names, MANIFEST):
            files.link(other.folder / name, folder / name)
        if not _is_complete(recording):  # the neighbour was being deleted; what came over is gone on with
            (folder / MANIFEST).unlink()
            return False
        return True

    found = files.take_over(root, RECORDINGS, take)
    return None if found is None else found.parent


def is_recorded(root: Path, digest: str) -> bool:
    """Whether a run below ``root`` has a complete recording of this digest in its folder."""

    def look(manifest: Path) -> bool:
        return _is_complete(Recording(LocalStorage(manifest.parent), digest))

    return files.take_over(root, RECORDINGS, look) is not None


def _is_complete(recording: Recording) -> bool:
    """A neighbour's damage is not ours to complain of."""
    try:
        return recording.is_complete()
    except DataError:
        return False
