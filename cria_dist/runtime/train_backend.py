"""How Ray Train's workers form their torch process group: at a file where one node holds them all."""

from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_torch

from cria_dist.runtime import meeting

TorchBackend = ray_torch._TorchBackend  # pyright: ignore[reportPrivateUsage]  (no public one can be told of a file)
set_environment = ray_torch._set_torch_distributed_env_vars  # pyright: ignore[reportPrivateUsage]  (the same)
set_up_group = ray_torch._setup_torch_process_group  # pyright: ignore[reportPrivateUsage]  (the same)


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
        place = worker_group.execute_single(0, meeting.new_place)
        worker_group.execute(meeting.stay_on_loopback)
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
