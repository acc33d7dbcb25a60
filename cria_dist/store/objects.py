"""Recordings in an object store that speaks S3: AWS, or any server named by ``?endpoint_override=HOST:PORT``.

Arrow publishes what a stream holds when the stream goes away, also after an error (arrow #40502): so bytes are finished
before a stream is opened, handed over in one call, and an object whose upload was interrupted is removed.
"""

import contextlib
import functools
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from cria_dist import files
from cria_dist.errors import ConfigError, DataError
from cria_dist.files import Content

ATTEMPTS = 4
"""Tries of one request: errors 5xx, throttling and lost connections back off up to 1, 2 and 4 s in between."""
SECONDS = 30.0
"""Without an answer a request counts as lost."""
SETTINGS = ("endpoint_override", "region", "scheme")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """Objects below ``s3://bucket/prefix[?endpoint_override=HOST:PORT&scheme=http&region=NAME]``.

    Credentials come from the environment of the process (or its AWS profile), never from the URL.

    Attributes:
        url: the location as configured.
        folder: folder below it.
    """

    url: str
    folder: str = ""

    def write_with(self, name: str, fill: Callable[[pa.NativeFile], object]) -> dict[str, object]:
        """See :meth:`Storage.write_with`."""
        finished = pa.BufferOutputStream()
        fill(finished)
        content = memoryview(finished.getvalue())
        self.write(name, content)
        return files.facts(content)

    def write(self, name: str, content: Content) -> None:
        """See :meth:`Storage.write`: one upload of finished bytes."""
        system, path = self._open(name)
        stream = None
        try:
            stream = system.open_output_stream(path)
            stream.write(content)
            stream.close()
        except OSError as error:  # a failed request leaves the upload unfinished: nothing becomes visible
            raise DataError(
                f"{self.where(name)} cannot be written ({_first_line(error)}); check the bucket and the credentials, "
                "then run the same command again"
            ) from error
        except BaseException:
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()  # or it would be published later, when the stream is collected
                self.delete(name)
            raise

    def read(self, name: str) -> bytes:
        """See :meth:`Storage.read`."""
        system, path = self._open(name)
        try:
            with system.open_input_file(path) as handle:
                return handle.read()
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be read ({_first_line(error)}); run the same command again"
            ) from error

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :meth:`Storage.sizes`."""
        system, path = self._open(prefix)
        root = len(path) - len(prefix)
        try:
            entries = system.get_file_info(pafs.FileSelector(path.rstrip("/"), allow_not_found=True, recursive=True))
        except OSError as error:
            raise DataError(
                f"{self.where(prefix)} cannot be listed ({_first_line(error)}); run the same command again"
            ) from error
        return {entry.path[root:]: entry.size for entry in entries if entry.type == pafs.FileType.File}

    def delete(self, name: str) -> None:
        """See :meth:`Storage.delete`."""
        system, path = self._open(name)
        try:
            system.delete_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(
                f"{self.where(name)} cannot be deleted ({_first_line(error)}); run the same command again"
            ) from error

    def where(self, name: str) -> str:
        """See :meth:`Storage.where`; without the settings of the URL."""
        return f"s3://{self._path(name)}"

    def probe(self) -> None:
        """Write, read and delete a small object.

        Raises:
            ConfigError: the location is not usable, with what the store said.
        """
        name = f".probe-{secrets.token_hex(4)}"
        try:
            self.write(name, b"cria")
            self.read(name)
            self.delete(name)
        except DataError as error:
            raise ConfigError(
                f"record.storage={shown(self.url)!r} is not usable: {_first_line(error.__cause__ or error)}; "
                f"create the bucket, and set {CREDENTIALS} with the right to read, write and delete"
            ) from error

    def _path(self, name: str) -> str:
        parts = _checked(self.url)
        return "/".join(part for part in (parts.netloc, parts.path.strip("/"), self.folder) if part) + f"/{name}"

    def _open(self, name: str) -> tuple[pafs.FileSystem, str]:
        return _filesystem(self.url, os.getpid()), self._path(name)


def shown(url: str) -> str:
    """The URL without what may be secret: user, password (both may hold a slash), settings."""
    scheme, colon, place = url.partition("?")[0].partition("://")
    return f"{scheme}{colon}{place.rpartition('@')[2]}"


@functools.cache
def _checked(url: str) -> SplitResult:
    parts = urlsplit(url)
    if "@" in url:
        raise ConfigError(
            f"record.storage={shown(url)!r} was given with credentials in it; leave them out and set "
            f"{CREDENTIALS} in the environment"
        )
    if parts.scheme != "s3" or not parts.netloc:
        raise ConfigError(f"record.storage={shown(url)!r} is not an object store; give s3://bucket/prefix")
    unknown = sorted({key for key, _ in parse_qsl(parts.query, keep_blank_values=True)} - set(SETTINGS))
    if unknown:
        raise ConfigError(
            f"record.storage={shown(url)!r} has the unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}"
        )
    return parts


@functools.cache
def _filesystem(url: str, _process: int) -> pafs.S3FileSystem:
    """File system of a URL; one per process, for its threads do not survive a fork."""
    parts = _checked(url)
    settings = dict(parse_qsl(parts.query))
    server = settings.get("endpoint_override") or os.environ.get(ENDPOINTS[0]) or os.environ.get(ENDPOINTS[1])
    scheme, colon, host = (server or "").rpartition("://")
    return pafs.S3FileSystem(
        endpoint_override=host.rstrip("/") or None,
        scheme=settings.get("scheme") or (scheme if colon else None),
        region=settings.get("region") or (None if server else _region(parts.netloc)),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        connect_timeout=SECONDS,
        request_timeout=SECONDS,
        allow_delayed_open=True,  # a small object is one request instead of three
    )


def _region(bucket: str) -> str | None:
    """Region of a bucket on AWS; None where the environment settles it."""
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        return None
    try:
        return pafs.resolve_s3_region(bucket)
    except OSError as error:
        raise ConfigError(
            f"the region of bucket {bucket!r} cannot be found ({_first_line(error)}); check the name, or give "
            "record.storage as s3://bucket/prefix?region=NAME"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
