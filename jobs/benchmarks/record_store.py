"""The write path of the recorder beside bare ``pyarrow.parquet.write_table`` of the same columns to the same folder."""

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cria_dist import files
from cria_dist.records import Site
from cria_dist.store import activations
from cria_dist.store.activations import SignalTable
from cria_dist.store.recording import Recording, Slice
from cria_dist.store.storage import LocalStorage
from jobs.benchmarks.frame import RESULTS, alternate, seconds

TOKENS = 4096
PROTOCOL = (
    "write: encode into a temporary name, fsync, rename; SHA-256 in a second thread beside the fsync. The bare "
    "contender is pyarrow.parquet.write_table of the same columns with the same options, to the same folder.",
    "write_ratio is the bare contender's median time over ours, both with fsync, the smallest over all cases; "
    "write_ratio_unsynced is against write_table without fsync.",
    "Cases: 4096 tokens; noise that lz4 cannot compress, and signals of which ReLU left 20 %; contenders alternate, "
    "one thread of Arrow.",
)


@dataclass(frozen=True, slots=True)
class Case:
    """What is written: units, data type, whether most values are zero."""

    units: int
    dtype: str
    relu: bool

    def __str__(self) -> str:
        """As in the table."""
        return f"{self.units} x {self.dtype}, {'ReLU' if self.relu else 'noise'}"


@dataclass(frozen=True, slots=True)
class WriteRatio:
    """What was found out.

    Attributes:
        metrics: ``write_ratio`` and ``write_ratio_unsynced``.
        samples: MB of signals per second, by case and contender.
    """

    metrics: Mapping[str, float]
    samples: Mapping[str, dict[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])


QUICK = (Case(1536, "bfloat16", relu=False),)
FULL = tuple(
    Case(units, dtype, relu)
    for units, dtype in ((1536, "float32"), (1536, "bfloat16"), (11008, "bfloat16"))
    for relu in (False, True)
)


def write_ratio(quick: bool) -> WriteRatio:
    """Throughput of the write path over that of the bare one, both ending in fsync; see ``PROTOCOL``."""
    samples: dict[str, dict[str, list[float]]] = {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    threads = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        for case in QUICK if quick else FULL:
            with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
                samples[str(case)] = _measure(case, Path(folder), 3 if quick else 7)
    finally:
        pa.set_cpu_count(threads)
    ratios = {name: min(_ratio(case, name) for case in samples.values()) for name in ("synced", "unsynced")}
    metrics = {"write_ratio": ratios["synced"], "write_ratio_unsynced": ratios["unsynced"]}
    return WriteRatio(metrics, samples)


def _ratio(case: Mapping[str, list[float]], rival: str) -> float:
    return statistics.median(case["ours"]) / statistics.median(case[f"write_table, {rival}"])


def _measure(case: Case, folder: Path, repeats: int) -> dict[str, list[float]]:
    table = SignalTable(_signals(case), {"sequence": np.arange(TOKENS, dtype=np.int32)}, case.dtype)
    columns = {
        f"{name}.{tile}": activations.binary_column(words_TN)
        for name, tiles in table.signals.items()
        for tile, words_TN in enumerate(tiles)
    }
    arrow = pa.table({"sequence": pa.array(table.tokens["sequence"]), **columns})
    recording, site, units = Recording(LocalStorage(folder), "benchmark"), Site(0), Slice(0, case.units)
    megabytes = sum(words_TN.nbytes for tiles in table.signals.values() for words_TN in tiles) / 1e6

    def speed(action: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            found = megabytes / seconds(action)
            os.sync()  # or the next contender would wait for the pages this one left to the disk
            return found

        return sample

    return alternate(
        {
            "ours": speed(lambda: recording.write_signals(site, 0, units, table)),
            "write_table, synced": speed(lambda: _bare(arrow, folder / "bare-synced.parquet", sync=True)),
            "write_table, unsynced": speed(lambda: _bare(arrow, folder / "bare.parquet", sync=False)),
        },
        repeats,
    )


def _bare(arrow: pa.Table, path: Path, sync: bool) -> None:
    path.unlink(missing_ok=True)
    pq.write_table(
        arrow, path, compression="lz4", use_dictionary=False, write_statistics=False, row_group_size=arrow.num_rows
    )
    if sync:
        files.sync(path)


def _signals(case: Case) -> dict[str, list[np.ndarray]]:
    """Three signals in tiles, as recorders keep them; bfloat16 is the upper words of float32."""
    rng = np.random.default_rng(0)
    signals: dict[str, list[np.ndarray]] = {}
    for name in ("gate", "up", "output"):
        values_TN = rng.standard_normal((TOKENS, case.units), dtype=np.float32)
        if case.relu:
            values_TN = np.maximum(values_TN - np.float32(0.84), 0)
        words_TN = values_TN if case.dtype == "float32" else (values_TN.view(np.uint32) >> 16).astype(np.uint16)
        bounds = activations.tile_bounds(case.units)
        signals[name] = [np.ascontiguousarray(words_TN[:, start:stop]) for start, stop in bounds]
    return signals
