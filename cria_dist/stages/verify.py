"""Verify: a fresh process loads the checkpoint and computes the same logits.

It cannot import this package, unless the layers differ in width: no stock class loads that, ``load_pruned`` does.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from safetensors.torch import save_file

import cria_dist
from cria_dist import files
from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.models.mlp import layers_differ
from cria_dist.stages import loaders
from cria_dist.stages.answers import Answer, answer_of_variant, bytes_to_compare, usable_bytes
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.footprint import in_units
from cria_dist.stages.fresh_process import NoAnswerError, complaint

TOLERANCE = 1e-5

LOADERS = {
    "stock": """
import sys
sys.modules["cria_dist"] = None  # any import of it raises
import transformers
def load(directory):
    stock = getattr(transformers, "{stock}")
    return stock.from_pretrained(directory, dtype="float32", local_files_only=True)
""",
    "ours": """
import sys
from cria_dist import load_pruned
def load(directory):
    return load_pruned(directory, dtype="float32")
""",
}
"""How the fresh process loads: as anybody does, or what no stock class loads."""
STRANGER = """
import torch
from safetensors.torch import load_file, save_file
directory, inputs, target = sys.argv[1:]
model = load(directory).eval()
with torch.inference_mode():
    logits = model(**load_file(inputs)).logits
save_file({"logits": logits}, target)
"""
FINDINGS = {
    "stock": "loaded in a fresh process without this package, logits equal",
    "ours": "the layers differ in width, which stock from_pretrained refuses; loaded in a fresh process by "
    "cria_dist.load_pruned, logits equal",
}
"""What the report says, before the largest difference."""


def loads_in_transformers(directory: Path, expected: Answer) -> str:
    """Compare the logits of a fresh process with those of the model in memory.

    Args:
        directory: checkpoint to load.
        expected: what the same model, built another way, makes of some inputs.

    Returns:
        A sentence for the report; where the process came to no end, that.

    Raises:
        DataError: the checkpoint does not load, or its logits differ.
    """
    config = checkpoint.read_config(directory)
    kind = "ours" if layers_differ(config) else "stock"
    ours = expected.logits
    with tempfile.TemporaryDirectory() as folder:
        given, logits = Path(folder) / "inputs.safetensors", Path(folder) / "logits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in expected.inputs.items()}, given)
        loader = LOADERS[kind].replace("{stock}", checkpoint.stock_class(config).__name__)
        command = [sys.executable, "-c", loader + STRANGER, str(directory), str(given), str(logits)]
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": _python_path()}
        try:
            reason = complaint(command, environment)
        except NoAnswerError as error:
            return f"not tried to the end: {error}"
        if reason:
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


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint and what it must equal.

    Attributes:
        directory: the checkpoint.
        reference: the dense model pruned in memory where that is the same model, else the checkpoint loaded here.
        record: where the findings are kept.
        final: what the run ends with, which other programs are asked about too.
    """

    directory: Path
    reference: Variant
    record: Path
    final: bool

    def __str__(self) -> str:
        """Name of the work item."""
        return f"load {self.directory.name} in a fresh process"


class Verifier:
    """Runs the check in a worker, so that the coordinator never holds a model."""

    def __init__(self, tokens_path: Path, vllm_python: str | None = None) -> None:
        self._tokens_path = tokens_path
        self._vllm_python = vllm_python

    def __call__(self, export: Export) -> str:
        """Check one checkpoint and keep the finding.

        Raises:
            DataError: the checkpoint does not load, or computes something else.
        """
        needed, usable = bytes_to_compare(export.directory, export.reference), usable_bytes()
        expected = answer_of_variant(export.reference, self._tokens_path) if needed <= usable else None
        if expected is None:
            finding = f"not tried: needs {in_units(needed)} of main memory, {in_units(usable)} are free"
        else:
            finding = loads_in_transformers(export.directory, expected)
        others: dict[str, str] = {}
        if export.final:
            others = loaders.verdicts(export.directory, expected, self._vllm_python)
        files.write_json(export.record, {"finding": finding, "others": others})
        return finding
