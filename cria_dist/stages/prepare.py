"""Everything that can be checked before the first worker starts, and the facts all stages share."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, PlanError
from cria_dist.maths.allocation import uniform_widths, units_ratio_for_parameters
from cria_dist.models import checkpoint
from cria_dist.models.family import GatedMlpFamily, family_of
from cria_dist.records import Site
from cria_dist.stages.corpus import load_tokens
from cria_dist.stages.estimate import bytes_of_run
from cria_dist.stages.token_files import TokenFiles, digests_of
from cria_dist.store import places

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked run: what is pruned, on what, into which folder.

    Attributes:
        config: the configuration.
        folder: the run folder.
        model_dir: dense checkpoint.
        model_config: its config.json.
        family: its adapter.
        widths: units per site.
        dense_parameters: parameters of the dense model, tied weights once.
        digests: of the model, the calibration tokens and the test tokens.
    """

    config: RunConfig
    folder: Path
    model_dir: Path
    model_config: Mapping[str, Any]
    family: GatedMlpFamily
    widths: Mapping[Site, int]
    dense_parameters: int
    digests: Mapping[str, str]

    @property
    def numerics(self) -> checkpoint.Numerics:
        """How models compute in this run."""
        return checkpoint.Numerics(self.config.model.dtype, self.config.model.matmul)

    @property
    def calibration_path(self) -> Path:
        """Calibration tokens, int32 [sequences, length]."""
        return self.folder / "tokens" / "calibration.npy"

    @property
    def test_path(self) -> Path:
        """Test tokens, int32 [sequences, length]."""
        return self.folder / "tokens" / "test.npy"

    def added_parameters(self, kept: Mapping[str, tuple[int, ...]]) -> int:
        """Parameters the repair adds to the model: biases where it has none."""
        if self.config.prune.repair != "bias":
            return 0
        return sum(self.family.output_bias_cost(self.model_config, len(units)) for units in kept.values())

    @property
    def final_widths(self) -> dict[str, int]:
        """Units per site key after the last round."""
        return final_widths(self.config, self.family, self.model_config, self.dense_parameters)


def prepare(config: RunConfig) -> Job:
    """Check the whole configuration against model, text, disk and run folder; write the tokens.

    Raises:
        ConfigError: what is asked for cannot be done.
        DataError: a corpus is missing or too short.
        PlanError: the ratio would empty a layer.
    """
    folder = run_folder(config)
    model_dir = checkpoint.locate(config.model.path, config.model.revision)
    model_config = checkpoint.read_config(model_dir)
    family = family_of(model_config)
    dense_parameters = checkpoint.count_parameters(model_config)
    kept = final_widths(config, family, model_config, dense_parameters)
    family.narrowed(model_config, kept, config.prune.repair == "bias")
    _check_methods(config, family.widths(model_config), kept)
    _check_sampling(config)
    places.check(config.record.storage)
    _check_disk(config, model_config, family, folder, dense_parameters)
    tokenizer = checkpoint.load_tokenizer(model_dir)
    store = TokenFiles(folder / "tokens", config.data, model_dir)
    digests = store.digests()
    tokens = None if digests else load_tokens(config.data, tokenizer)
    digests = {"model": checkpoint.fingerprint(model_dir), **(digests_of(tokens) if tokens else digests)}
    _claim(folder, config, digests)
    if tokens:
        store.write(tokens)
    return Job(config, folder, model_dir, model_config, family, family.widths(model_config), dense_parameters, digests)


def run_folder(config: RunConfig) -> Path:
    """The folder of a run: named by the configuration's results, not by how many workers compute them."""
    if config.run.folder is not None:
        return Path(config.run.folder).absolute()
    name = files.safe_name(f"{config.name}-{files.digest(config.result_part())[:8]}")
    return Path(config.run.root).absolute() / name


def final_widths(
    config: RunConfig, family: GatedMlpFamily, model_config: Mapping[str, Any], dense_parameters: int
) -> dict[str, int]:
    """Units per site key that the budget leaves.

    Raises:
        PlanError: the budget would empty a site.
    """
    widths = {site.key: width for site, width in family.widths(model_config).items()}
    ratio = config.prune.ratio
    if config.prune.budget == "parameters":
        cost = dict.fromkeys(widths, family.unit_cost(model_config))
        ratio = units_ratio_for_parameters(widths, cost, dense_parameters, ratio)
    kept = uniform_widths(widths, ratio, config.prune.multiple)
    for key, width in widths.items():
        if kept[key] == width:
            raise PlanError(f"prune.ratio={config.prune.ratio:g} removes nothing at {key} ({width} units); raise it")
    return kept


def _check_methods(config: RunConfig, widths: Mapping[Site, int], kept: Mapping[str, int]) -> None:
    """Every site must be large enough for every method, in the last round too."""
    scored = kept if config.prune.rounds > 1 else {site.key: width for site, width in widths.items()}
    for method in (config.method, *config.compare):
        for key, width in scored.items():
            if width < method.smallest_site:
                raise ConfigError(
                    f"{method.title} needs at least {method.smallest_site} units and {key} has {width}; "
                    "lower method.neighbours"
                )


def _check_sampling(config: RunConfig) -> None:
    data, record = config.data, config.record
    available = data.calibration_sequences * (data.sequence_length - 1)
    if record.tokens > available:
        raise ConfigError(
            f"record.tokens={record.tokens} is more than the {available} tokens of {data.calibration_sequences} "
            f"calibration sequences without their first; lower it or raise data.calibration_sequences"
        )


def _check_disk(
    config: RunConfig, model_config: Mapping[str, Any], family: GatedMlpFamily, folder: Path, parameters: int
) -> None:
    needed = sum(bytes_of_run(config, model_config, family, parameters).values())
    free = files.free_bytes(folder)
    if needed > free:
        raise ConfigError(
            f"the run needs {needed / 1e9:.1f} GB below {folder} and {free / 1e9:.1f} GB are free; lower "
            "record.tokens, raise record.shard_sequences, or set run.root to a larger volume"
        )


def _claim(folder: Path, config: RunConfig, digests: Mapping[str, str]) -> None:
    """Write config.json, or check that the folder is this run's."""
    path = folder / "config.json"
    record = {"config": config.result_part(), "digests": dict(digests)}
    if not path.is_file():
        foreign = sorted(entry.name for entry in folder.glob("[!.]*"))
        if foreign:
            raise ConfigError(f"{folder} holds {foreign[0]!r} but no config.json of a run; choose another run.folder")
        try:
            files.write_json(path, record)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written ({error.strerror}); choose another run.root or run.folder"
            ) from error
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
