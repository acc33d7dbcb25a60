"""Where the recording of a round lies: in its folder, or in an object store that the folder points to.

A run that differs from a neighbour only in ratio, method or recovery takes over the neighbour's.
"""

from pathlib import Path

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.store.names import FOLDERS, MANIFEST
from cria_dist.store.objects import ObjectStorage
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

POINTER = "recording.json"
RECORDINGS = f"*/round-*/{MANIFEST}"
"""Below the folder that holds the run folders."""


def open_recording(folder: Path, url: str | None, digest: str) -> Recording:
    """The recording of a round, to be written or read.

    Args:
        folder: folder of the round; the recording lies there unless there is a URL.
        url: object store of the recordings, where they are named by their digest and shared by all runs.
        digest: digest of the recording.
    """
    pointer = folder / POINTER
    if url is None:
        pointer.unlink(missing_ok=True)
        return Recording(LocalStorage(folder), digest)
    storage = ObjectStorage(url, f"recording-{digest[:16]}")
    files.write_json(pointer, {"url": storage.url, "folder": storage.folder})
    return Recording(storage, digest)


def recorded(folder: Path) -> Recording:
    """The complete recording of a round, wherever it lies.

    Raises:
        DataError: there is none in this folder, or its manifest is damaged.
    """
    pointer = folder / POINTER
    storage = ObjectStorage(**files.read_json(pointer)) if pointer.is_file() else LocalStorage(folder)
    return Recording(storage, Recording(storage, "").manifest()["digest"])


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
