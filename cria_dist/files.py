"""Whole files or none: temporary name, flush to disk, rename. Plus digests and names that are safe as paths."""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from cria_dist.errors import ConfigError, DataError

Content = bytes | memoryview
"""Finished bytes on their way to storage."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def write_bytes(path: Path, content: Content) -> None:
    """Write a file so that a reader sees all of it or none, also after a crash."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then flush and rename it; its mode is any new file's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.{secrets.token_hex(4)}")  # processes of two hosts share numbers
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:  # safetensors puts one in its place that only its owner reads
            temporary.chmod(stat.S_IMODE(mode))
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_hashed(path: Path, write: Callable[[Path], object]) -> dict[str, object]:
    """Like :func:`write_with`; returns bytes and sha256 of the file, hashed while the disk is waited for."""
    with ThreadPoolExecutor(max_workers=1) as hasher:
        found: list[Future[dict[str, object]]] = []

        def write_then_hash(temporary: Path) -> None:
            write(temporary)
            found.append(hasher.submit(_file_facts, temporary.open("rb")))

        write_with(path, write_then_hash)
        return found[0].result()


def _file_facts(handle: BufferedReader) -> dict[str, object]:
    with handle:
        return {"sha256": hashlib.file_digest(handle, "sha256").hexdigest(), "bytes": handle.tell()}


def sync(path: Path) -> None:
    """Wait until a file is on its disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def to_json(record: object) -> bytes:
    """Plain data as indented JSON with sorted keys."""
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def from_json(content: bytes, name: str) -> Any:
    """Inverse of :func:`to_json`.

    Raises:
        DataError: the content is damaged; ``name`` says whose.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{name} is damaged ({error}); delete it and run the same command again") from error


def facts(content: Content) -> dict[str, object]:
    """What a commit record says of a file: bytes and sha256."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_json(path: Path, record: object) -> None:
    """Write plain data as indented JSON with sorted keys."""
    write_bytes(path, to_json(record))


def read_json(path: Path) -> Any:
    """Read JSON written by this package.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the stage that writes it again") from error
    return from_json(content, str(path))


def digest(*parts: object) -> str:
    """SHA-256 over the canonical JSON of plain data (bytes are hashed as they are)."""
    state = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        state.update(len(content).to_bytes(8, "little"))
        state.update(content)
    return state.hexdigest()


def take_over(root: Path, pattern: str, take: Callable[[Path], bool]) -> Path | None:
    """The first path below ``root`` that ``take`` says it took something over from, by name; None if there is none.

    Runs may be deleted while others look into them, and be other users': what vanishes, or may not be read, was never
    there.

    Args:
        root: folder of runs.
        pattern: of paths below it, as in ``glob``.
        take: called with each path until one was taken; it may raise FileNotFoundError and PermissionError.
    """
    for path in sorted(root / name for name in glob.glob(pattern, root_dir=root, include_hidden=True)):
        with suppress(FileNotFoundError, PermissionError):
            if take(path):
                return path
    return None


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where it cannot have one: other users' files, file systems without links.

    Raises:
        OSError: it can be neither linked nor read, or there is no room.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        write_with(target, lambda temporary: shutil.copyfile(source, temporary))


def take_copy(root: Path, pattern: str, target: Path) -> bool:
    """Whether there is a file of this pattern below ``root``, which then is copied."""

    def copy(source: Path) -> bool:
        write_bytes(target, source.read_bytes())
        return True

    return take_over(root, pattern, copy) is not None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def safe_name(name: str) -> str:
    """Return ``name`` if it may become a file name.

    Raises:
        ConfigError: it has a separator, ``..``, NUL or another character outside ``[A-Za-z0-9._-]``.
    """
    if not SAFE_NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f"name {name!r} cannot become a file name; use letters, digits, '.', '_' and '-'")
    return name


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder; what vanishes meanwhile was never there."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found = path.stat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def free_bytes(path: Path) -> int:
    """Free space on the volume that holds ``path`` (which need not exist yet)."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
