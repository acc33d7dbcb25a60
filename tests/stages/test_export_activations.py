"""Exports that others read, of recordings in any data type, cut in any way."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cria_dist.cli import app
from cria_dist.errors import ConfigError, DataError
from cria_dist.records import Site
from cria_dist.stages import export_activations as exports
from cria_dist.stages.export_activations import Choice
from cria_dist.store import activations
from cria_dist.store.activations import SignalTable
from cria_dist.store.places import recorded
from cria_dist.store.recording import Recording, Slice
from cria_dist.store.storage import LocalStorage

N, ROWS = 6, (5, 0, 3)
SITES = (Site(0), Site(3))


def words_of(site: Site, shard: int, dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((site.layer, shard))
    values = {name: rng.normal(size=(ROWS[shard], N)).astype(np.float32) for name in ("gate", "output")}
    if dtype == "bfloat16":
        return {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in values.items()}
    return {name: value.astype(dtype) for name, value in values.items()}


def expected(site: Site, dtype: str, name: str) -> np.ndarray:
    words = np.concatenate([words_of(site, shard, dtype)[name] for shard in range(len(ROWS))])
    return (words.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else words.astype(np.float32)


def record(run: Path, dtype: str, cuts: tuple[int, ...] = (0, N)) -> Path:
    recording = Recording(LocalStorage(run / "round-00"), "d1")
    for shard, rows in enumerate(ROWS):
        tokens = {"sequence": np.full(rows, shard, np.int32), "position": np.arange(rows, dtype=np.int32)}
        for site in SITES:
            parts = []
            for start, stop in pairwise(cuts):
                units = Slice(start, stop)
                own = {name: [words[:, start:stop].copy()] for name, words in words_of(site, shard, dtype).items()}
                sums = (rows, np.zeros(stop - start, np.float32), np.zeros((stop - start, N), np.float32))
                parts.append(
                    {
                        "start": start,
                        "stop": stop,
                        "signals": recording.write_signals(site, shard, units, SignalTable(own, tokens, dtype)),
                        "moments": recording.write_moments(site, shard, units, sums),
                    }
                )
            recording.commit(site, shard, N, dtype, parts)
    recording.write_manifest(SITES, len(ROWS))
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cuts", [(0, N), (0, 1, 4, N)])
def test_pandas_reads_lists(dtype: str, cuts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "TILE_UNITS", 2)
    run = record(tmp_path / "run", dtype, cuts)
    written = exports.export_activations(run, tmp_path / "out", Choice())
    assert [path.name for path in written] == ["layer-000.mlp.parquet", "layer-003.mlp.parquet"]
    for site, path in zip(SITES, written, strict=True):
        assert pq.read_schema(path).field("gate").type.value_type == pa.float32()
        frame = pd.read_parquet(path)
        assert list(frame.columns) == ["sequence", "position", "gate", "output"]
        assert frame["sequence"].tolist() == [0] * 5 + [2] * 3
        assert frame["position"].tolist() == [*range(5), *range(3)]
        for name in ("gate", "output"):
            assert np.array_equal(np.stack(frame[name].to_list()), expected(site, dtype, name))


def test_binary_keeps_the_recorded_words(tmp_path: Path) -> None:
    run = record(tmp_path / "run", "bfloat16", (0, 2, N))
    (path,) = exports.export_activations(run, tmp_path / "out", Choice("binary", "layer-003.mlp", "output"))
    table = pq.read_table(path)
    assert table.column_names == ["sequence", "position", "output"]
    assert table.schema.metadata[b"cria.dtype"] == b"bfloat16"
    found = np.frombuffer(b"".join(table["output"].to_pylist()), np.uint16).reshape(-1, N)
    assert np.array_equal(found, np.concatenate([words_of(SITES[1], one, "bfloat16")["output"] for one in range(3)]))


def test_rows_are_written_in_blocks_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "BLOCK_BYTES", 2 * 4 * N)
    run = record(tmp_path / "run", "float32")
    path = exports.export_activations(run, tmp_path / "out", Choice())[0]
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(one).num_rows for one in range(groups.num_row_groups)] == [2, 2, 1, 0, 2, 1]
    assert np.array_equal(np.stack(pd.read_parquet(path)["gate"].to_list()), expected(SITES[0], "float32", "gate"))


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (Choice(site="layer-9"), "no site 'layer-9' was recorded; there are: layer-000.mlp, layer-003.mlp"),
        (Choice(signal="hidden"), "no signal 'hidden' was recorded; there are: gate, output"),
        (Choice(round_index=4), "has no recorded round 4; it has 0"),
    ],
)
def test_names_that_are_not_there(choice: Choice, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        exports.export_activations(record(tmp_path / "run", "float32"), tmp_path / "out", choice)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_export_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out is there already; give a new folder"):
        exports.export_activations(record(tmp_path / "run", "float32"), tmp_path / "out", Choice())
    assert (tmp_path / "out").read_text() == "mine"


def test_damage_half_way_leaves_no_export(tmp_path: Path) -> None:
    run = record(tmp_path / "run", "float32")
    (path,) = (run / "round-00").glob("activations/layer-003.mlp/shard-00002.*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"layer-003\.mlp/shard-00002\S+ is not what was recorded"):
        exports.export_activations(run, tmp_path / "out", Choice())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written \(Not a directory\)"):
        exports.export_activations(record(tmp_path / "run", "float32"), tmp_path / "file" / "out", Choice())


def test_the_command(tmp_path: Path) -> None:
    run, out = record(tmp_path / "run", "float16"), tmp_path / "out"
    arguments = ["export-activations", str(run), str(out), "--layout", "list", "--site", "layer-000.mlp"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert [path.name for path in out.iterdir()] == ["layer-000.mlp.parquet"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "is there already" in again.stderr


def test_a_real_run(run_config: Any, make_context: Any, tmp_path: Path) -> None:
    from cria_dist.pipeline import prune

    context = make_context(run_config(tmp_path))
    prune(context, until="record")
    exports.export_activations(context.job.folder, tmp_path / "out", Choice(signal="output"))
    frame = pd.read_parquet(tmp_path / "out" / "layer-001.mlp.parquet")
    assert frame.shape == (200, 3)
    output_NM = recorded(context.job.folder / "round-00").signals(Site(1))["output"]
    assert np.array_equal(np.stack(frame["output"].to_list()).T, output_NM)
