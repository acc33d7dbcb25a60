"""Analysis of a site: the statistics a method gets, and what becomes of its verdict."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist.errors import DataError, NumericError
from cria_dist.methods import Conditional, Cria, Magnitude, Random, SiteStatistics, Verdict
from cria_dist.models import checkpoint
from cria_dist.models.blocks import partition
from cria_dist.records import Moments, Site
from cria_dist.stages import analyse
from cria_dist.stages.analyse import AnalyseTask, Analyst
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.store.recording import Recording
from cria_dist.store.site_scores import has_scores, read_scores
from cria_dist.store.storage import LocalStorage

SITE = Site(1)


@pytest.fixture(scope="module")
def recording(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("recording")
    tokens_ST = np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32)
    np.save(folder / "tokens.npy", tokens_ST)
    made = Recording(LocalStorage(folder), "digest")
    numerics = checkpoint.Numerics()
    recorder = Recorder(RecordTask(made, pico, folder / "tokens.npy", numerics, "float32", 4, 4, 120, 0))
    for shard in range(2):
        recorder(ShardWork(shard, *partition(2, 1)))
    made.write_manifest([Site(0), Site(1)], 2)
    return made


MakeTask = Callable[..., AnalyseTask]


@pytest.fixture
def make_task(recording: Recording, pico: Path, tmp_path: Path) -> MakeTask:
    def make(method: Any = None, **changes: Any) -> AnalyseTask:
        return replace(AnalyseTask(recording, pico, method or Cria(), tmp_path / "out", "d1", 0), **changes)

    return make


@dataclass
class Spy:
    """A method that asks for everything and keeps what it got."""

    wanted: tuple[str, ...] = ("signals", "moments", "weights")
    broken: str = ""
    seen: list[SiteStatistics] = field(default_factory=list)

    @property
    def title(self) -> str:
        return "spy"

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset(self.wanted)

    def score(self, statistics: SiteStatistics) -> Verdict:
        self.seen.append(statistics)
        if self.broken == "raises":
            raise NumericError("all neurons are alike")
        size = statistics.width - (self.broken == "too few")
        return Verdict(np.full(size, np.nan if self.broken == "nan" else 0.0))


def test_a_method_gets_what_it_asks_for(make_task: MakeTask, recording: Recording, pico: Path) -> None:
    spy = Spy()
    Analyst(make_task(spy))(SITE)
    (seen,) = spy.seen
    signals = recording.signals(SITE)
    assert np.array_equal(seen.input_NM, np.concatenate([signals["gate"], signals["up"]], axis=1))
    assert np.array_equal(seen.output_NM, signals["output"])
    assert seen.width == 48
    assert np.array_equal(seen.moments.gram_NN, recording.moments(SITE).gram_NN)
    weights = load_file(pico / checkpoint.WEIGHTS)
    gate, up, down = (weights[f"model.layers.1.mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
    incoming_N = torch.cat([gate, up], dim=1).norm(dim=1).numpy()
    assert np.allclose(seen.output_norm_N, down.norm(dim=0).numpy())
    assert np.allclose(seen.weight_norm_N, incoming_N * down.norm(dim=0).numpy())


def test_a_method_gets_nothing_else(make_task: MakeTask) -> None:
    spy = Spy(wanted=())
    Analyst(make_task(spy))(SITE)
    (seen,) = spy.seen
    assert [seen.input_NM, seen.output_NM, seen.moments, seen.weight_norm_N, seen.output_norm_N] == [None] * 5


def test_seeds_differ_by_site_and_run_and_nothing_else(make_task: MakeTask) -> None:
    spy = Spy(wanted=())
    for seed in (0, 1, 0):
        for site in (Site(0), Site(1)):
            Analyst(make_task(spy, seed=seed))(site)
    seeds = [statistics.seed for statistics in spy.seen]
    assert seeds[:2] == seeds[4:]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("method", [Cria(), Cria(preset="recommended"), Random(), Magnitude()], ids=lambda m: m.title)
def test_every_method_scores_a_site(method: Any, make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(method)
    assert Analyst(task)(SITE) == SITE.key
    assert has_scores(task.folder, SITE, "d1")
    scores = read_scores(task.folder, SITE)
    assert scores.keep_N.shape == (48,)
    assert len(set(scores.keep_N.tolist())) > 24
    assert scores.cost_N.tolist() == [3 * 32] * 48
    other = replace(task, folder=tmp_path / "again")
    Analyst(other)(SITE)
    name = f"scores/{SITE.key}.npz"
    assert (task.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_cria_leaves_its_spectrum(make_task: MakeTask) -> None:
    task = make_task(Cria())
    Analyst(task)(SITE)
    spectrum = read_scores(task.folder, SITE).spectrum
    assert spectrum is not None
    assert (np.diff(spectrum.values_K) <= 0).all()
    assert spectrum.residual < 1e-6


@pytest.mark.parametrize(
    ("broken", "message"), [("nan", "or NaN"), ("too few", r"shape \(47,\)"), ("raises", "all neurons are alike")]
)
def test_a_broken_verdict_names_the_site(broken: str, message: str, make_task: MakeTask) -> None:
    task = make_task(Spy(broken=broken))
    with pytest.raises(NumericError, match=rf"layer-001\.mlp: .*{message}"):
        Analyst(task)(SITE)
    assert not has_scores(task.folder, SITE, "d1")


def test_too_many_neighbours_name_the_site_and_the_remedy(make_task: MakeTask) -> None:
    with pytest.raises(NumericError, match=r"layer-001\.mlp: .*lower method\.neighbours"):
        Analyst(make_task(Cria(neighbours=100)))(SITE)


def test_a_recording_that_is_gone_is_an_error(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Analyst(make_task(Cria(), recording=Recording(LocalStorage(tmp_path / "gone"), "x")))(SITE)


def test_as_many_analysts_on_a_gpu_as_its_memory_holds() -> None:
    needs = Cria().needs
    one = analyse.analyst_bytes(needs, 8192, 11008, 4096)
    assert one == 6 * 4 * 8192 * 11008  # no dense matrix: the spectrum of so many neurons is estimated
    assert analyse.analyst_bytes(needs, 8192, 4096, 4096) == 6 * 4 * 8192 * 4096 + 4 * 8 * 4096**2
    assert [analyse.analysts_per_device(one, share * one // 2) for share in (1, 2, 5, 100)] == [1, 1, 2, 4]
    assert analyse.analysts_per_device(analyse.analyst_bytes(Random().needs, 8192, 11008, 4096), 10**9) == 4
    gram = 8 * 28672**2
    for width, hidden, memory, fits in ((28672, 8192, 80e9, 1), (11008, 4096, 24e9, 3), (11008, 4096, 80e9, 4)):
        size = analyse.analyst_bytes(Conditional().needs, 4096, width, hidden)
        assert analyse.analysts_per_device(size, int(0.9 * memory)) == fits
    assert 5 * gram < analyse.analyst_bytes(Conditional().needs, 4096, 28672, 8192) < 8 * gram


def test_without_gpus_as_many_analysts_as_the_machine_holds() -> None:
    assert [analyse.analysts_at_a_time(10, available, 8) for available in (0, 4, 5, 10, 99)] == [1, 3, 4, 8, 8]
    assert analyse.analysts_at_a_time(0, 0, 8) == 1


@pytest.mark.parametrize("hidden", [64, 800])
def test_the_memory_of_an_analyst_of_moments_is_foreseen(hidden: int) -> None:
    width, rng = 800, np.random.default_rng(0)
    signals_TN = rng.standard_normal((width, width))
    tracemalloc.start()
    moments = Moments(width, signals_TN.sum(axis=0), signals_TN.T @ signals_TN)
    Conditional().score(SiteStatistics(width, moments=moments, output_DN=rng.standard_normal((hidden, width))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    foreseen = analyse.analyst_bytes(Conditional().needs, 4096, width, hidden)
    assert peak < foreseen < 1.6 * peak
