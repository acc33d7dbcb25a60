"""Losses of a model pruned in its weights are those of the pruned model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cria_dist.config import RunConfig
from cria_dist.errors import NumericError
from cria_dist.maths.repair import least_squares, mean_bias
from cria_dist.models import checkpoint, surgery
from cria_dist.models.family import family_of
from cria_dist.pipeline import Context, prune
from cria_dist.records import Site
from cria_dist.stages.decide import select
from cria_dist.stages.evaluate import mean_loss
from cria_dist.stages.losses import FOLDER, LossTask, Probe, Trial, adopt, read_losses, trial
from cria_dist.stages.sensitivity import CurveMeter, PlanMeter
from cria_dist.store import places
from cria_dist.store.site_scores import read_scores

HELD_OUT = range(8, 12)


@pytest.fixture(scope="module")
def task(
    run_config: Callable[..., RunConfig], make_context: Callable[..., Context], tmp_path_factory: pytest.TempPathFactory
) -> LossTask:
    """A pico run that was analysed; the last of its three shards is held out."""
    context = make_context(run_config(tmp_path_factory.mktemp("losses")))
    prune(context, until="analyse")
    job, folder = context.job, context.job.folder / "round-00"
    recording = places.recorded(folder)
    return LossTask(
        job.model_dir, job.numerics, job.calibration_path, HELD_OUT, 2, recording, 2, folder, "least_squares", 1e-3, "d"
    )


@pytest.fixture(scope="module")
def normed(
    make_model: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    tmp_path_factory: pytest.TempPathFactory,
    task: LossTask,
) -> LossTask:
    """As :func:`task`, of heads that go through a norm together; the heads' queries are of different sizes."""
    folder = tmp_path_factory.mktemp("normed")
    dense = make_model(folder / "model", "olmo2", num_attention_heads=8, num_key_value_heads=4)
    model = checkpoint.load_model(dense, task.numerics)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= torch.linspace(0.1, 10, 64)[:, None]
    model.save_pretrained(dense)
    context = make_context(run_config(folder, model={"path": str(dense)}, prune={"units": ["attention"]}))
    prune(context, until="analyse")
    job, rounds = context.job, context.job.folder / "round-00"
    return replace(
        task,
        model_dir=job.model_dir,
        tokens_path=job.calibration_path,
        recording=places.recorded(rounds),
        folder=rounds,
        repair="none",
    )


