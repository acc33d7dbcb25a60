"""What the numbers were computed with: package versions and the machine in words."""

import importlib.metadata
import os
import platform

from cria_dist.machine import cpus

PACKAGES = (
    "cria-dist", "torch", "transformers", "ray", "numpy", "scipy", "pyarrow", "safetensors", "datasets", "pydantic",
)  # fmt: skip


def machine_and_versions() -> dict[str, str]:
    """Versions of the packages that shape a result, and the machine in words."""
    versions = {"python": platform.python_version(), "machine": _machine()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpus()} CPU cores, {memory:.0f} GiB, {platform.machine()}, {platform.system()}"
