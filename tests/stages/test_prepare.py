"""What cannot be done is said before anything is computed: one error with value, rule and remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, CriaError, DataError, PlanError
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.stages.budget import final_widths
from cria_dist.stages.estimate import bytes_of_run, estimate
from cria_dist.stages.prepare import prepare, run_folder

RunConfigMaker = Callable[..., RunConfig]


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(
    make_model: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path
) -> None:
    small = make_model(tmp_path / "small", vocab_size=120, bos_token_id=1, eos_token_id=2)
    with pytest.raises(
        ConfigError, match=r"the tokenizer makes token 2\d\d and the model knows 0 to 119; take this mod"
    ):
        prepare(run_config(tmp_path / "run", model={"path": str(small)}))


def test_a_job_knows_model_text_and_budget(run_config: RunConfigMaker, tmp_path: Path, pico: Path) -> None:
    job = prepare(run_config(tmp_path))
    assert job.model_dir == pico
    assert {site.key: width for site, width in job.widths.items()} == {"layer-000.mlp": 48, "layer-001.mlp": 48}
    assert job.final_widths == {"layer-000.mlp": 36, "layer-001.mlp": 36}
    assert job.dense_parameters == checkpoint.count_parameters(checkpoint.read_config(pico))
    calibration_ST, test_ST = np.load(job.calibration_path), np.load(job.test_path)
    assert (calibration_ST.shape, test_ST.shape) == ((12, 32), (4, 32))
    assert calibration_ST.dtype == test_ST.dtype == np.int32
    assert job.digests["calibration_tokens"] != job.digests["test_tokens"]
    assert sorted(path.name for path in job.folder.iterdir()) == ["config.json", "tokens"]


def test_preparing_again_is_the_same_job(run_config: RunConfigMaker, tmp_path: Path) -> None:
    first = prepare(run_config(tmp_path))
    stamp = first.calibration_path.stat().st_mtime_ns
    second = prepare(run_config(tmp_path))
    assert (second.folder, second.digests) == (first.folder, first.digests)
    assert second.calibration_path.stat().st_mtime_ns == stamp


def test_where_a_run_is_carried_out_does_not_move_it(run_config: RunConfigMaker, tmp_path: Path) -> None:
    folder = run_folder(run_config(tmp_path))
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("pico-")
    assert run_folder(run_config(tmp_path, run={"workers": 7, "pool": "ray"})) == folder
    assert run_folder(run_config(tmp_path, prune={"ratio": 0.5})) != folder
    assert run_folder(run_config(tmp_path, seed=1)) != folder
    assert run_folder(run_config(tmp_path, run={"folder": str(tmp_path / "here")})) == tmp_path / "here"
    assert run_folder(run_config(tmp_path, run={"folder": "~/here"})) == Path.home() / "here"
    assert run_folder(run_config(tmp_path, run={"root": "~"})).parent == Path.home()


REFUSED: dict[str, tuple[dict[str, Any], type[CriaError], str]] = {
    "unknown key": ({"prune": {"ration": 0.3}}, ConfigError, r"unknown key 'prune\.ration'; known keys here: .*ratio"),
    "ratio 0": ({"prune": {"ratio": 0}}, ConfigError, r"prune\.ratio=0: .*greater than 0"),
    "ratio 1": ({"prune": {"ratio": 1}}, ConfigError, r"prune\.ratio=1: .*less than 1"),
    "ratio 1.5": ({"prune": {"ratio": 1.5}}, ConfigError, r"prune\.ratio=1\.5: .*less than 1"),
    "ratio nan": ({"prune": {"ratio": float("nan")}}, ConfigError, r"prune\.ratio=NaN"),
    "missing model": (
        {"model": {"path": "/no/such/model"}}, ConfigError, r"model\.path='/no/such/model' is not a directory; give"
    ),
    "no text": (
        {"data": {"calibration": {"source": "/no/such.txt"}}}, DataError, r"source='/no/such\.txt': no such file; give"
    ),
    "too short a text": (
        {"data": {"test_sequences": 4000}},
        DataError,
        r"test text has \d+ tokens, but 4000 sequences of 32 need 128000; lower data\.test_sequences",
    ),
    "overlapping texts": (
        {"data": {"test": {"part": "first"}}},
        ConfigError,
        r"calibration windows .* are also in the test text.*data\.max_overlap=0\.0 is the limit; give other text",
    ),
    "a ratio that empties a layer": (
        {"prune": {"ratio": 0.95}},
        PlanError,
        r"prune\.ratio=0\.95 leaves 0 of 48 units at layer-000\.mlp; at least 4 must stay: lower prune\.ratio",
    ),
    "more parameters than can go": (
        {"prune": {"ratio": 0.6, "budget": "parameters"}},
        PlanError,
        r"prune\.ratio=0\.6 of all [\d,]+ parameters is more than the prunable units hold .*; lower prune\.ratio",
    ),
    "more samples than tokens": (
        {"record": {"tokens": 400}},
        ConfigError,
        r"record\.tokens=400 is more than the 372 tokens .*lower it or raise data\.calibration_sequences",
    ),
    "nothing left to train on": (
        {
            "recover": {"steps": 2, "patience": 1, "sequence_length": 64},
            "data": {"calibration_sequences": 2},
            "record": {"tokens": 32},
        },
        ConfigError,
        r"recover\.patience=1 holds training sequences out, and the calibration corpus makes 1 of recover",
    ),
    "batch and workers": (
        {"recover": {"batch_sequences": 3, "workers": 2}},
        ConfigError,
        r"recover\.batch_sequences=3 is not a multiple of recover\.workers=2; choose a multiple",
    ),
    "name with ..": ({"name": "../../etc"}, ConfigError, r'name="\.\./\.\./etc": a name starts with a letter'),
    "name with two dots": ({"name": "a..b"}, ConfigError, r"name 'a\.\.b-.*' cannot become a file name; use letters"),
    "name with NUL": ({"name": "a\0b"}, ConfigError, r"name=.*a name starts with a letter"),
    "empty name": ({"name": ""}, ConfigError, r'name="": a name starts with a letter'),
    "latency beside whole layers": (
        {"prune": {"budget": "latency", "allocation": "sensitivity"}, "compare": [{"name": "block_influence"}]},
        ConfigError,
        r"prune\.budget=latency counts .*, which .* does not remove; leave it out of compare, or set prune\.budget",
    ),
    "latency beside single weights": (
        {"prune": {"budget": "latency", "allocation": "sensitivity"}, "compare": [{"name": "spectrum_preserving"}]},
        ConfigError,
        r"prune\.budget=latency counts .*, which .* does not remove; leave it out of compare, or set prune\.budget",
    ),
    "latency of whole layers": (
        {"prune": {"budget": "latency", "allocation": "sensitivity"}, "method": {"name": "block_influence"}},
        ConfigError,
        r"prune\.budget=latency counts .*block_influence does not remove; take another method, or set ",
    ),
    "a multiple wider than a layer": (
        {"prune": {"multiple": 1000}},
        ConfigError,
        r"prune\.multiple=1000 is more than the 48 units of layer-000\.mlp; lower prune\.multiple to at most 48",
    ),
    "unknown text": (
        {"data": {"calibration": {"source": "builtin:nothing"}}},
        ConfigError,
        r"source='builtin:nothing' is not a built-in text; there is builtin:pydoc",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    changes: dict[str, Any], kind: type[CriaError], message: str, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as refusal:
        prepare(run_config(tmp_path, **changes))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("config.json")), "a refused run must not claim a folder"


def test_empty_text(run_config: RunConfigMaker, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match=r"the test text is empty; check data\.test"):
        prepare(run_config(tmp_path, data={"test": {"source": str(tmp_path / "empty.txt"), "part": "all"}}))


def changed_model(pico: Path, folder: Path, **changes: Any) -> str:
    shutil.copytree(pico, folder)
    config = {**checkpoint.read_config(folder), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_unknown_family(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    path = changed_model(pico, tmp_path / "model", model_type="mamba")
    with pytest.raises(ConfigError, match=r"model family 'mamba' is not known; known families: bert, .*mistral"):
        prepare(run_config(tmp_path, model={"path": path}))


def test_bias_repair_without_biases(
    run_config: RunConfigMaker, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    mistral = make_model(tmp_path / "model", "mistral")
    with pytest.raises(ConfigError, match=r"prune\.repair=bias needs MLP biases.*use prune\.repair=least_squares"):
        prepare(run_config(tmp_path, model={"path": str(mistral)}, prune={"repair": "bias"}))


def test_more_tokens_than_positions(
    run_config: RunConfigMaker, make_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Learned positions end; rotary ones go on, into what the model was never trained on."""
    data = {"sequence_length": 72, "calibration_sequences": 4, "test_sequences": 1}
    learned = make_model(tmp_path / "learned", "gpt2", n_positions=64, max_position_embeddings=64)
    for key, changes in (
        ("data.sequence_length=72", {"data": data}),
        ("recover.sequence_length=128", {"recover": {"sequence_length": 128}}),
        ("evaluate.new_tokens=65", {"evaluate": {"new_tokens": 65}}),
    ):
        with pytest.raises(ConfigError, match=f"{key} is more than the 64 positions the model has .*lower it"):
            prepare(run_config(tmp_path, model={"path": str(learned)}, **changes))
    prepare(run_config(tmp_path, model={"path": str(learned)}, evaluate={"new_tokens": 65}), "apply")
    assert not [one for one in caplog.messages if "positions" in one]
    rotary = make_model(tmp_path / "rotary", max_position_embeddings=64)
    prepare(run_config(tmp_path, model={"path": str(rotary)}, data=data, recover={"steps": 0}))
    (warned,) = [one for one in caplog.messages if "positions" in one]
    assert warned.startswith("data.sequence_length=72 is more than the 64 positions")


