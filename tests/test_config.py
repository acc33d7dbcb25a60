"""Reading a configuration: overrides, strictness, messages."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cria_dist.config import RunConfig
from cria_dist.config_file import load, parse
from cria_dist.errors import ConfigError
from cria_dist.methods import Cria, Magnitude

MINIMAL = '[model]\npath = "m"\n'


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f'name = "demo"\n{MINIMAL}[prune]\nratio = 0.3\n[method]\nname = "cria"\npreset = "recommended"\n')
    return path


def test_a_file_and_its_defaults(toml: Path) -> None:
    config = load(toml)
    assert (config.name, config.model.path, config.prune.ratio, config.prune.rounds) == ("demo", "m", 0.3, 1)
    assert isinstance(config.method, Cria)
    assert config.method.spectrum == "full"
    assert config.run.pool == "ray"


def test_overrides_take_the_type_of_the_value(toml: Path) -> None:
    config = load(
        toml,
        [
            "prune.ratio=0.5",
            "prune.rounds=3",
            "method.neighbour_guard=true",
            'compare=[{name="random"}, {name="magnitude"}]',
            'evaluate.prompts=["a=b", "c"]',
        ],
    )
    assert (config.prune.ratio, config.prune.rounds) == (0.5, 3)
    assert isinstance(config.method, Cria)
    assert config.method.neighbour_guard
    assert [method.name for method in config.compare] == ["random", "magnitude"]
    assert config.evaluate.prompts == ("a=b", "c")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("org/model", "org/model"),
        ("builtin:smollm2-135m", "builtin:smollm2-135m"),
        ("/a/b c", "/a/b c"),
        ('"quoted"', "quoted"),
        ("a=b", "a=b"),
        ("", ""),
        ("1234567", "1234567"),
        ("12e4567", "12e4567"),  # the number is infinite
        ("0x1f", "0x1f"),
        ("2026-01-01", "2026-01-01"),
        ("true", "true"),
    ],
)
def test_strings_need_no_quotes(text: str, value: str, toml: Path) -> None:
    assert load(toml, [f"model.path={text}"]).model.path == value


def test_digits_are_a_text_where_one_is_wanted(toml: Path) -> None:
    config = load(toml, ["model.revision=1234567", "model.revision=7654321", "run.folder=007", "seed=7", "name=2024"])
    assert (config.model.revision, config.run.folder, config.seed, config.name) == ("7654321", "007", 7, "2024")
    with pytest.raises(ConfigError, match=r"^model\.revision=\[7\]: .*string"):
        load(toml, ["model.revision=[7]"])
    with pytest.raises(ConfigError, match=r"^unknown key 'model\.path\.x'|'path' is a value"):
        load(toml, ["model.path.x=7"])


def test_an_override_can_make_a_section(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert load(tmp_path / "empty.toml", ["model.path=m", "run.folder=x"]).run.folder == "x"


def test_the_last_override_wins(toml: Path) -> None:
    assert load(toml, ["prune.ratio=0.5", "prune.ratio=0.6"]).prune.ratio == 0.6


def test_a_method_is_chosen_by_name(toml: Path) -> None:
    toml.write_text(MINIMAL)
    assert isinstance(load(toml, ["method.name=magnitude"]).method, Magnitude)


@pytest.mark.parametrize("override", ["prune.ratio", "=3", "", "prune"])
def test_an_override_needs_key_and_value(override: str, toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form dotted\.key=value"):
        load(toml, [override])


def test_an_override_cannot_go_below_a_value(toml: Path) -> None:
    with pytest.raises(ConfigError, match="'ratio' is a value, not a section"):
        load(toml, ["prune.ratio.x=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "prune.ration=0.3",
            r"unknown key 'prune\.ration'; known keys here: "
            "allocation, budget, floor, latency, multiple, protect, ratio, repair, ridge, rounds, units",
        ),
        ("sead=1", r"unknown key 'sead'; known keys here: compare, data, evaluate, method, .*, seed"),
        (
            "data.test.sauce=x",
            r"unknown key 'data\.test\.sauce'; known keys here: field, format, .*source, split, subset",
        ),
        ("method.neighbors=3", r"unknown key 'method\.neighbors'; known keys here: .*neighbours"),
        ("prune.ratio=1", r"^prune\.ratio=1: .*less than 1"),
        ("prune.ratio=20", r"^prune\.ratio=20: a share is greater than 0 and less than 1; write 0\.2 for 20 %$"),
        ("prune.ratio=a fifth", r'^prune\.ratio="a fifth": .*number'),
        ("prune.repair=best", r"prune\.repair=\"best\": .*'none', 'bias', 'least_squares' or 'sequential'"),
        ("record.tokens=4", r"record\.tokens=4: .*greater than or equal to 32"),
        ("method.neighbours=0", r"^method\.neighbours=0: .*greater than or equal to 1"),
        (
            "method.name=best",
            r"^method\.name: 'best' is not a method; there are: conditional, cria, random, magnitude, ",
        ),
        ("compare=wandb", r"^compare\.0\.name: 'wandb' is not a method; there are: conditional, "),
        ("seed=-1", r"^seed=-1: "),
        ("seed=20260101120000", r"^seed=20260101120000: "),
        ("recover.workers=3", r"recover\.batch_sequences=8 is not a multiple of recover\.workers=3; choose a multiple"),
        ("name=a/b", r'^name="a/b": a name starts with a letter or digit'),
        ("recover.learning_rate=inf", r"^recover\.learning_rate="),
        ("prune.ridge=inf", r"^prune\.ridge="),
        ("prune.protect=[0]", r"protect=\[0\] needs widths that differ.*set prune\.allocation=global or sensitivity"),
        ("prune.floor=1", r"^prune\.floor=1: .*less than 1; lower it"),
        ("prune.allocation=best", r"^prune\.allocation=\"best\": .*'uniform', 'global' or 'sensitivity'"),
        ("record.shard_sequences=-1", r"^record\.shard_sequences=-1: .*greater than or equal to 0; raise it"),
        ("record.shard_sequences=0.5", r"^record\.shard_sequences=0\.5: .*integer"),
        ("record.batch_sequences=0", r"^record\.batch_sequences=0: .*greater than or equal to 1; raise it"),
        ("record.dtype=float8", r"^record\.dtype=\"float8\": .*'auto', 'float32', 'float16' or 'bfloat16'"),
        ("record.schedule=fsdp", r"^record\.schedule=\"fsdp\": .*'replicate', 'sweep', 'pipeline' or 'tensor'"),
        ("record.memory_gb=0", r"^record\.memory_gb=0: .*greater than 0; raise it"),
        ("record.memory_gb=inf", r"^record\.memory_gb="),
        ("prune.units=mlp", r'^prune\.units="mlp": it is a list; write prune\.units=\["mlp"\]'),
        ("prune.units=mlp,attention", r'write prune\.units=\["mlp", "attention"\]$'),
        ("prune.units=[mlp, attention]", r'write prune\.units=\["mlp", "attention"\]$'),
        ("prune.units=heads", r"^prune\.units\.0=\"heads\": .*'mlp', 'attention', 'layer', .*; choose one of them$"),
        (
            "prune.units=[]",
            r"mlp, attention or both, or experts .*; layer goes beside one .* set method\.name=block_influ",
        ),
        ("prune.budget=kv_cache", r"budget=kv_cache is spent on attention.*; set prune\.units=\['attention'\]$"),
        ("prune.protect=0", r"it is a list; write prune\.protect=\[0\]$"),
        ("evaluate.prompts=Well, then", r'it is a list; write evaluate\.prompts=\["Well, then"\]$'),
        ('evaluate.prompts=[""]', r'^evaluate\.prompts\.0="": .*at least 1 character; write some or leave it out'),
        ("compare=wanda", r'it is a list; write compare=\[\{name = "wanda"\}\]$'),
        ("compare=[wanda]", r'it is a list; write compare=\[\{name = "wanda"\}\]$'),
        ("compare={name='wanda'}", r'it is a list; write compare=\[\{name = "wanda"\}\]$'),
        ('compare=["wanda"]', r'^compare\.0="wanda": it is a section; .* compare=\[\{name = "wanda"\}\]$'),
        ("model=x", r'^model="x": it is a section; set its keys, as in model\.path=VALUE$'),
        ("data.calibration=x.txt", r"it is a section; set its keys, as in data\.calibration\.source=VALUE$"),
        ("method=wanda", r'^method="wanda": it is a section; set its keys, as in method\.name=wanda$'),
        ("method={ridge=3}", r"name the method, as in method\.name=wanda$"),
        ('method={name="wanda", ridge=3}', r"^unknown key 'method\.ridge'; known keys here: name$"),
        ("model.dtype=int8", r"^model\.dtype=\"int8\": .*'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_a_complaint_names_key_value_and_rule(override: str, message: str, toml: Path) -> None:
    with pytest.raises(ConfigError, match=message) as complaint:
        load(toml, [override])
    assert "\n" not in str(complaint.value)


@pytest.mark.parametrize("units", ["residual", "experts"])
def test_time_is_a_budget_of_neurons_and_heads(units: str, toml: Path) -> None:
    """Said before anything else, which would lead from one impossible value to the next."""
    for allocation in ("uniform", "sensitivity"):
        with pytest.raises(ConfigError, match=r"budget=latency is for neurons and heads.*; set prune\.budget=units or"):
            load(toml, ["prune.budget=latency", f"prune.units=['{units}']", f"prune.allocation={allocation}"])


def test_a_remedy_stands_alone(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"set prune\.rounds=1 or prune\.allocation=global$"):
        load(toml, ["prune.allocation=sensitivity", "prune.rounds=2"])


def test_sensitivity_takes_one_round(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds=2; set prune\.rounds=1 or prune\.allocation=global"):
        load(toml, ["prune.allocation=sensitivity", "prune.rounds=2"])


def test_an_even_allocation_leaves_no_trace_in_what_names_a_run(toml: Path) -> None:
    """Runs from before there was another one keep their folders."""
    even = load(toml).result_part()["prune"]
    assert even.keys().isdisjoint({"allocation", "floor", "protect"})
    assert load(toml, ["prune.floor=0.5"]).result_part()["prune"] == even
    spread = load(toml, ["prune.allocation=global", "prune.protect=[0, -1]"]).result_part()["prune"]
    assert spread == {**even, "allocation": "global", "floor": 0.25, "protect": [0, -1]}


def test_all_complaints_come_at_once(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"prune\.ratio=2: .*; prune\.rounds=0: "):
        load(toml, ["prune.ratio=2", "prune.rounds=0"])


def test_the_model_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"missing key 'model'; set it in the file or as model=VALUE"):
        load(tmp_path / "empty.toml")
    with pytest.raises(ConfigError, match=r"missing key 'model\.path'"):
        load(tmp_path / "empty.toml", ["model.dtype=float32"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ratio = ", "is not valid TOML"),
        (b"name = 'a'\nname = 'b'", "is not valid TOML"),
        (b'name = "\xff"', r"run\.toml"),
    ],
)
def test_a_file_that_is_not_toml(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "run.toml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml' cannot be read \(No such file or directory\); give a TOML file"):
        load(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_a_configuration_cannot_be_changed(toml: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(toml).prune.ratio = 0.9  # pyright: ignore[reportAttributeAccessIssue]


def test_the_result_part_is_plain_and_leaves_out_where_it_ran(toml: Path) -> None:
    config = load(toml)
    part = config.result_part()
    assert "run" not in part
    assert parse({**part, "run": config.run.model_dump()}) == config
    assert load(toml, ["run.workers=5"]).result_part() == part
    assert load(toml, ["seed=5"]).result_part() != part


def test_how_a_model_is_spread_is_no_part_of_the_result(toml: Path) -> None:
    part = load(toml).result_part()
    spread = ["record.schedule=sweep", "record.memory_gb=3", "record.storage=s3://bucket/runs"]
    assert load(toml, spread).result_part() == part
    assert load(toml, ["record.shard_sequences=8"]).result_part() != part, "sums are rounded in another order"


def test_every_field_is_documented() -> None:
    """A docstring below each field is its documentation."""
    undocumented = []
    sections = [("", RunConfig)]
    while sections:
        prefix, section = sections.pop()
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
                sections.append((f"{prefix}{name}.", annotation))
            elif not field.description and prefix:
                undocumented.append(prefix + name)
    assert undocumented == []


@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        (["recover.steps=0"], 0),
        (["recover.steps=1"], 3),
        (["recover.steps=0", "method={name='receding'}"], 3),
        (["recover.steps=0", "compare=[{name='eigenvalue'}]"], 3),
    ],
)
def test_training_workers_are_those_of_recovery_and_learning(overrides: list[str], workers: int, toml: Path) -> None:
    assert load(toml, ["recover.workers=3", "recover.batch_sequences=6", *overrides]).training_workers == workers
