"""Several workers on one GPU. Ray only counts GPUs, so one that does not exist serves the test."""

import subprocess
import sys
from pathlib import Path

import pytest

from cria_dist.runtime.crew import Shape

SCRIPT = """
import sys, time
from pathlib import Path

from cria_dist.pool import Flow
from cria_dist.runtime.pool import RayPool  # sets the authentication mode before ray is imported
import ray

folder, sharing = Path(sys.argv[1]), int(sys.argv[2])


def meets():
    def work(item):
        (folder / item).touch()
        deadline = time.monotonic() + 20
        while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return len(list(folder.iterdir())), ray.get_runtime_context().get_accelerator_ids()["GPU"]

    return work


ray.init(address="local", num_cpus=1, num_gpus=1, log_to_driver=False, object_store_memory=80 << 20)
pool = RayPool(1, 1.0)
print(sorted(found for _, found in pool.map(meets, ["a", "b"], flow=Flow(sharing=sharing))))
pool.release()
ray.shutdown()
"""


@pytest.mark.ray
def test_two_workers_meet_on_one_gpu(tmp_path: Path) -> None:
    """On one CPU too: an actor with a part of a GPU takes the same part of a CPU."""
    (tmp_path / "marks").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "marks"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(2, ['0']), (2, ['0'])]"


def test_a_part_of_a_gpu_takes_the_same_part_of_a_cpu() -> None:
    assert Shape(1, 0.25).bundle == {"CPU": 0.25, "GPU": 0.25}
    assert Shape(1, 1.0).bundle == {"CPU": 1.0, "GPU": 1.0}
    assert Shape(1, 0.0).bundle == {"CPU": 1.0}