def test_no_tokenizer(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    path = changed_model(pico, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in .*put tokenizer\.json beside the weights"):
        prepare(run_config(tmp_path, model={"path": path}))


def test_a_model_in_an_odd_dtype_can_be_estimated(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    path = changed_model(pico, tmp_path / "model", dtype="float64")
    assert estimate(run_config(tmp_path, model={"path": path}))["parameters"] > 0


def test_more_neighbours_than_neurons(run_config: RunConfigMaker, tmp_path: Path) -> None:
    """48 neurons cannot have 60 neighbours each; that is known before anything is recorded."""
    with pytest.raises(CriaError, match=r"method\.neighbours"):
        prepare(run_config(tmp_path, method={"name": "cria", "neighbours": 60}))


def test_no_disk_space(run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    job = prepare(config)
    shutil.rmtree(job.folder)
    needed = sum(bytes_of_run(config, job.model_config, job.family, job.dense_parameters).values())
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(ConfigError, match=r"the run needs [\d.]+ MB below .*pico-.* are free; lower record\.tokens"):
        prepare(config)
    assert not job.folder.exists()
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    assert prepare(config).folder.is_dir()


def test_a_folder_that_cannot_be_written(run_config: RunConfigMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"pico-\w+ cannot be written \(Not a directory\); choose another run\.root"):
        prepare(run_config(tmp_path, run={"root": str(tmp_path / "file" / "runs")}))


def test_the_folder_of_another_configuration(run_config: RunConfigMaker, tmp_path: Path) -> None:
    here = {"folder": str(tmp_path / "here")}
    prepare(run_config(tmp_path, run=here))
    with pytest.raises(ConfigError, match=r"here belongs to another configuration \(different: config\.prune\.ratio\)"):
        prepare(run_config(tmp_path, run=here, prune={"ratio": 0.5}))
    assert prepare(run_config(tmp_path, run=here)).final_widths["layer-000.mlp"] == 36


def test_the_folder_of_another_text(run_config: RunConfigMaker, text_file: Path, tmp_path: Path) -> None:
    """The configuration is the same, the file it names is not."""
    copy = tmp_path / "copy.txt"
    shutil.copyfile(text_file, copy)
    config = run_config(tmp_path, data={"calibration": {"source": str(copy)}})
    prepare(config)
    copy.write_text("now something else " + text_file.read_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"different: digests\.calibration_tokens"):
        prepare(config)


def test_the_folder_of_another_model(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    path = changed_model(pico, tmp_path / "model")
    config = run_config(tmp_path, model={"path": path})
    prepare(config)
    (tmp_path / "model" / "config.json").write_text((pico / "config.json").read_text() + "\n\n")
    with pytest.raises(ConfigError, match=r"different: digests\.model"):
        prepare(config)


def test_a_folder_with_rounds_and_no_configuration(run_config: RunConfigMaker, tmp_path: Path) -> None:
    (tmp_path / "here" / "round-00").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds .* but no config\.json of a run; choose another run\.folder"):
        prepare(run_config(tmp_path, run={"folder": str(tmp_path / "here")}))


def test_a_folder_with_somebodys_checkpoint_is_not_taken(
    run_config: RunConfigMaker, pico: Path, tmp_path: Path
) -> None:
    """``apply`` clears ``pruned/``: a folder that has one which is not ours must be refused."""
    shutil.copytree(pico, tmp_path / "here" / "pruned")
    with pytest.raises(ConfigError, match=r"here .*choose another run\.folder"):
        prepare(run_config(tmp_path, run={"folder": str(tmp_path / "here")}))


@pytest.mark.parametrize(("ratio", "multiple", "kept"), [(0.25, 4, 36), (0.26, 4, 32), (0.25, 1, 36), (0.3, 16, 32)])
def test_units_budget(ratio: float, multiple: int, kept: int, run_config: RunConfigMaker, tmp_path: Path) -> None:
    job = prepare(run_config(tmp_path, prune={"ratio": ratio, "multiple": multiple}))
    assert set(job.final_widths.values()) == {kept}


@pytest.mark.parametrize("multiple", [1, 4])
def test_parameters_budget(multiple: int, run_config: RunConfigMaker, tmp_path: Path) -> None:
    """At least the share asked for, and less than one multiple per layer more."""
    config = run_config(tmp_path, prune={"ratio": 0.1, "budget": "parameters", "multiple": multiple})
    job = prepare(config)
    kept = final_widths(config, job.family, job.model_config, job.dense_parameters)
    removed = sum(48 - width for width in kept.values()) * job.family.unit_cost(Site(0), job.model_config)
    step = multiple * 2 * job.family.unit_cost(Site(0), job.model_config)
    assert 0.1 * job.dense_parameters <= removed < 0.1 * job.dense_parameters + step


def test_estimate_adds_up(run_config: RunConfigMaker, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    found = estimate(config)
    job = prepare(config)
    assert found["parameters"] == job.dense_parameters
    assert found["shards"] == 3
    assert found["storage_bytes.signals"] == 200 * 96 * 3 * 4
    assert found["storage_bytes.moments"] == 3 * 2 * (48 * 48 + 48) * 4
    assert found["storage_bytes.boundaries"] == 12 * 32 * 32 * 4
    parts = [
        size for name, size in found.items() if name.startswith("storage_bytes.") and name != "storage_bytes.total"
    ]
    assert found["storage_bytes.total"] == sum(parts)
