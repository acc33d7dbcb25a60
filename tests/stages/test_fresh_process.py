"""A process of its own: its complaint, and what is no complaint about what it was asked."""

import sys

import pytest

from cria_dist.stages import fresh_process
from cria_dist.stages.fresh_process import NoAnswerError, complaint


def run(script: str) -> str:
    return complaint([sys.executable, "-I", "-S", "-c", script], {"SPOKEN": "a word"})


def test_the_last_line_of_a_failure_is_its_complaint() -> None:
    assert run("print('well')") == ""
    assert run("import os; raise ValueError(os.environ['SPOKEN'])") == "ValueError: a word"
    assert run("import os; os._exit(3)") == "it ended with 3"
    assert run("import os; os.abort()") == "it ended with -6"


def test_what_is_ended_from_outside_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoAnswerError, match="was killed, as the system does where memory is short"):
        run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(fresh_process, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(NoAnswerError, match="no answer within 0 s"):
        run("import time; time.sleep(60)")
