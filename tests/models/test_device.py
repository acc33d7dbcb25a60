"""The device of this process is named by its number, for threads that were not told which it is."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.models import checkpoint
from cria_dist.models.device import own_device


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it to a worker that was given GPU 1 of those it sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == torch.device("cpu")


@pytest.mark.usefixtures("second_gpu")
def test_weights_go_to_this_process_s_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``transformers`` loads them in threads, in each of which the current device is GPU 0."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(checkpoint, "from_pretrained", lambda _, **settings: asked.update(settings))
    checkpoint.load_model(tmp_path, checkpoint.Numerics())
    assert asked["device_map"] == {"": torch.device("cuda", 1)}


@pytest.mark.gpu
def test_on_gpus_weights_lie_where_this_thread_computes(pico: Path) -> None:
    """Of several GPUs, also on another than the first."""
    for number in range(torch.cuda.device_count()):
        with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(number,)) as worker:
            model = worker.submit(checkpoint.load_model, pico, checkpoint.Numerics()).result()
        assert {tensor.device.index for tensor in model.state_dict().values()} == {number}
