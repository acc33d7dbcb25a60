"""Where a recording lies: a local or shared folder, or an object store. Whole objects or none, on both."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.fs as pafs

from cria_dist import files
from cria_dist.errors import ConfigError, DataError


class Storage(Protocol):
    """Named objects; a reader sees all of an object or none of it."""

    def write(self, name: str, content: bytes) -> None:
        """Store an object.

        Raises:
            DataError: it cannot be stored (no space, no permission, the store refuses).
        """
        ...

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            DataError: it is missing or cannot be read.
        """
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below a prefix, by name; one listing, whatever their number."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        ...

    def where(self, name: str) -> str:
        """Path or URL of an object, for messages."""
        ...


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """Objects as files below a folder."""

    folder: Path

    def write(self, name: str, content: bytes) -> None:
        """See :meth:`Storage.write`; temporary name, flush, rename."""
        try:
            files.write_bytes(self.folder / name, content)
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be written ({error.strerror}); make room or change the permissions, "
                "then run the same command again"
            ) from error

    def read(self, name: str) -> bytes:
        """See :meth:`Storage.read`."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be read ({error.strerror}); run the same command again to record it"
            ) from error

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :meth:`Storage.sizes`."""
        paths = (self.folder / prefix).rglob("[!.]*")
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in paths if path.is_file()}

    def delete(self, name: str) -> None:
        """See :meth:`Storage.delete`."""
        (self.folder / name).unlink(missing_ok=True)

    def where(self, name: str) -> str:
        """See :meth:`Storage.where`."""
        return str(self.folder / name)


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """Objects below a URL that ``pyarrow.fs`` understands (``s3://bucket/prefix``, ``gs://...``).

    Credentials come from the environment of the process, never from the configuration.
    """

    url: str

    def write(self, name: str, content: bytes) -> None:
        """See :meth:`Storage.write`: one upload of finished bytes.

        The stream is closed only after everything was handed over: closing it after an error would publish a part.
        """
        system, path = self._open(name)
        try:
            stream = system.open_output_stream(path)
            stream.write(content)
            stream.close()
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be written ({_first_line(error)}); check the bucket and the credentials, "
                "then run the same command again"
            ) from error

    def read(self, name: str) -> bytes:
        """See :meth:`Storage.read`."""
        system, path = self._open(name)
        try:
            with system.open_input_stream(path) as stream:
                return stream.read()
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be read ({_first_line(error)}); run the same command again to record it"
            ) from error

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :meth:`Storage.sizes`."""
        system, path = self._open(prefix)
        root = len(path) - len(prefix)
        try:
            entries = system.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        except OSError as error:
            raise DataError(f"{self.where(prefix)} cannot be listed ({_first_line(error)})") from error
        return {entry.path[root:]: entry.size for entry in entries if entry.type == pafs.FileType.File}

    def delete(self, name: str) -> None:
        """See :meth:`Storage.delete`."""
        system, path = self._open(name)
        if system.get_file_info(path).type == pafs.FileType.File:
            system.delete_file(path)

    def where(self, name: str) -> str:
        """See :meth:`Storage.where`; without the query of the URL."""
        return f"{self.url.partition('?')[0].rstrip('/')}/{name}"

    def _open(self, name: str) -> tuple[pafs.FileSystem, str]:
        system, prefix = _filesystem(self.url, os.getpid())
        return system, f"{prefix}/{name}"


@functools.cache
def _filesystem(url: str, _process: int) -> tuple[pafs.FileSystem, str]:
    """File system and prefix of a URL; one per process, for its threads do not survive a fork."""
    try:
        system, prefix = pafs.FileSystem.from_uri(url)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"record.storage={url!r} is not a usable location ({_first_line(error)}); give a folder or s3://bucket/prefix"
        ) from error
    return system, prefix.rstrip("/")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
