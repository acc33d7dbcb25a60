"""Where the recording of a round lies: in its folder, or in an object store that the folder points to."""

from pathlib import Path

from cria_dist import files
from cria_dist.store.objects import ObjectStorage
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

POINTER = "recording.json"


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
