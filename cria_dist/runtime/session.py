"""One Ray session: a private local cluster behind a token, or the cluster the job runs on."""

import atexit
import functools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread per worker: sums are then added in the same order for any number of workers
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "AUTO,STRICT",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
LET_IN = (
    "give the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token), or set "
    "RAY_AUTH_MODE=disabled for one that asks for none"
)
OBJECT_STORE_BYTES = 128 << 20  # bulk data goes through files; 78 MiB is Ray's minimum


@contextmanager
def ray_session(config: RunConfig) -> Generator[int]:
    """Connect to Ray, yield the number of workers to use, and disconnect.

    Inside ``ray job submit`` (or with ``run.address``) the surrounding cluster is used. Otherwise a private cluster is
    started: it listens on loopback, and asks for a fresh token that is in a file only this user can read.

    Raises:
        ConfigError: the cluster cannot be reached, does not let this process in, or has no CPU for a worker.
    """
    address = config.run.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _start_private(config)
    else:
        _join(address, config)
    try:
        yield _workers(config)
    finally:
        ray.shutdown()


@functools.cache
def _provide_token() -> None:
    """A fresh token in a file only this user can read, for the life of this process (Ray reads it once)."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="cria-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _start_private(config: RunConfig) -> None:
    _provide_token()
    cpus = max(machine.cpus(), config.run.workers, config.training_workers)  # room for all that are asked for
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=True,  # Train's placement-group cleaner asks the State API, which lives there
        dashboard_host="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": worker_environment(config)},
    )


def _join(address: str, config: RunConfig) -> None:
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": worker_environment(config)},
        )
    except AuthenticationError as error:
        raise ConfigError(f"no token for the Ray cluster at {address!r}, or not its own; {LET_IN}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Ray says nothing else of a cluster that it asked for 20 s with the wrong token
        raise ConfigError(
            f"no Ray cluster at {address!r} that answers this process ({error}); start one or leave run.address out; "
            f"where one runs, {LET_IN}"
        ) from error


def worker_environment(config: RunConfig) -> dict[str, str]:
    """What workers find in their environment; those that are to have no GPU see none, for Ray would show them all."""
    return {**WORKER_ENVIRONMENT, **({"CUDA_VISIBLE_DEVICES": ""} if config.run.gpus_per_worker == 0 else {})}


def gpus_per_worker(config: RunConfig) -> float:
    """GPUs of each worker: what the run wants, else one where the cluster has any.

    Raises:
        ConfigError: it has none, and the teacher of a recovery is to have some of its own.
    """
    if config.run.gpus_per_worker is not None:
        return config.run.gpus_per_worker
    if ray.cluster_resources().get("GPU", 0):
        return 1.0
    if config.recover.gpus_per_worker > 1:
        raise ConfigError(
            f"recover.teacher_gpus={config.recover.teacher_gpus} and the Ray cluster has no GPU; set it to 0, or "
            "run.gpus_per_worker=1 where the cluster grows"
        )
    return 0.0


def grows(config: RunConfig) -> bool:
    """Whether what the cluster holds now is no measure of what the run may ask for."""
    return bool(config.run.gpus_per_worker)


def _workers(config: RunConfig) -> int:
    """Workers asked for, else as many as the GPUs are enough for, else one per CPU."""
    resources, gpus = ray.cluster_resources(), gpus_per_worker(config)
    if grows(config) and config.run.workers:
        return config.run.workers
    available = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 0))
    if gpus and not available:
        raise ConfigError(
            f"run.gpus_per_worker={gpus:g} and the Ray cluster has no GPU yet; set run.workers to how many workers it "
            "may grow to"
        )
    if not available:
        raise ConfigError("the Ray cluster has no CPU to run workers on; start it with --num-cpus")
    return config.run.workers or available
