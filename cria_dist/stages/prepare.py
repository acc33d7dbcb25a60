"""Everything that can be checked before the first worker starts."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, location
from cria_dist.models.family import family_of
from cria_dist.records import Stage
from cria_dist.stages import cautions, checks
from cria_dist.stages.check_disk import check_disk
from cria_dist.stages.check_model import check_model
from cria_dist.stages.check_tensors import check_tensors
from cria_dist.stages.inputs import corpus_cuts
from cria_dist.stages.job import Job
from cria_dist.stages.loaders_vllm import python_with_vllm
from cria_dist.stages.token_files import Cut, InputFiles
from cria_dist.store import places

log = logging.getLogger(__name__)


def prepare(config: RunConfig, until: Stage = "evaluate") -> Job:
    """Check the whole configuration against model, corpus, disk and run folder; write the tokens or pixels.

    Args:
        config: the configuration.
        until: last stage that is wanted.

    Raises:
        ConfigError: what is asked for cannot be done.
        DataError: a corpus is missing or too short.
        PlanError: the ratio would empty a layer.
    """
    python_with_vllm(config.run.vllm_python)
    folder = run_folder(config)
    model_dir = location.locate(config.model.path, config.model.revision)
    model_config = checkpoint.read_config(model_dir)
    family = family_of(model_config)
    check_tensors(model_dir, family, model_config)
    dense_parameters = checkpoint.count_parameters(model_config)
    check_model(config, family, model_config, dense_parameters, until)
    cautions.warn_of_memory(config, dense_parameters, until)
    cautions.warn_of_recovery(config, family, model_config, dense_parameters, until)
    places.check(config.record.storage)
    digests = {"model": checkpoint.fingerprint(model_dir)}
    widths = family.widths(model_config, config.prune.parts)
    job = Job(config, folder, model_dir, model_config, family, widths, dense_parameters, digests)
    return replace(job, digests=_write_inputs(job))


def _write_inputs(job: Job) -> Mapping[str, str]:
    """Cut the corpus unless its files are there, make the run folder this run's, write; returns all digests."""
    store = InputFiles(job.folder, job.family.takes, job.config.data, job.model_dir)
    there = store.digests()
    checks.check_not_foreign(job.folder)
    with nullcontext({}) if there else _cuts(job) as cuts:
        digests = {**job.digests, **(there or store.name(cuts))}
        check_disk(replace(job, digests=digests))
        _claim(job.folder, job.config, digests)
        if cuts:
            store.write(cuts)
    return digests


@contextmanager
def _cuts(job: Job) -> Generator[Mapping[str, Cut]]:
    """The corpora as arrays, large ones in a hidden folder."""
    if job.family.takes == "images":
        with _explaining(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
    with corpus_cuts(job.folder, job.model_dir, job.model_config, job.family, job.config) as found:
        yield found


def run_folder(config: RunConfig) -> Path:
    """The folder of a run: named by the configuration's results, not by how many workers compute them."""
    if config.run.folder is not None:
        return Path(config.run.folder).expanduser().absolute()
    name = files.safe_name(f"{config.name}-{files.digest(config.result_part())[:8]}")
    return Path(config.run.root).expanduser().absolute() / name


@contextmanager
def _explaining(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); choose another run.root or run.folder"
        ) from error


def _claim(folder: Path, config: RunConfig, digests: Mapping[str, str]) -> None:
    """Write config.json, or check that it is this run's."""
    path = folder / "config.json"
    record = {"config": config.result_part(), "digests": dict(digests)}
    if not path.is_file():
        with _explaining(folder):
            files.write_json(path, record)
        return
    there = files.read_json(path)
    if there != record:
        different = sorted(_leaves(there) ^ _leaves(record))
        raise ConfigError(
            f"{folder} belongs to another configuration (different: {different[0].split('=')[0]}); "
            "choose another name or run.folder"
        )


def _leaves(tree: Any, path: str = "") -> set[str]:
    if isinstance(tree, dict):
        return set().union(*(_leaves(value, f"{path}.{key}" if path else key) for key, value in tree.items()))
    return {f"{path}={tree!r}"}
