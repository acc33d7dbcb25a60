"""A plain copy or a surgery of a checkpoint in its own process: ``surgery_process.py copy|prune SOURCE TARGET``.

Run as a file, so that nothing is loaded that surgery does not need. Prints seconds, and resident memory at the start
and at its highest, as JSON.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch

from cria_dist import files
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned

KEPT_SHARE = 0.8


def copy(source: Path, target: Path) -> None:
    """Copy every file, and wait until it is on the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        files.sync(target / path.name)


def planned(source: Path) -> Surgery:
    """Keep a share of the MLP neurons of every layer, scattered; what the plan needs of transformers is loaded here."""
    config = checkpoint.read_config(source)
    family = family_of(config)
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, tuple[int, ...]] = {}
    for site, width in family.widths(config).items():
        chosen = torch.randperm(width, generator=generator)[: int(KEPT_SHARE * width)]
        kept[site.key] = tuple(sorted(chosen.tolist()))
    surgery = Surgery(family, config, kept)
    checkpoint.count_parameters(surgery.pruned_config())
    return surgery


def peak_bytes() -> int:
    """Highest resident memory of this process so far, mapped files included (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(verb: str, source: str, target: str) -> None:
    """Do it and print what it took."""
    surgery = planned(Path(source)) if verb == "prune" else None
    start, began = peak_bytes(), time.perf_counter()
    if surgery is None:
        copy(Path(source), Path(target))
    else:
        write_pruned(Path(source), Path(target), surgery)
    taken = {"seconds": time.perf_counter() - began, "start": start, "peak": peak_bytes()}
    sys.stdout.write(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])
