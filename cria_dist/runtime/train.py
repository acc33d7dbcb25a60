"""Training on Ray Train: data-parallel workers around :func:`cria_dist.stages.training.carry_out`."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cria_dist.errors import ConfigError, CriaError, WorkerError
from cria_dist.runtime.train_backend import FileMeeting
from cria_dist.stages import training
from cria_dist.stages.recover import Checkpoint, Place, RecoverTask
from cria_dist.stages.training import TrainTask, stage_of

MAX_WORKER_FAILURES = 3
START_ATTEMPTS = 3
PATIENT_ATTEMPTS = 30
"""Of a minute each, which a cluster has to start nodes in."""


@dataclass(frozen=True, slots=True)
class RayTrainer:
    """Carries out recoveries, and the learning of gates.

    Attributes:
        workers: data-parallel workers.
        use_gpu: one GPU per worker, and those that a recovery's teacher has to itself.
        waits: for a cluster that grows on demand; else one that is too small is an error.
    """

    workers: int
    use_gpu: bool
    waits: bool = False

    def __call__(self, task: TrainTask, name: str, storage: Path) -> None:
        """Train to the end; the same name and storage continue from the last checkpoint.

        Raises:
            ConfigError: the cluster has fewer CPUs or GPUs than the workers need.
            WorkerError: training failed, or lost its workers too often.
        """
        each = task.config.gpus_per_worker if isinstance(task, RecoverTask) else 1
        self.check_room(each)
        trainer = ray.train.torch.TorchTrainer(
            _train_worker,
            train_loop_config={"task": task},
            torch_config=FileMeeting(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.workers, use_gpu=self.use_gpu, resources_per_worker=self._resources(each)
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(storage.absolute()),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                failure_config=ray.train.FailureConfig(
                    max_failures=MAX_WORKER_FAILURES,
                    # -1, the default, waits for resources for ever
                    controller_failure_limit=PATIENT_ATTEMPTS if self.waits else START_ATTEMPTS,
                ),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            reasons = {str(one): one for one in error.worker_failures.values()}
            known = next((one for one in reasons.values() if isinstance(one, CriaError)), None)
            raise WorkerError(stage_of(task), str(known) if known else " / ".join(reasons)) from error
        except ControllerError as error:
            raise WorkerError(stage_of(task), f"Ray Train gave up: {error}") from error

    def check_room(self, gpus_each: int) -> None:
        """Every worker must find its GPUs, or its CPU, on one node; Ray Train would try for minutes.

        Raises:
            ConfigError: they do not, and the cluster does not grow.
        """
        ((kind, wanted),) = self._resources(gpus_each).items()
        nodes = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
        if self.waits or sum(there // wanted for there in nodes) >= self.workers:
            return
        many = f" of {wanted} GPUs each (recover.teacher_gpus={wanted - 1})" if wanted > 1 else ""
        raise ConfigError(
            f"recover.workers={self.workers}{many} but the cluster has {sum(nodes)} {kind}s; lower recover.workers"
        )

    def _resources(self, gpus_each: int) -> dict[str, int]:
        """What Ray is asked for, for every worker; all of it is on one node."""
        return {"GPU": gpus_each} if self.use_gpu else {"CPU": 1}


def _train_worker(config: dict[str, TrainTask]) -> None:
    """The loop of one training worker."""
    ours = ray.train.get_context()
    place = Place(ours.get_world_rank(), ours.get_world_size(), _spare_gpus())
    resume = ray.train.get_checkpoint()
    if resume is None:
        training.carry_out(config["task"], place, None, _reporter(place))
        return
    with resume.as_directory() as folder:
        training.carry_out(config["task"], place, Path(folder), _reporter(place))


def _spare_gpus() -> tuple[int, ...]:
    """Numbers of this worker's GPUs but for the first, on which it trains; other workers' are visible to it, too."""
    return tuple(device.index for device in ray.train.torch.get_devices()[1:])


def _reporter(place: Place) -> Checkpoint:
    def report(step: int, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder) if place.rank == 0 else None
            ray.train.report({"step": step}, checkpoint=checkpoint)

    return report
