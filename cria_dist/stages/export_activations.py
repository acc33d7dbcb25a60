"""Recorded signals as plain Parquet for pandas, DuckDB and whoever reads Parquet: a file per site, a row per token.

Shapes: T tokens of a shard, N units of the site.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cria_dist import files
from cria_dist.errors import ConfigError
from cria_dist.models import depth
from cria_dist.records import Site
from cria_dist.store import activations
from cria_dist.store.places import recorded
from cria_dist.store.recording import Recording

Layout = Literal["list", "binary"]
BLOCK_BYTES = 64 << 20
"""Of one signal in one row group; two or three times as much is held at a time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a recording is exported.

    Attributes:
        layout: ``list`` writes ``list<float>``; ``binary`` the recorded words of a token as one value, without loss.
        site: key of the only site, or None for all.
        signal: the only signal, or None for all; without ``site``, of the neurons.
        round_index: round of the run, from 0.
    """

    layout: Layout = "list"
    site: str | None = None
    signal: str | None = None
    round_index: int = 0


def export_activations(run_folder: Path, target: Path, choice: Choice) -> list[Path]:
    """Write ``target/<site>.parquet`` for the chosen sites; all of them appear at once, when they are finished.

    Columns: ``sequence`` and ``position`` (int32, of the calibration tokens), then one per signal. The metadata of a
    file name what was recorded: ``cria.dtype`` (in the layout ``binary`` bfloat16 is 16-bit words) and ``cria.width``.

    Args:
        run_folder: folder of a run that was recorded.
        target: new folder.
        choice: what to export, and how.

    Returns:
        The files.

    Raises:
        ConfigError: the target is there already or cannot be written, or there is no such round, site or signal.
        DataError: the recording is incomplete or damaged.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; give a new folder, exports are not overwritten")
    recording = _recording(run_folder, choice.round_index)
    sites = [Site.from_key(key) for key in _chosen("site", choice.site, recording.manifest()["sites"])]
    if choice.site is None and choice.signal is not None:  # hidden states have other signals
        sites = [site for site in sites if site.part != depth.PART]
    temporary = target.with_name(f".{target.name}.tmp.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        names = [_write_site(recording, site, temporary, choice) for site in sites]
        temporary.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [target / name for name in names]


def _recording(run_folder: Path, index: int) -> Recording:
    folder = run_folder / f"round-{index:02d}"
    if not folder.is_dir():
        rounds = sorted(int(path.name.removeprefix("round-")) for path in run_folder.glob("round-*"))
        known = f"it has {', '.join(map(str, rounds))}" if rounds else "give the folder of a run that was recorded"
        raise ConfigError(f"{run_folder} has no recorded round {index}; {known}")
    return recorded(folder)


def _chosen(kind: str, wanted: str | None, there: Iterable[str]) -> Sequence[str]:
    """The one that is wanted, or all."""
    names = sorted(there)
    if wanted is not None and wanted not in names:
        raise ConfigError(f"no {kind} {wanted!r} was recorded; there are: {', '.join(names)}")
    return names if wanted is None else [wanted]


def _write_site(recording: Recording, site: Site, folder: Path, choice: Choice) -> str:
    """One file, streamed shard by shard; returns its name."""
    width, _, dtype = recording.shape(site)
    name = f"{site.key}.parquet"
    writer: pq.ParquetWriter | None = None
    try:
        for tokens, signals in _whole_shards(recording, site, choice):
            for rows in _row_blocks(len(tokens["sequence"]), width):
                table = _table(tokens, signals, dtype, choice.layout, rows)
                if writer is None:
                    facts = {"cria.site": site.key, "cria.dtype": dtype, "cria.width": str(width)}
                    schema = table.schema.with_metadata(facts)
                    writer = pq.ParquetWriter(folder / name, schema, compression="lz4", use_dictionary=False)
                writer.write_table(
                    table.replace_schema_metadata(writer.schema.metadata), row_group_size=max(table.num_rows, 1)
                )
    finally:
        if writer is not None:
            writer.close()
    files.sync(folder / name)
    return name


Words = dict[str, np.ndarray]


def _whole_shards(recording: Recording, site: Site, choice: Choice) -> Iterator[tuple[Words, Words]]:
    """Per shard: the columns of its tokens, and the words [T, N] of each signal with all slices and tiles joined."""
    width, _, _ = recording.shape(site)
    only = () if choice.signal is None else (choice.signal,)
    pieces: dict[str, list[np.ndarray]] = {}
    for units, stored in recording.shards(site, only):
        for signal in only or stored.tiles:
            if signal not in stored.tiles:
                raise ConfigError(f"no signal {signal!r} was recorded; there are: {', '.join(sorted(stored.known))}")
            pieces.setdefault(signal, []).extend(words_TN for _, words_TN in stored.tiles[signal])
        if units.stop == width:
            yield dict(stored.tokens), {name: _joined(blocks) for name, blocks in pieces.items()}
            pieces = {}


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


def _row_blocks(rows: int, width: int) -> list[slice]:
    step = max(1, BLOCK_BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)] or [slice(0, 0)]


def _table(tokens: Words, signals: Words, dtype: str, layout: Layout, rows: slice) -> pa.Table:
    columns = {name: pa.array(values[rows]) for name, values in tokens.items()}
    for name, words_TN in signals.items():
        block_TN = words_TN[rows]
        columns[name] = _lists(block_TN, dtype) if layout == "list" else activations.binary_column(block_TN)
    return pa.table(columns)


def _lists(words_TN: np.ndarray, dtype: str) -> pa.ListArray:
    values_TN = np.empty(words_TN.shape, dtype=np.float32)
    activations.to_float32(words_TN, dtype, values_TN)
    count, width = words_TN.shape
    offsets = np.arange(0, count * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values_TN.reshape(-1))
