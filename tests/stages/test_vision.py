"""An image classifier from configuration to pruned checkpoint: what is recorded is what the model computed."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.config_file import parse
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import partition
from cria_dist.pipeline import Context, prune
from cria_dist.pool import LocalPool
from cria_dist.records import PruningPlan, Site, Stage
from cria_dist.runtime import launch
from cria_dist.stages import images, schedule
from cria_dist.stages.estimate import bytes_of_run, estimate
from cria_dist.stages.footprint import Workload
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare
from cria_dist.stages.sample import TokenSample
from cria_dist.store.recording import MANIFEST, Recording
from cria_dist.store.storage import LocalStorage

MakeConfig = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
IMAGES, POSITIONS, TOKENS = 10, 17, 57
SITES = [Site(0), Site(1), Site(2)]


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images in a Parquet file, as ``datasets`` stores them."""
    path = tmp_path_factory.mktemp("images") / "train.parquet"
    rows = [{"bytes": encoded(number), "path": None} for number in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet.write_table(pa.table({"image": pa.array(rows, kind), "label": list(range(12))}), path)
    return path


@pytest.fixture
def make_config(run_config: MakeConfig, pico_vit: Path, corpus: Path, tmp_path: Path) -> MakeConfig:
    """A run on the pico ViT: 10 images in shards of 4, 4 and 2."""
    tree = {
        "name": "vit",
        "model": {"path": str(pico_vit)},
        "data": {
            "calibration": {"source": str(corpus), "format": "images", "field": "image"},
            "calibration_sequences": IMAGES,
        },
        "record": {"tokens": TOKENS, "shard_sequences": 4, "batch_sequences": 3, "schedule": "replicate"},
        "prune": {"ratio": 0.25, "multiple": 4, "repair": "none"},
        "run": {"root": str(tmp_path / "runs"), "pool": "local"},
    }

    def make(**changes: Any) -> RunConfig:
        merged = {
            key: {**tree.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
        }
        return parse({**tree, **merged})

    return make


def carry_out(make_context: MakeContext, config: RunConfig, until: Stage) -> Job:
    context = make_context(config, until=until)
    assert prune(context, until=until) is None
    return context.job


def recording_of(job: Job) -> Recording:
    manifest = files.read_json(job.folder / "round-00" / MANIFEST)
    return Recording(LocalStorage(job.folder / "round-00"), manifest["digest"])


def observed(job: Job, site: Site) -> dict[str, np.ndarray]:
    """Both signals of a site for every token, [tokens, units], from hooks on the stock model."""
    model = checkpoint.load_model(job.model_dir, checkpoint.Numerics())
    mlp, found = model.vit.layers[site.layer].mlp, dict[str, torch.Tensor]()
    mlp.fc1.register_forward_hook(lambda _, args, output: found.__setitem__("input", output))
    mlp.activation_fn.register_forward_hook(lambda _, args, output: found.__setitem__("output", output))
    with torch.inference_mode():
        model(pixel_values=torch.from_numpy(np.load(job.calibration_path)))
    return {name: signal.flatten(0, 1).double().numpy() for name, signal in found.items()}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key)
def test_what_is_recorded_is_what_the_stock_model_computes(
    site: Site, make_config: MakeConfig, make_context: MakeContext
) -> None:
    job = carry_out(make_context, make_config(), "record")
    recording, expected = recording_of(job), observed(job, site)
    assert expected["output"].shape == (IMAGES * POSITIONS, 48)
    stored, rows = recording.signals(site), TokenSample(0, IMAGES, POSITIONS, TOKENS).rows(range(IMAGES))
    assert sorted(stored) == ["input", "output"]
    for name, signal_TN in expected.items():
        assert stored[name].shape == (48, TOKENS)
        np.testing.assert_allclose(stored[name], signal_TN[rows].T, rtol=1e-5, atol=1e-6)
    moments, output_TN = recording.moments(site), expected["output"]
    assert moments.count == IMAGES * POSITIONS, "the class token counts too"
    np.testing.assert_allclose(moments.total_N, output_TN.sum(axis=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(moments.gram_NN, output_TN.T @ output_TN, rtol=1e-5, atol=1e-4)


def test_the_class_token_is_never_sampled(make_config: MakeConfig, make_context: MakeContext) -> None:
    job = carry_out(make_context, make_config(record={"tokens": IMAGES * (POSITIONS - 1)}), "record")
    paths = sorted((job.folder / "round-00" / "activations" / SITES[0].key).glob("*.parquet"))
    table = pa.concat_tables([parquet.read_table(path, columns=["sequence", "position"]) for path in paths])
    assert table["position"].to_pylist() == list(range(1, POSITIONS)) * IMAGES
    assert table["sequence"].to_pylist() == [image for image in range(IMAGES) for _ in range(POSITIONS - 1)]


def test_layer_by_layer_the_same_is_recorded(
    make_config: MakeConfig, make_context: MakeContext, pico_vit: Path, tmp_path: Path
) -> None:
    work = Workload(make_config(), checkpoint.read_config(pico_vit))
    needed = schedule.peak(work, partition(3, 3), 1).total
    manifests = []
    for memory, kind, blocks in ((1e9, "replicate", 1), (needed, "sweep", 3)):
        record = {"schedule": "auto", "memory_gb": memory / 1e9}
        config = make_config(record=record, run={"folder": str(tmp_path / kind / "run")})
        chosen = schedule.choose(config, checkpoint.read_config(pico_vit), LocalPool())
        assert (chosen.kind, len(chosen.blocks)) == (kind, blocks), chosen.reason
        manifests.append((carry_out(make_context, config, "record").folder / "round-00" / MANIFEST).read_bytes())
    assert manifests[0] == manifests[1]


def test_a_pruned_classifier_computes_what_the_masked_one_does(
    make_config: MakeConfig, make_context: MakeContext
) -> None:
    job = carry_out(make_context, make_config(), "apply")
    plan = PruningPlan.from_json((job.folder / "pruned" / "plan.json").read_text())
    assert {key: len(kept) for key, kept in plan.kept.items()} == dict.fromkeys((site.key for site in SITES), 36)
    pixels_SCHW = torch.from_numpy(np.load(job.calibration_path))
    masked, pruned = (
        checkpoint.load_model(folder, checkpoint.Numerics()) for folder in (job.model_dir, job.folder / "pruned")
    )
    with torch.inference_mode():
        dense = masked(pixel_values=pixels_SCHW).logits.clone()
        for layer, block in enumerate(masked.vit.layers):
            removed = sorted(set(range(48)) - set(plan.kept[Site(layer).key]))
            block.mlp.fc2.weight[:, removed] = 0
        expected, found = (model(pixel_values=pixels_SCHW).logits for model in (masked, pruned))
    assert (expected - dense).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5
    assert plan.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (masked, pruned))


@pytest.mark.parametrize("repair", ["bias", "least_squares"])
@pytest.mark.parametrize("method", ["cria", "magnitude", "random"])
def test_every_method_and_repair(repair: str, method: str, make_config: MakeConfig, make_context: MakeContext) -> None:
    """The first layer's repaired MLP is nearer to the dense one than without repair."""
    config = make_config(prune={"repair": repair}, method={"name": method})
    job = carry_out(make_context, config, "apply")
    plan = PruningPlan.from_json((job.folder / "pruned" / "plan.json").read_text())
    dense, pruned = (
        checkpoint.load_model(folder, checkpoint.Numerics()) for folder in (job.model_dir, job.folder / "pruned")
    )
    output_TN = torch.from_numpy(observed(job, SITES[0])["output"]).float()
    kept = list(plan.kept[SITES[0].key])
    whole, ours = dense.vit.layers[0].mlp.fc2, pruned.vit.layers[0].mlp.fc2
    with torch.inference_mode():
        bare_TD = output_TN[:, kept] @ whole.weight[:, kept].T + whole.bias
        errors = [(after - whole(output_TN)).norm() for after in (ours(output_TN[:, kept]), bare_TD)]
    assert errors[0] < errors[1]


def test_heads_of_a_classifier_go(make_config: MakeConfig, make_context: MakeContext) -> None:
    """The pruned model is the masked one, and loads as the stock class."""
    config = make_config(prune={"units": ["attention"], "multiple": 1}, method={"name": "cria"})
    job = carry_out(make_context, config, "apply")
    plan = PruningPlan.from_json((job.folder / "pruned" / "plan.json").read_text())
    assert {key: len(kept) for key, kept in plan.kept.items()} == {
        f"layer-{layer:03d}.attention": 3 for layer in range(3)
    }
    masked = checkpoint.load_model(job.model_dir, checkpoint.Numerics())
    pruned = AutoModelForImageClassification.from_pretrained(job.folder / "pruned").eval()
    pixels_SCHW = torch.from_numpy(np.load(job.calibration_path))
    with torch.inference_mode():
        dense = masked(pixel_values=pixels_SCHW).logits.clone()
        for layer, block in enumerate(masked.vit.layers):
            (head,) = {0, 1, 2, 3} - {*plan.kept[f"layer-{layer:03d}.attention"]}
            block.attention.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
        expected, found = (model(pixel_values=pixels_SCHW).logits for model in (masked, pruned))
    assert (expected - dense).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5
    assert plan.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (masked, pruned))


def test_images_are_prepared_once(
    make_config: MakeConfig, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *args: decoded.append(1) or decode(*args))
    first = prepare(make_config(), "record")
    assert len(decoded) == IMAGES
    assert sorted(path.name for path in first.folder.iterdir()) == ["config.json", "images"]
    assert sorted(path.name for path in first.calibration_path.parent.iterdir()) == ["calibration.npy", "images.json"]
    assert prepare(make_config(), "apply").digests == first.digests
    assert len(decoded) == IMAGES
    first.calibration_path.write_bytes(first.calibration_path.read_bytes()[:-20])
    assert prepare(make_config(), "record").digests == first.digests
    assert len(decoded) == 2 * IMAGES
    assert np.load(first.calibration_path).shape == (IMAGES, 3, 16, 16)


def test_a_folder_of_images_that_changed_is_found(make_config: MakeConfig, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    for number in range(12):
        (source / f"class-{number % 2}").mkdir(parents=True, exist_ok=True)
        picture(number).save(source / f"class-{number % 2}" / f"{number}.png")
    config = make_config(data={"calibration": {"source": str(source), "format": "images", "field": "image"}})
    job = prepare(config, "record")
    content = job.calibration_path.read_bytes()
    picture(99).save(source / "class-0" / "0.png")
    with pytest.raises(ConfigError, match=r"different: digests\.calibration_images"):
        prepare(config, "record")
    assert job.calibration_path.read_bytes() == content
    assert sorted(path.name for path in job.folder.iterdir()) == ["config.json", "images"]
    os.utime(job.calibration_path, ns=(1, 1))
    picture(0).save(source / "class-0" / "0.png")
    assert prepare(config, "record").digests == job.digests


@pytest.mark.slow
@pytest.mark.soak
def test_a_classifier_of_images_from_labels_to_the_report(
    make_config: MakeConfig, make_context: MakeContext, pico_vit: Path, tmp_path: Path
) -> None:
    """Its labels are what the dense model says; names on storage are not those in memory, and recovery writes them."""
    model = checkpoint.load_model(pico_vit, checkpoint.Numerics())
    pixels_SCHW = prepare(make_config(data={"calibration_sequences": 12}), "record").calibration_path
    with torch.inference_mode():
        labels = model(pixel_values=torch.from_numpy(np.load(pixels_SCHW))).logits.argmax(dim=1).tolist()
    rows = [{"bytes": encoded(number), "path": None} for number in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": [f"LABEL_{label}" for label in labels]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    half = {"source": str(tmp_path / "rows.parquet"), "format": "images", "field": "image", "label": "label"}
    data = {"calibration": {**half, "part": "first"}, "test": {**half, "part": "second"}}
    recipe = {"steps": 4, "workers": 1, "batch_sequences": 2, "learning_rate": 1e-3, "train": "mlp"}
    config = make_config(
        name="labelled", data={**data, "calibration_sequences": 6, "test_sequences": 6}, record={"tokens": 57},
        compare=[{"name": "taylor", "sequences": 6}], recover=recipe, evaluate={"latency_repeats": 1},
    )  # fmt: skip
    context = make_context(config)
    report = prune(context)
    assert report is not None
    found = {one.label: one for one in report.variants}
    assert list(found) == ["dense", "pruned", "recovered"]
    assert found["dense"].accuracy == 1.0
    assert report.comparison[0].accuracy is not None
    assert all("logits equal" in report.loaders[f"transformers, {name}"] for name in ("pruned", "recovered"))
    pruned, recovered = (load_file(context.job.folder / name / "model.safetensors") for name in ("pruned", "recovered"))
    changed = {name for name, one in pruned.items() if not torch.equal(one, recovered[name])}
    assert changed == {name for site in SITES for name in context.job.family.coupled_tensors(site, {})}


REFUSED: dict[str, tuple[dict[str, Any], Stage, type[CriaError], str]] = {
    "text": (
        {"data": {"calibration": {"source": "builtin:pydoc"}}}, "record", ConfigError,
        r"model_type 'vit' takes images, but data\.calibration\.format=text; set it to images, and source and field",
    ),
    "text that is called images": (
        {"data": {"calibration": {"source": "builtin:pydoc", "format": "images"}}}, "record", ConfigError,
        r"builtin:pydoc .*holds str, not images \(bytes and path\); name a source and field of images",
    ),
    "recovery": ({}, "recover", ConfigError, r"'vit' is a classifier, and recover and evaluate .*label, or use cria"),
    "the whole run": ({}, "evaluate", ConfigError, r"\(hence prune\) need labels; set data\.calibration\.label and"),
    "too few": (
        {"data": {"calibration_sequences": 13}}, "record", DataError,
        r"calibration corpus has 12 images, but 13 were asked for; lower data\.calibration_sequences to 12",
    ),
    "more samples than patches": (
        {"record": {"tokens": 161}}, "record", ConfigError,
        r"record\.tokens=161 is more than the 160 tokens of 10 calibration sequences without their first; lower it",
    ),
    "a folder in a file": (
        {"run": {"root": str(Path(__file__)), "pool": "local"}}, "record", ConfigError,
        r"cannot be written \(Not a directory\); choose another run\.root",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "until", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    changes: dict[str, Any], until: Stage, error: type[CriaError], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as refusal:
        prepare(make_config(**changes), until)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("*.npy"))


def test_a_language_model_does_not_take_images(run_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    for part in ("calibration", "test"):
        source = {"source": str(corpus), "field": "image", "part": "all"}
        with pytest.raises(ConfigError, match=rf"takes tokens, but data\.{part}\.format=images; set it to text"):
            prepare(run_config(tmp_path, data={part: {**source, "format": "images"}}))
        with pytest.raises(ConfigError, match=r"field='image' of .* holds images, not text"):
            prepare(run_config(tmp_path, data={part: source}))
    assert not list(tmp_path.rglob("config.json"))


def test_a_processor_of_another_size_is_refused(
    make_config: MakeConfig, make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_classifier(tmp_path / "model", image_size=32)
    processor = model / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("32", "16"))
    with pytest.raises(DataError, match=r"image 0 \(from 0\) becomes \(3, 16, 16\) and the model takes \(3, 32, 32\)"):
        prepare(make_config(model={"path": str(model)}), "record")


def test_a_model_without_a_head_is_refused(make_config: MakeConfig, pico_vit: Path, tmp_path: Path) -> None:
    """Its tensors have no ``vit.`` before their names."""
    checkpoint.load_model(pico_vit, checkpoint.Numerics()).vit.save_pretrained(tmp_path / "model")
    shutil.copy(pico_vit / "preprocessor_config.json", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model has no tensor 'vit\.encoder\.layer\.0\.intermediate\.dense\.weight'"):
        prepare(make_config(model={"path": str(tmp_path / "model")}), "record")


def test_no_processor(make_config: MakeConfig, make_classifier: Callable[..., Path], tmp_path: Path) -> None:
    model = make_classifier(tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json, which says how its model takes images"):
        prepare(make_config(model={"path": str(model)}), "record")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"memory_gb": 1e-4}, r"record\.schedule=replicate needs \d+ kB per worker .* raise record\.memory_gb"),
        ({"memory_gb": 1e-4, "schedule": "auto"}, r"one layer needs \d+ kB per worker .* raise record\.memory_gb"),
    ],
)
def test_too_little_memory(
    record: dict[str, Any], message: str, make_config: MakeConfig, make_context: MakeContext
) -> None:
    with pytest.raises(ConfigError, match=message):
        carry_out(make_context, make_config(record=record), "record")


def test_the_verb_says_what_works_before_anything_starts(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"or use cria record, analyse, decide or apply"):
        launch.run(make_config(run={"pool": "ray"}), "evaluate")
    assert not (tmp_path / "runs").exists()
    job, report = launch.run(make_config(), "decide")
    assert report is None
    assert (job.folder / "round-00" / "plan.json").is_file()


@pytest.mark.parametrize("measured", [False, True])
def test_estimate(measured: bool, make_config: MakeConfig) -> None:
    found = estimate(make_config(record={"schedule": "auto"}), measured)
    job = prepare(make_config(record={"schedule": "auto"}), "record")
    assert found["parameters"] == job.dense_parameters
    assert found["prunable_parameters"] == 3 * 48 * 65
    assert found["calibration_tokens"] == IMAGES * POSITIONS
    assert found["storage_bytes.inputs"] == IMAGES * 3 * 16 * 16 * 4
    assert found["storage_bytes.signals"] == TOKENS * 3 * 48 * 2 * 4
    assert found["storage_bytes.recovery_state"] == 0
    assert str(found["schedule"]).startswith("replicate: ")
    assert str(found["memory.tensor"]) == "not with these workers"
    assert "does not" not in str(found["memory.sweep"])
    needed = sum(bytes_of_run(job.config, job.model_config, job.family, job.dense_parameters).values())
    assert needed == found["storage_bytes.total"]


def test_cifar10(
    make_config: MakeConfig, make_context: MakeContext, make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    if not (CIFAR10 / "test.parquet").is_file():
        pytest.skip(f"{CIFAR10} is not here")
    model = make_classifier(tmp_path / "model", image_size=32, patch_size=8)
    calibration = {"source": str(CIFAR10 / "test.parquet"), "format": "images", "field": "image", "part": "second"}
    data = {"calibration": calibration, "calibration_sequences": 64}
    record = {"tokens": 512, "shard_sequences": 32, "batch_sequences": 16}
    job = carry_out(make_context, make_config(model={"path": str(model)}, data=data, record=record), "record")
    assert np.load(job.calibration_path, mmap_mode="r").shape == (64, 3, 32, 32)
    recording, expected = recording_of(job), observed(job, SITES[1])["output"]
    assert recording.moments(SITES[1]).count == 64 * POSITIONS
    np.testing.assert_allclose(recording.moments(SITES[1]).gram_NN, expected.T @ expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["block_influence", "mpruner"])
def test_whole_layers_of_a_classifier_go(method: str, make_config: MakeConfig, make_context: MakeContext) -> None:
    job = carry_out(make_context, make_config(method={"name": method}), "apply")
    plan = PruningPlan.from_json((job.folder / "pruned" / "plan.json").read_text())
    gone = [layer for layer in range(3) if not plan.kept[f"layer-{layer:03d}.block"]]
    assert len(gone) == 1
    masked, pruned = (
        checkpoint.load_model(folder, checkpoint.Numerics()) for folder in (job.model_dir, job.folder / "pruned")
    )
    masked.vit.layers[gone[0]].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    pixels_SCHW = torch.from_numpy(np.load(job.calibration_path))
    with torch.inference_mode():
        expected, found = (model(pixel_values=pixels_SCHW).logits for model in (masked, pruned))
    assert (found - expected).abs().max() < 1e-5
    assert plan.parameters[1] == sum(parameter.numel() for parameter in pruned.parameters())


def test_a_classifier_has_no_perplexity_to_stop_at(make_config: MakeConfig) -> None:
    config = make_config(method={"name": "mpruner", "stop": "loss"})
    with pytest.raises(ConfigError, match=r"measures perplexity and model_type 'vit' takes images; .*stop=budget"):
        prepare(config, "apply")
