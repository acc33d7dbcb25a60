"""A cluster of several nodes on this machine, for trying out what a real one does.

    python cluster/local.py [--nodes 3] [--cpus 1] [--gpus 0]

Prints what to type in another terminal, and runs until Ctrl-C. The nodes are processes of their own; they listen on
loopback only, and do nothing without the token. GPUs are only counted: --gpus makes some up. Remove a node by
ending its raylet to see a run survive it.
"""

import argparse
import os
import secrets
import signal
import socket
import sys
import tempfile
from pathlib import Path

OBJECT_STORE_BYTES = 80 << 20


def main() -> None:
    """Start the nodes, say how to use them, wait, end them."""
    parser = argparse.ArgumentParser(description="A cluster of several nodes on this machine.")
    parser.add_argument("--nodes", type=int, default=3, help="nodes besides the head, which has no CPUs")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each, made up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cria-cluster-") as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before the file
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # nodes are 127.0.0.1, and listen there
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs say `python`
        from ray.cluster_utils import Cluster  # reads the environment when it is imported

        size = {"object_store_memory": OBJECT_STORE_BYTES}
        dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": _free_port()}
        head = {"num_cpus": 0, **dashboard, **size}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(options.nodes):
                cluster.add_node(num_cpus=options.cpus, num_gpus=options.gpus, **size)
            _explain(cluster.head_node.webui_url, token)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        finally:
            cluster.shutdown()


def _free_port() -> int:
    """Not Ray's 8265, which another cluster may have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _explain(dashboard: str, token: Path) -> None:
    sys.stdout.write(
        f"export RAY_AUTH_TOKEN_PATH={token}\n"
        f"export RAY_API_SERVER_ADDRESS=http://{dashboard}\n"
        f"cria submit prune jobs/configs/demo.toml run.root={Path('runs').absolute()}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
