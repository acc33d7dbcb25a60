"""Where processes of one node meet to form a torch process group: at a file, and on the loopback interface.

``env://`` and ``tcp://`` open a port on every interface that asks nobody who they are; a file opens none.
"""

import atexit
import os
import shutil
import tempfile
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_torch

TorchBackend = ray_torch._TorchBackend  # pyright: ignore[reportPrivateUsage]  (no public one can be told of a file)
set_environment = ray_torch._set_torch_distributed_env_vars  # pyright: ignore[reportPrivateUsage]  (the same)
set_up_group = ray_torch._setup_torch_process_group  # pyright: ignore[reportPrivateUsage]  (the same)


def new_place() -> str:
    """URL of a file to meet at, in a folder on this node that only this user can enter."""
    folder = tempfile.mkdtemp(prefix="cria-meeting-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"file://{folder}/store"


def stay_on_loopback() -> None:
    """Let gloo and NCCL of this process listen where only this machine reaches them."""
    interfaces = psutil.net_if_addrs()
    loopback = next(name for name, ours in interfaces.items() if any(one.address == "127.0.0.1" for one in ours))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


class FileMeeting(TorchConfig):
    """Ray Train's torch workers meet at a file where one node holds them all; else as Ray Train has it, on a port."""

    @property
    def backend_cls(self) -> type[TorchBackend]:
        """What sets up the workers."""
        return _FileMeetingBackend


class _FileMeetingBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(_node))) > 1:
            super().on_start(worker_group, backend_config)
            return
        place = worker_group.execute_single(0, new_place)
        worker_group.execute(stay_on_loopback)
        worker_group.execute(set_environment)
        has_gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    set_up_group,
                    backend="nccl" if has_gpu else "gloo",
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=place,
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


def _node() -> str:
    return ray.get_runtime_context().get_node_id()
