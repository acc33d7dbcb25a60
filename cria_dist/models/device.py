"""Where this process computes."""

import torch


def own_device() -> torch.device:
    """This process's GPU, by number, or the CPU.

    The number matters: ``cuda`` alone is the current device of the thread that asks, which is GPU 0 in every thread but
    the one that was told, and ``transformers`` loads weights in threads. Ray Train shows all GPUs of a node to each of
    its workers.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
