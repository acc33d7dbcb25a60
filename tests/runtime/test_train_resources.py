"""What training workers ask Ray for: a GPU each, and those that a recovery's teacher has to itself, on one node."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import ScalingConfig

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError
from cria_dist.runtime import train
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.recover import RecoverTask


def task(**settings: Any) -> RecoverTask:
    here = Path()
    return RecoverTask(here, here, here, here, RecoverConfig.model_validate(settings), "highest", 0)


@pytest.mark.parametrize(
    ("asked", "use_gpu", "expected"),
    [
        (task(), False, {"CPU": 1}),
        (task(), True, {"GPU": 1}),
        (task(teacher="cpu"), True, {"GPU": 1}),
        (task(teacher_gpus=2), True, {"GPU": 3}),
        (task(teacher_gpus=2, distill=0, distill_hidden=0.1), True, {"GPU": 3}),
        (task(teacher_gpus=2, distill=0), True, {"GPU": 1}),
    ],
)
def test_gpus_of_a_worker(asked: RecoverTask, use_gpu: bool, expected: dict[str, int]) -> None:
    each = RayTrainer(2, use_gpu)._resources(asked.config.gpus_per_worker)
    assert each == expected
    assert ScalingConfig(num_workers=2, use_gpu=use_gpu, resources_per_worker=each).num_gpus_per_worker == expected.get(
        "GPU", 0
    )


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], task(teacher_gpus=2), None),
        (
            [{"CPU": 8, "GPU": 2}] * 3,
            task(teacher_gpus=2),
            r"recover\.workers=2 of 3 GPUs each .*_gpus=2.* has 6",
        ),
        ([{"CPU": 8, "GPU": 1}], task(), r"recover\.workers=2 but the cluster has 1 GPUs; lower recover\.workers"),
        ([{"CPU": 8, "GPU": 2}], task(), None),
    ],
)
def test_a_worker_needs_its_gpus_on_one_node(
    nodes: list[dict[str, int]], asked: RecoverTask, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [{"Alive": True, "Resources": one} for one in nodes] + [{"Alive": False, "Resources": {"GPU": 9}}]
    monkeypatch.setattr(train.ray, "nodes", lambda: there)
    each = asked.config.gpus_per_worker
    RayTrainer(2, use_gpu=True, waits=True).check_room(each)
    if message is None:
        RayTrainer(2, use_gpu=True).check_room(each)
        return
    with pytest.raises(ConfigError, match=message):
        RayTrainer(2, use_gpu=True).check_room(each)


def test_all_but_the_first_gpu_are_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, spare in ((["cpu"], ()), (["cuda:3"], ()), (["cuda:3", "cuda:4", "cuda:5"], (4, 5))):
        monkeypatch.setattr(train.ray.train.torch, "get_devices", lambda names=names: [torch.device(n) for n in names])
        assert train._spare_gpus() == spare
