"""What a run has yet to write must fit on the volume of its folder."""

from cria_dist import files
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.stages.estimate import RECORDED, bytes_of_run
from cria_dist.stages.footprint import in_units
from cria_dist.stages.job import Job
from cria_dist.store import places

PLACES = {
    "inputs": ("tokens", "sentences", "images"),
    "signals": ("round-*/activations",),
    "moments": ("round-*/moments",),
    "boundaries": ("round-*/boundaries",),
    "repair": ("round-*/repair", "comparison/*/repair"),
    "checkpoints": ("pruned", "recovered", "compressed", "round-*/pruned", "round-*/masks", "comparison/*/masks"),
    "recovery_state": ("recover",),
}
"""Where below the run folder the parts of :func:`bytes_of_run` lie."""


def check_disk(job: Job) -> None:
    """There must be room for what is not there yet; a neighbour's recording of the same digest comes as hard links.

    Raises:
        ConfigError: there is not.
    """
    left, free = _yet_to_write(job), files.free_bytes(job.folder)
    needed = sum(left.values())
    if needed > free and _is_recorded(job):
        needed -= sum(left[name] for name in RECORDED)
    if needed > free:
        raise ConfigError(
            f"the run needs {in_units(needed)} below {job.folder} and {in_units(free)} are free; lower "
            "record.tokens, raise record.shard_sequences, or set run.root to a larger volume"
        )


def _yet_to_write(job: Job) -> dict[str, int]:
    """Bytes of every part that are not in the run folder; none of a part that no later stage needs."""
    folder, parts = job.folder, bytes_of_run(job.config, job.model_config, job.family, job.dense_parameters)
    done = set[str]()
    if job.config.record.storage is not None or checkpoint.is_complete(folder / "pruned"):
        done.update(RECORDED)
    if checkpoint.is_complete(folder / "recovered"):
        done.add("recovery_state")
    if (folder / "report.json").is_file():
        done.update(parts)
    there = {
        name: sum(files.bytes_below(path) for pattern in PLACES[name] for path in folder.glob(pattern))
        for name in parts.keys() - done
    }
    return {name: max(0, size - there[name]) if name in there else 0 for name, size in parts.items()}


def _is_recorded(job: Job) -> bool:
    """Whether this run or a neighbour has all there is to record: later rounds record other models."""
    digest = job.recording_digest(job.digests["model"])
    return job.config.prune.rounds == 1 and places.is_recorded(job.folder.parent, digest)
