"""With what the results are measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist import machine
from cria_dist.config import RunConfig
from cria_dist.pipeline import Context, results


def test_models_are_timed_with_the_threads_this_process_may_use(
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, threads = make_context(run_config(tmp_path)), list[int]()

    def shown(_: Context, stage: object, make: Any, *__: object, **___: object) -> dict[str, Any]:
        threads.append(make.args[0].threads)
        return {}

    monkeypatch.setattr(machine, "cpus", lambda: 3)
    monkeypatch.setattr(Context, "map", shown)
    monkeypatch.setattr(results.demonstrate, "summary", lambda _: {"times": {}, "texts": {}})
    assert results.demonstrate_variants(context, [], [])[0] == []
    assert threads == [3]
