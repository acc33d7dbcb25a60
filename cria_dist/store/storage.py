"""Where a recording lies: a local or shared folder, or an object store. Whole objects or none, on both."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.files import Content


class Storage(Protocol):
    """Named objects; a reader sees all of an object or none of it."""

    def write(self, name: str, content: Content) -> None:
        """Store an object.

        Raises:
            DataError: it cannot be stored (no space, no permission, the store refuses).
        """
        ...

    def write_with(self, name: str, fill: Callable[[pa.NativeFile], object]) -> dict[str, object]:
        """Store what ``fill`` writes, nothing if it raises; returns bytes and sha256.

        Raises:
            DataError: as with ``write``.
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

    def write(self, name: str, content: Content) -> None:
        """See :meth:`Storage.write`."""
        self.write_with(name, lambda sink: sink.write(content))

    def write_with(self, name: str, fill: Callable[[pa.NativeFile], object]) -> dict[str, object]:
        """See :meth:`Storage.write_with`; temporary name, flush, rename."""

        def write(temporary: Path) -> None:
            with pa.OSFile(str(temporary), "wb") as sink:
                fill(sink)

        try:
            return files.write_hashed(self.folder / name, write)
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be written ({os.strerror(error.errno or 0)}); "  # Arrow adds to strerror
                "make room or change the permissions, then run the same command again"
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
        found: dict[str, int] = {}
        for path in (self.folder / prefix).rglob("[!.]*"):
            with suppress(FileNotFoundError):  # deleted by another process since it was listed
                if stat.S_ISREG((facts := path.stat()).st_mode):
                    found[path.relative_to(self.folder).as_posix()] = facts.st_size
        return found

    def delete(self, name: str) -> None:
        """See :meth:`Storage.delete`."""
        (self.folder / name).unlink(missing_ok=True)

    def where(self, name: str) -> str:
        """See :meth:`Storage.where`."""
        return str(self.folder / name)
