"""A plan carried out again: the base model and ``plan.json`` give the pruned checkpoint, bit for bit.

Where output weights were solved anew (repair) or single weights set to zero (masks), those tensors are needed too: they
are in the run's folder, and are found from the plan's place in it.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cria_dist import files
from cria_dist.errors import ConfigError, DataError, PlanError
from cria_dist.models import checkpoint, location
from cria_dist.models.depth import within_layers
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.records import PruningPlan

FOLDERS = ("repair", "masks")
"""Where a round of a run keeps the tensors that a plan is applied with."""


def apply_plan(plan_path: Path, base: str, target: Path, replaced: Path | None = None) -> str:
    """Write the checkpoint that a plan makes of its base model; it appears when it is whole.

    Args:
        plan_path: ``plan.json`` of a pruned checkpoint, in the numbering of the base model.
        base: the base model, as ``model.path``.
        target: new folder.
        replaced: folder of tensors that replace those of the base model; None looks in the run the plan lies in.

    Returns:
        A sentence on what was written.

    Raises:
        ConfigError: the target is there already or cannot be written, or there is no such plan or model.
        PlanError: the plan is of another model, or the tensors are of another plan.
        DataError: replacement tensors are missing or damaged.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; give a new folder, checkpoints are not overwritten")
    plan, directory = read_plan(plan_path), location.locate(base, None)
    config = checkpoint.read_config(directory)
    there = checkpoint.count_parameters(config)
    if there != plan.parameters[0]:
        raise PlanError(f"the plan is of a model with {plan.parameters[0]:,} parameters, {base} has {there:,}")
    folder = replaced or replaced_beside(plan_path)
    _check_same_base(directory, [plan_path, *([folder] if folder else [])])
    if folder is not None:
        _check_same_plan(folder, plan)
    biased = folder is not None and _has_biases(folder, plan)
    temporary = target.with_name(f".{target.name}.tmp.{os.getpid()}")
    try:
        write_pruned(directory, temporary, Surgery(family_of(config), config, plan.kept, folder, biased))
        shutil.copyfile(plan_path, temporary / checkpoint.PLAN)
        temporary.rename(target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with_what = f"tensors of {folder}" if folder else "no replaced tensors"
    return f"{target}: {plan.method}, {plan.parameters[1]:,} of {plan.parameters[0]:,} parameters, with {with_what}"


def read_plan(path: Path) -> PruningPlan:
    """A plan from its file.

    Raises:
        ConfigError: there is none.
        DataError: it is damaged or of another version.
    """
    try:
        return PruningPlan.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the plan.json of a checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run the command that wrote it, or take a copy") from error


def replaced_beside(plan_path: Path) -> Path | None:
    """Folder of the tensors that the last round of the run was applied with.

    None when the plan lies in no run, or the run replaced none.
    """
    last = sorted(plan_path.absolute().parent.parent.glob("round-*"))[-1:]
    return next((one / name for one in last for name in FOLDERS if (one / name).is_dir()), None)


def _check_same_base(directory: Path, made_in_run: Sequence[Path]) -> None:
    """A plan, and tensors solved with it, are of the weights that their run read; away from it, nothing says which."""
    for path in made_in_run:
        run = path.absolute().parent.parent / "config.json"
        made_of = files.read_json(run).get("digests", {}).get("model") if run.is_file() else None
        if made_of not in (None, checkpoint.fingerprint(directory)):
            raise PlanError(
                f"{path} was made of other weights than {directory} has ({run} has their fingerprint); give the model "
                "of that run, or run again with this one"
            )


def _check_same_plan(folder: Path, plan: PruningPlan) -> None:
    """A round keeps the tensors beside the plan they were made for; a folder that was moved away says nothing of it."""
    beside = folder.absolute().parent / checkpoint.PLAN
    if beside.is_file() and replace(read_plan(beside), digest=plan.digest) != plan:
        raise PlanError(f"{folder} is of another plan ({beside}); give the folder of the run that made this one")


def _has_biases(folder: Path, plan: PruningPlan) -> bool:
    """Whether the replaced tensors are biases; checks that there are tensors for every site.

    Raises:
        DataError: one is missing or damaged, or they were made for several plans.
    """
    names: set[str] = set()
    digests: set[str] = set()
    sites = [key for key, kept in within_layers(plan.kept).items() if kept]
    for key in sites:
        try:
            with safe_open(folder / f"{key}.safetensors", framework="pt") as handle:
                names |= set(handle.keys())
                digests.add((handle.metadata() or {}).get("digest", ""))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder} has no whole tensors of {key} ({error}); give the folder of the run") from error
    if len(digests) > 1:
        raise DataError(f"the tensors in {folder} were made for {len(digests)} plans; give the folder of the run")
    return any(name.endswith(".bias") for name in names)
