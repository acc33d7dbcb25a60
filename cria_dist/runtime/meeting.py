"""Where processes of one node meet to form a torch process group: at a file, and on the loopback interface.

``env://`` and ``tcp://`` open a port on every interface that asks nobody who they are; a file opens none.
"""

import atexit
import os
import shutil
import tempfile

import psutil


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
