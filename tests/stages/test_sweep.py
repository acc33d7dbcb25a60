"""A grid as a list of ordinary runs: every combination, checked before anything starts."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cria_dist import config_file
from cria_dist.errors import ConfigError
from cria_dist.stages import sweep as stages_sweep
from cria_dist.stages.prepare import run_folder
from cria_dist.stages.sweep import plan

BASE = 'name = "s"\nmodel = { path = "builtin:smollm2-135m" }\nrun = { root = "ROOT" }\n'


OPTUNA = "[sweep]\nsearch = 'optuna'\n"
ASHA = "[sweep]\nscheduler = 'asha'\n[sweep.grid]\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """``write(toml_of_the_sweep)``: a configuration file; returns its path."""

    def make(text: str) -> str:
        path = tmp_path / "sweep.toml"
        path.write_text(BASE.replace("ROOT", str(tmp_path / "runs")) + text)
        return str(path)

    return make


def test_every_combination_is_a_run_that_its_command_gives(write: Callable[[str], str]) -> None:
    path = write(
        "[sweep]\nconcurrency = 3\n[sweep.grid]\nprune.ratio = [0.2, 0.3]\nprune.allocation = ['uniform', 'global']\n"
        "method = [{ name = 'cria', preset = 'paper' }, { name = 'random' }]\n"
    )
    sweep = plan(path, ["seed=5"])
    assert sweep.concurrency == 3
    assert len(sweep.trials) == len({trial.folder for trial in sweep.trials}) == 8
    assert sweep.trials[0].label == (
        'prune.ratio=0.2 prune.allocation=uniform method={name = "cria", preset = "paper"}'
    )
    for trial in sweep.trials:
        cria, verb, config, *overrides = shlex.split(trial.command)
        assert (cria, verb, config) == ("cria", "prune", path)
        assert run_folder(config_file.load(config, overrides)) == trial.folder
        assert trial.config.seed == 5
    assert {(t.config.prune.ratio, t.config.prune.allocation, t.config.method.name) for t in sweep.trials} == {
        (ratio, allocation, name)
        for ratio in (0.2, 0.3)
        for allocation in ("uniform", "global")
        for name in ("cria", "random")
    }


def test_a_grid_on_the_command_line(write: Callable[[str], str]) -> None:
    sweep = plan(write(""), ["sweep.grid.prune.ratio=[0.1, 0.2, 0.3]", "sweep.concurrency=2"])
    assert [trial.config.prune.ratio for trial in sweep.trials] == [0.1, 0.2, 0.3]
    assert sweep.concurrency == 2


def test_scores_are_shared_by_trials_that_differ_after_scoring(write: Callable[[str], str]) -> None:
    grid = "[sweep.grid]\nprune.ratio = [0.2, 0.3]\nrecover.steps = [0, 10]\nmethod.name = ['random', 'magnitude']\n"
    assert len({trial.score_key for trial in plan(write(grid)).trials}) == 2
    assert len({trial.score_key for trial in plan(write("[sweep.grid]\nseed = [0, 1]\n")).trials}) == 2
    units = "[sweep.grid]\nprune.units = [['mlp'], ['attention'], ['residual']]\nprune.ratio = [0.2, 0.3]\n"
    assert len({trial.score_key for trial in plan(write(f"method.name = 'activation'\n{units}")).trials}) == 3


def test_the_folder_is_named_by_the_trials(write: Callable[[str], str]) -> None:
    one = plan(write("[sweep.grid]\nprune.ratio = [0.2, 0.3]\n"))
    same = plan(write("[sweep]\nconcurrency = 2\ngrid = { prune = { ratio = [0.2, 0.3] } }\n"))
    other = plan(write("[sweep.grid]\nprune.ratio = [0.2, 0.4]\n"))
    assert one.folder == same.folder != other.folder
    assert one.folder.parent == one.trials[0].folder.parent


def test_other_verbs_take_the_same_file(write: Callable[[str], str]) -> None:
    path = write("[sweep.grid]\nprune.ratio = [0.2, 0.3]\n")
    assert config_file.load(path).result_part() == config_file.load(write("")).result_part()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no grid; add a table \[sweep.grid\]"),
        ("[sweep.grid]\nprune.ratio = 0.2\n", r"sweep.grid.prune.ratio is not a list of values"),
        ("[sweep.grid]\nprune.ratio = []\n", r"sweep.grid.prune.ratio is not a list of values"),
        ("[sweep.grid]\nrun.workers = [1, 2]\n", r"sweep.grid.run.workers changes no result"),
        ("[sweep.grid]\nprune.ratio = [0.2, 2.0]\n", r"^trial 'prune.ratio=2.0': prune.ratio=2.0: .* less than 1"),
        ("[sweep.grid]\nprune.ration = [0.2]\n", r"^trial 'prune.ration=0.2': unknown key 'prune.ration'"),
        ("[sweep.grid]\nprune.ratio = [0.2, 0.2]\n", r"'prune.ratio=0.2' and 'prune.ratio=0.2' are the same run"),
        (
            "[sweep]\nconcurrenzy = 2\n",
            r"^unknown key 'sweep.concurrenzy'; known keys here: concurrency, grace_steps, grid, reduction_factor, ",
        ),
        ("[sweep]\nconcurrency = 0\n", r"^sweep.concurrency=0: "),
        (OPTUNA, r"sweep.search='optuna' and sweep.space go together"),
        ("[sweep.space]\nseed = [1, 2]\n", r"sweep.search='optuna' and sweep.space go together"),
        (OPTUNA + "[sweep.space]\nseed = 1\n", r"sweep.space.seed is not a list of values; write seed = \[first"),
        (
            OPTUNA + "[sweep.space]\nrun.workers = [1]\n",
            r"run.workers changes no result; set run.workers outside of the space",
        ),
        (
            OPTUNA + "[sweep.space]\nprune.ratio = [0.1, 0.2]\n",
            r"would compare models of different sizes, .*; put it into sweep.grid",
        ),
        (
            OPTUNA + "[sweep.space]\nprune = [{ ratio = 0.1 }, { ratio = 0.5 }]\n",
            r"sweep.space.prune would compare models",
        ),
        (OPTUNA + "[sweep.space]\n'model.path' = ['a', 'b']\n", r"sweep.space.model.path would compare models"),
        (OPTUNA + "[sweep.space]\ndata.test.source = ['a', 'b']\n", r"source would compare .* by different texts"),
        (
            OPTUNA + "[sweep.space]\nprune.units = [['mlp'], ['attention']]\n",
            r"^sweep.space.prune.units with prune.ratio=0.2 of the units .* set prune.budget=parameters",
        ),
        ("[sweep.grid]\nname = [2024-01-01]\n", r"^sweep: datetime.date\(2024, 1, 1\) is a date, .* quote it"),
        (OPTUNA + "[sweep.space]\nseed = { min = 3, max = 1 }\n", r"a range has min below max"),
        (OPTUNA + "[sweep.space]\nseed = { min = 0, max = 9, log = true }\n", r"min above 0 where log is true"),
        (
            OPTUNA + "[sweep.grid]\nseed = [1]\n[sweep.space]\nseed = [1, 2]\n",
            r"seed is in sweep.grid and in sweep.space",
        ),
        (
            OPTUNA + "[sweep.space]\nprune.multiple = { min = -1, max = 4 }\n",
            r"^trial 'prune.multiple=-1': prune.multiple=-1: ",
        ),
        (
            ASHA + "recover.learning_rate = [1e-4, 1e-3]\n",
            r"^trial 'recover.learning_rate=0.0001': .* and recover.patience=0 holds none out; set recover.patience=3",
        ),
        (
            ASHA + "recover.patience = [2, 3]\nrecover.steps = [40]\n",
            r"sweep.grace_steps=50 is first looked at after 50 of recover.steps=40, .* lower it, or recover.check",
        ),
        (
            ASHA + "recover.patience = [2, 3]\nrecover.steps = [2000]\n",
            r"sweep.grace_steps=50 ends while the learning rate still rises, .* raise it to 200",
        ),
        (ASHA + "recover.patience = [2]\nprune.ratio = [0.2, 0.3]\n", r"no two trials agree in them; set sweep.sched"),
        (ASHA + "recover.steps = [0]\n", r"no two trials agree in them"),
        (ASHA.replace("asha", "median") + "seed = [1]\n", r"sweep.scheduler=\"median\": "),
        (
            OPTUNA + "scheduler = 'asha'\n[sweep.space]\nrecover.patience = { min = 0, max = 3 }\n",
            r"^trial 'recover.patience=0': .* set recover.patience=3",
        ),
    ],
)
def test_what_cannot_be_a_sweep_is_said(write: Callable[[str], str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(write(text))


SPACE = (
    "[sweep]\nsearch = 'optuna'\ntrials = 5\n[sweep.grid]\nprune.ratio = [0.2, 0.3]\n[sweep.space]\n"
    "recover.learning_rate = { min = 1e-5, max = 1e-3, log = true }\n"
    "method = [{ name = 'wanda' }, { name = 'random' }]\n"
)


def test_a_search_of_its_own_for_every_combination_of_the_grid(write: Callable[[str], str]) -> None:
    path = write(SPACE)
    sweep = plan(path, ["seed=5"])
    assert (sweep.count, [search.point for search in sweep.searches]) == (
        10,
        [("prune.ratio=0.2",), ("prune.ratio=0.3",)],
    )
    assert [trial.config.prune.ratio for trial in sweep.trials] == [0.2, 0.3]
    trial = sweep.searches[1].trial({"recover.learning_rate": 1.2345678901234567e-05, "method": {"name": "random"}})
    config, *overrides = shlex.split(trial.command)[2:]
    assert run_folder(config_file.load(config, overrides)) == trial.folder
    assert trial.config.recover.learning_rate == 1.2345678901234567e-05
    assert (trial.config.seed, trial.config.prune.ratio, trial.config.method.name) == (5, 0.3, "random")
    assert plan(path, ["seed=5", "sweep.trials=6"]).folder != sweep.folder == plan(path, ["seed=5"]).folder


def test_a_search_goes_on_with_the_file_as_it_was_when_it_began(write: Callable[[str], str]) -> None:
    path = write(SPACE)
    [search, _] = plan(path).searches
    values = {"recover.learning_rate": 1e-4, "method": {"name": "random"}}
    before = search.trial(values)
    write(SPACE + "[data]\ncalibration_sequences = 192\n")
    assert search.trial(values) == before
    Path(path).unlink()
    assert search.trial(values) == before


def test_times_are_measured_for_all_that_a_search_may_choose(write: Callable[[str], str]) -> None:
    latency = ["prune.budget=latency", "prune.allocation=sensitivity"]
    space = "'prune.multiple' = [1, 4]\n'prune.units' = [['mlp'], ['mlp', 'attention']]\n'prune.ridge' = [1e-4, 1e-3]\n"
    path = write(f"{OPTUNA}[sweep.space]\n{space}")
    timed = plan(path, latency).timed
    assert {(one.config.prune.multiple, one.config.prune.units, one.config.prune.ridge) for one in timed} == {
        (multiple, units, 1e-4) for multiple in (1, 4) for units in (("mlp",), ("mlp", "attention"))
    }
    assert len(timed) == 4
    assert plan(path, ["prune.budget=parameters"]).timed == ()
    path = write(f"{OPTUNA}[sweep.space]\n'prune.multiple' = {{ min = 1, max = 4 }}\n")
    assert plan(path).timed == ()
    with pytest.raises(ConfigError, match=r"sweep\.space\.prune\.multiple is a range, .* give a list of values"):
        plan(path, latency)


def test_where_trials_are_compared_and_that_they_are_names_the_folder(write: Callable[[str], str]) -> None:
    grid = "recover.learning_rate = [1e-4, 1e-3]\nprune.ratio = [0.2, 0.3]\nrecover.patience = [2]\n"
    quiet, sweep = plan(write("[sweep.grid]\n" + grid)), plan(write(ASHA + grid))
    assert [quiet.race(trial) for trial in quiet.trials] == [None] * 4
    races = [sweep.race(trial) for trial in sweep.trials]
    assert [race and race.name for race in races] == [trial.folder.name for trial in quiet.trials]
    folders = [race.folder for race in races if race]
    assert folders[0] == folders[2] != folders[1] == folders[3]
    assert folders[0].parent == sweep.folder / "rungs"
    assert {(race.grace, race.factor) for race in races if race} == {(50, 3)}
    other = plan(write(ASHA + grid), ["sweep.reduction_factor=2"])
    assert len({quiet.folder, sweep.folder, other.folder}) == 3


def test_a_search_needs_optuna(write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_sweep, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cria-dist\[sweep\]'"):
        plan(write(SPACE))


def test_one_run_folder_for_many_runs_is_refused(write: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=r"run.folder='x' is one folder and a sweep is many runs"):
        plan(write("[sweep.grid]\nprune.ratio = [0.2]\n"), ["run.folder=x"])


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        3,
        True,
        "plain",
        "true",
        "0.5",
        'with "quotes" and \\',
        [1, "a"],
        {"name": "cria", "deep": {"a": [1]}},
        "a=b",
    ],
)
def test_an_override_says_the_value_it_was_made_of(value: Any) -> None:
    key, _, text = config_file.as_override("k", value).partition("=")
    assert key == "k"
    assert config_file._value(text) == value
    assert type(config_file._value(text)) is type(value)
