"""The loss log of a recovery: what a crash tore is left out."""

import json
from pathlib import Path

import pytest

from cria_dist.errors import DataError
from cria_dist.stages.recover_log import following, read_log


def line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss, "seconds": 1.0})


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "loss.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_text(f"{line(1, 3.0)}\n{line(2, 2.0)}\n{line(3, 1.0)[:-cut]}")
    assert [(one["step"], one["loss"]) for one in read_log(path)] == [(1, 3.0), (2, 2.0)]


@pytest.mark.parametrize("garbage", [b"\x80\x81\xff", b"[1, 2]", b"7", b'{"loss": 1.0}', b'{"step": "3"}'])
def test_a_line_of_something_else_is_named(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_bytes(b"\n".join([line(1, 3.0).encode(), garbage, line(2, 2.0).encode()]))
    with pytest.raises(DataError, match=r"loss\.jsonl, line 2, is not of a loss log \(.*\); delete the line"):
        read_log(path)


def test_of_a_step_logged_twice_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_text(
        "".join(f"{line(step, loss)}\n" for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.5)])
    )
    assert [(one["step"], one["loss"]) for one in read_log(path)] == [(1, 3.0), (2, 2.5), (3, 1.5)]


def test_following_reports_the_steps_others_log(tmp_path: Path) -> None:
    path, seen = tmp_path / "loss.jsonl", list[tuple[int, int]]()
    with following(path, lambda steps, tokens: seen.append((steps, tokens)), tokens_per_step=64):
        path.write_text("".join(f"{line(step, 1.0)}\n" for step in (1, 2, 3)))
    assert sum(steps for steps, _ in seen) == 3
    assert sum(tokens for _, tokens in seen) == 3 * 64
