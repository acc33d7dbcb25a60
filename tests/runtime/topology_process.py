"""A whole run over three nodes with made-up GPUs that loses a node while recording, analysing and recovering.

    python topology_process.py CONFIG.toml

A process of its own: Ray is connected to one cluster per process, and the other tests have theirs.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {  # a lost node is noticed in eight seconds and not in twenty
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}

from cria_dist import config_file
from cria_dist.pipeline import Context, prune
from cria_dist.report.progress import Progress
from cria_dist.runtime.pool import RayPool
from cria_dist.runtime.session import WORKER_ENVIRONMENT, _provide_token
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.analyse import Analyst
from cria_dist.stages.prepare import prepare
from cria_dist.stages.record import Recorder

import ray  # isort: skip
from ray.cluster_utils import Cluster  # isort: skip

SIZE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20}
ENOUGH_STEPS = 25


class Nodes:
    """Three nodes; one that is lost is replaced."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "object_store_memory": 80 << 20}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self.cluster.add_node(**SIZE) for _ in range(3)]
        self.lost: list[str] = []

    def lose(self, why: str, node_id: str | None = None) -> None:
        """End a node at once, then start another."""
        node = next(one for one in self._nodes if node_id in (None, one.node_id))
        self._nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.lost.append(why)
        self._nodes.append(self.cluster.add_node(**SIZE))


class OneFirst:
    """A worker that does the first of all items at once and the others only after a node is lost."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], marks: Path) -> None:
        self._worker, self._marks = make_worker(), marks

    def __call__(self, item: Any) -> Any:
        try:
            (self._marks / "first").touch(exist_ok=False)
        except FileExistsError:
            deadline = time.monotonic() + 120
            while not (self._marks / "lost").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        return self._worker(item)


class Shrinking(RayPool):
    """A pool that loses a node after the first item of recording and of analysing, every worker having one in hand."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        super().__init__(3, 1.0)
        self._nodes, self._folder = nodes, folder

    def map(self, make_worker: Any, items: Any, workers: Any = None, flow: Any = None) -> Iterator[Any]:
        stage = getattr(make_worker, "func", None)
        if stage not in (Recorder, Analyst):
            yield from super().map(make_worker, items, workers, flow)
            return
        marks = self._folder / stage.__name__
        marks.mkdir()
        answers = super().map(lambda: OneFirst(make_worker, marks), items, workers, flow)
        for number, one in enumerate(answers):
            if number == 0:
                self._nodes.lose(stage.__name__)
                (marks / "lost").touch()
            yield one


class Trainer:
    """Two training workers, of which one is lost with its node."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def __call__(self, task: Any, name: str, storage: Path) -> None:
        thread = threading.Thread(target=self._lose_one, args=(task.log_path,), daemon=True)
        thread.start()
        RayTrainer(2, use_gpu=False)(task, name, storage)
        thread.join()

    def _lose_one(self, log_path: Path) -> None:
        while not log_path.is_file() or len(log_path.read_text().splitlines()) < ENOUGH_STEPS:
            time.sleep(0.005)
        actors = ray._private.state.actors().values()
        where = [one["Address"]["NodeID"] for one in actors if "TrainWorker" in one["ActorClassName"]]
        self._nodes.lose("training", where[-1])


def main(path: str) -> None:
    """Run up to the recovered checkpoint; prints what was lost."""
    config = config_file.load(path)
    job = prepare(config)
    _provide_token()
    nodes = Nodes()
    environment = {**WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(address=nodes.cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    pool = Shrinking(nodes, job.folder)
    prune(Context(job, pool, Trainer(nodes), Progress(job.folder)), until="recover")
    ray.shutdown()
    nodes.cluster.shutdown()
    sys.stdout.write(json.dumps({"lost": nodes.lost, "folder": str(job.folder)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
