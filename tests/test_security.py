"""What comes from elsewhere is data: pickles are not loaded, names do not lead out of a folder, no code is fetched."""

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.errors import ConfigError, CriaError
from cria_dist.files import safe_name
from cria_dist.models import checkpoint
from cria_dist.pipeline import prune

REPOSITORY = Path(__file__).parents[1]
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def poison(path: Path, mark: Path) -> None:
    """Put a pickle where the file is, in the form in which its reader could meet one."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
        np.savez(path, **{name: np.array([Canary(mark)], dtype=object) for name in names})
    elif path.suffix == ".npy":
        with path.open("wb") as handle:
            np.save(handle, np.array([Canary(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Canary(mark)))


def test_the_canary_sings(tmp_path: Path) -> None:
    path = tmp_path / "array.npz"
    np.savez(path, one=np.zeros(3))
    poison(path, tmp_path / "mark")
    with np.load(path, allow_pickle=True) as arrays:
        _ = arrays["one"]
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors", ".json"])
def test_a_pickle_in_the_run_folder_is_never_loaded(
    suffix: str, finished_run: Any, make_context: Callable[..., Any], tmp_path: Path
) -> None:
    run = finished_run.copy(tmp_path)
    mark = tmp_path / "mark"
    poisoned = [path for path in run.folder.rglob(f"*{suffix}") if path.is_file()]
    for path in poisoned:
        content = path.with_name(f"{path.name}.new")
        shutil.copyfile(path, content)  # the run's files are hard links, other tests' too
        content.replace(path)
        poison(path, mark)
    assert poisoned
    with suppress(CriaError):  # computed again, or named: both will do
        prune(make_context(run.config))
    assert not mark.exists()


def test_weights_are_safetensors_or_nothing(
    finished_run: Any, make_context: Callable[..., Any], tmp_path: Path
) -> None:
    run = finished_run.copy(tmp_path)
    mark = tmp_path / "mark"
    for name in ("pruned", "recovered"):
        (run.folder / name / checkpoint.WEIGHTS).unlink()
        for planted in ("pytorch_model.bin", "model.pt", "optimizer.pt"):
            poison(run.folder / name / planted, mark)
    prune(make_context(run.config))
    assert (run.folder / "pruned" / checkpoint.WEIGHTS).is_file()
    assert not mark.exists()


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in the sources: (file, call, name)."""
    for path in [*(REPOSITORY / "cria_dist").rglob("*.py"), *(REPOSITORY / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def test_the_sources_load_no_pickle_and_run_no_code_of_models() -> None:
    found: list[str] = []
    for path, call, name in calls():
        given = {one.arg: ast.unparse(one.value) for one in call.keywords}
        place = f"{path.relative_to(REPOSITORY)}:{call.lineno} {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{place} without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"{place} with allow_pickle")
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"{place} trusts remote code")
        if name.split(".")[0] in PICKLERS:
            found.append(place)
    assert found == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a b", "-x", "a..b", "x" * 200, "\u202ex"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot become a file name"):
        safe_name(name)


@pytest.mark.parametrize("file", ["../escaped.safetensors", "/tmp/escaped.safetensors", "a\0b.safetensors"])
def test_a_checkpoint_whose_index_names_files_elsewhere_is_refused(pico: Path, tmp_path: Path, file: str) -> None:
    """Pruned weights are written under the names of the dense ones: the name would choose what is overwritten."""
    model = Path(shutil.copytree(pico, tmp_path / "model" / "inner"))
    (model / checkpoint.WEIGHTS).rename(model.parent / "escaped.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
    (model / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="cannot become a file name"):
        checkpoint.weight_files(model)


def test_what_workers_are_told_is_no_secret() -> None:
    """``runtime_env`` is shown in the dashboard and kept in the job's metadata."""
    from cria_dist.runtime.session import WORKER_ENVIRONMENT  # ray

    assert not [name for name in WORKER_ENVIRONMENT if re.search(r"TOKEN$|SECRET|PASSWORD|KEY|CREDENTIAL", name)]
