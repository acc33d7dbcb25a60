"""What runs of a whole pipeline share."""

import pytest

from cria_dist.pipeline import results


@pytest.fixture
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not loaded in a process of their own, which takes seconds and has tests of its own."""
    monkeypatch.setattr(results, "verify_exports", lambda *_: {})