def test_heads_go_from_the_norm_they_share_with_others(normed: LossTask, tmp_path: Path) -> None:
    widths = {"layer-000.attention": 3, "layer-001.attention": 1}
    kept = {key: select(read_scores(normed.folder, Site.from_key(key)), width) for key, width in widths.items()}
    config = checkpoint.read_config(normed.model_dir)
    done = surgery.Surgery(family_of(config), config, kept)
    tokens_ST = np.load(normed.tokens_path)[HELD_OUT.start : HELD_OUT.stop]
    meter = PlanMeter(normed)
    whole, found = meter(Trial("dense", ()))[0], meter(trial("both", widths))[0]
    expected = mean_loss(
        surgery.pruned_copy(checkpoint.load_model(normed.model_dir, normed.numerics), done), tokens_ST, 2
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(whole, rel=1e-3)
    assert meter(Trial("dense", ()))[0] == whole, "the norms were left as they were"


def loss_of_pruned(task: LossTask, widths: dict[str, int], folder: Path) -> float:
    """By surgery and the repair's own formulas, over the moments of the first two shards."""
    config = checkpoint.read_config(task.model_dir)
    family = family_of(config)
    whole = {site.key: width for site, width in family.widths(config).items()}
    kept = {key: select(read_scores(task.folder, Site.from_key(key)), widths.get(key, whole[key])) for key in whole}
    model = checkpoint.load_model(task.model_dir, task.numerics)
    for key, units in kept.items():
        name = family.modules(Site.from_key(key)).output
        weight_DN = model.get_submodule(name).weight.detach().double().numpy()
        moments, kept_S = task.recording.moments(Site.from_key(key), 2), np.asarray(units)
        if task.repair == "least_squares":
            tensors = {f"{name}.weight": least_squares(weight_DN, moments, kept_S, task.ridge)}
        elif task.repair == "bias":
            bias_D = model.get_submodule(name).bias
            there_D = 0 if bias_D is None else bias_D.detach().double().numpy()
            tensors = {f"{name}.bias": there_D + mean_bias(weight_DN, moments, kept_S)}
        else:
            tensors = {}
        folder.mkdir(exist_ok=True)
        save_file({k: torch.from_numpy(v).float() for k, v in tensors.items()}, folder / f"{key}.safetensors")
    done = surgery.Surgery(family, config, kept, folder, task.repair == "bias")
    tokens_ST = np.load(task.tokens_path)[HELD_OUT.start : HELD_OUT.stop]
    return mean_loss(surgery.pruned_copy(model, done), tokens_ST, 2)


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
def test_a_curve_is_the_loss_of_pruned_models(repair: Any, task: LossTask, tmp_path: Path) -> None:
    mine = replace(task, repair=repair, folder=task.folder)
    meter = CurveMeter(mine)
    for layer in (0, 1):
        found = meter(Probe(Site(layer), (12, 36)))
        expected = [loss_of_pruned(mine, {Site(layer).key: width}, tmp_path / "r") for width in (12, 36)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_the_bias_of_a_repair_comes_to_the_one_that_is_there(
    make_model: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    task: LossTask,
    tmp_path: Path,
) -> None:
    dense = make_model(tmp_path / "model", "llama", mlp_bias=True)
    context = make_context(run_config(tmp_path, model={"path": str(dense)}))
    prune(context, until="analyse")
    job, folder = context.job, context.job.folder / "round-00"
    mine = replace(
        task,
        model_dir=job.model_dir,
        tokens_path=job.calibration_path,
        recording=places.recorded(folder),
        folder=folder,
        repair="bias",
    )
    expected = loss_of_pruned(mine, {Site(1).key: 12}, tmp_path / "r")
    assert CurveMeter(mine)(Probe(Site(1), (12,)))[0] == pytest.approx(expected, rel=1e-5)


def test_a_plan_is_the_loss_of_the_pruned_model(task: LossTask, tmp_path: Path) -> None:
    widths = {"layer-000.mlp": 20, "layer-001.mlp": 40}
    meter = PlanMeter(task)
    whole = meter(Trial("dense", ()))
    found = meter(trial("both", widths))
    assert found[0] == pytest.approx(loss_of_pruned(task, widths, tmp_path / "r"), rel=1e-5)
    assert found != whole
    assert meter(Trial("dense", ())) == whole, "the model was left pruned"
    tokens_ST = np.load(task.tokens_path)[HELD_OUT.start : HELD_OUT.stop]
    dense = checkpoint.load_model(task.model_dir, task.numerics)
    assert whole[0] == pytest.approx(mean_loss(dense, tokens_ST, 2), rel=1e-6)


def test_the_order_of_the_sites_does_not_matter(task: LossTask) -> None:
    probes = [Probe(Site(layer), (16, 32)) for layer in (0, 1)]
    forth, back = CurveMeter(task), CurveMeter(task)
    assert [forth(probe) for probe in probes] == [back(probe) for probe in reversed(probes)][::-1]


def test_layers_before_the_site_are_run_once(task: LossTask) -> None:
    meter, ran = CurveMeter(task), list[int]()
    for index, layer in enumerate(meter._tail.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    for layer in (0, 1):
        meter(Probe(Site(layer), (12, 24, 36)))
    batches = 2
    assert ran.count(0) == batches * (3 + 1), "three widths of layer 0, and once on the way to layer 1"
    assert ran.count(1) == batches * (3 + 3)


def test_results_are_read_back_only_where_they_fit(task: LossTask, tmp_path: Path) -> None:
    probe = Probe(Site(0), (12, 24))
    found = CurveMeter(task)(probe)
    assert read_losses(task.folder, probe, task.digest) == found
    assert read_losses(task.folder, probe, "another") is None
    assert read_losses(task.folder, Probe(Site(0), (12, 28)), task.digest) is None
    path = task.folder / FOLDER / "layer-000.mlp.json"
    elsewhere = replace(task, folder=tmp_path / "runs" / "other" / "round-00")
    assert adopt(elsewhere, task.folder.parents[1], probe)
    assert read_losses(elsewhere.folder, probe, task.digest) == found
    assert not adopt(replace(elsewhere, digest="another"), task.folder.parents[1], probe)
    path.write_text("{torn")
    assert read_losses(task.folder, probe, task.digest) is None


def test_a_loss_that_is_not_finite_names_the_site(task: LossTask, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = CurveMeter(task)
    monkeypatch.setattr(meter, "_loss", lambda: float("nan"))
    with pytest.raises(NumericError, match=r"layer-001\.mlp is \[nan\]"):
        meter(Probe(Site(1), (12,)))
