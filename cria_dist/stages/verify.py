"""Verify: a fresh process loads the checkpoint and computes the same logits.

It cannot import this package, unless the layers differ in width: no stock class loads that, ``load_pruned`` does.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

import cria_dist
from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.models.mlp import LAYER_WIDTHS
from cria_dist.stages.evaluate import Variant

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 1800

LOADERS = {
    "stock": """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
from transformers import AutoModelForCausalLM
def load(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
""",
    "ours": """
import sys
from cria_dist import load_pruned
def load(directory, dtype):
    return load_pruned(directory, dtype=dtype)
""",
}
"""How the fresh process loads: as anybody does, or what no stock class loads."""
STRANGER = """
import numpy, torch
from safetensors.numpy import save_file
directory, tokens, dtype, target = sys.argv[1:]
model = load(directory, getattr(torch, dtype)).eval()
with torch.inference_mode():
    logits = model(input_ids=torch.from_numpy(numpy.load(tokens)).long()).logits
save_file({"logits": logits.float().numpy()}, target)
"""
FINDINGS = {
    "stock": "loaded in a fresh process without this package, logits equal",
    "ours": "the layers differ in width, which stock from_pretrained refuses; loaded in a fresh process by "
    "cria_dist.load_pruned, logits equal",
}
"""What the report says, before the largest difference."""


def loads_in_transformers(directory: Path, reference: torch.nn.Module, tokens_path: Path, dtype: str) -> str:
    """Compare the logits of a fresh process with those of the model in memory.

    Args:
        directory: checkpoint to load.
        reference: the same model, built another way.
        tokens_path: test tokens; the first 64 tokens of the first sequence are used.
        dtype: data type to compute in.

    Returns:
        A sentence for the report.

    Raises:
        DataError: the checkpoint does not load, or its logits differ.
    """
    kind = "ours" if LAYER_WIDTHS in checkpoint.read_config(directory) else "stock"
    tokens_1T = np.load(tokens_path, allow_pickle=False)[:1, :64]
    with torch.inference_mode():
        ours = (
            reference(input_ids=torch.from_numpy(tokens_1T).long().to(_device(reference))).logits.float().cpu().numpy()
        )
    with tempfile.TemporaryDirectory() as folder:
        tokens, logits = Path(folder) / "tokens.npy", Path(folder) / "logits.safetensors"
        np.save(tokens, tokens_1T, allow_pickle=False)
        command = [sys.executable, "-c", LOADERS[kind] + STRANGER, str(directory), str(tokens), dtype, str(logits)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": _python_path()}
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
        )
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{directory} does not load in transformers: {reason}")
        theirs = load_file(logits)["logits"]
    difference = float(np.abs(theirs - ours).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(ours).max()))
    if not difference <= allowed:
        raise DataError(f"{directory} loads in transformers, but its logits differ by {difference:.1e} from ours")
    return f"{FINDINGS[kind]} (largest difference {difference:.1e})"


def _python_path() -> str:
    """What this process has, after where this package lies: in a job it may be on nobody's path but ours."""
    home = Path(cria_dist.__file__).parents[1]
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint and what it must equal.

    Attributes:
        directory: the checkpoint.
        reference: the dense model pruned in memory where that is the same model, else the checkpoint loaded here.
        record: where the finding is kept.
    """

    directory: Path
    reference: Variant
    record: Path

    def __str__(self) -> str:
        """Name of the work item."""
        return f"load {self.directory.name} in a fresh process"


class Verifier:
    """Runs the check in a worker, so that the coordinator never holds a model."""

    def __init__(self, tokens_path: Path, dtype: str) -> None:
        self._tokens_path = tokens_path
        self._dtype = dtype

    def __call__(self, export: Export) -> str:
        """Check one checkpoint and keep the finding."""
        reference = export.reference.load(checkpoint.Numerics(self._dtype))
        finding = loads_in_transformers(export.directory, reference, self._tokens_path, self._dtype)
        files.write_json(export.record, {"finding": finding})
        return finding
