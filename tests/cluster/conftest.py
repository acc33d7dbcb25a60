"""Where the files for clusters are, and what versions they must agree with."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def ray_version() -> str:
    """The version of Ray that is pinned."""
    found = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture(scope="session")
def package_version() -> str:
    """The version of this package."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
