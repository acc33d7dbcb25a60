"""Finding, describing and loading checkpoints."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, DataError
from cria_dist.models import checkpoint, location, writing
from cria_dist.models.checkpoint import Numerics
from cria_dist.models.family import family_of
from cria_dist.models.stored import StoredTensors
from cria_dist.records import Site
from cria_dist.stages.estimate import estimate
from cria_dist.stages.prepare import prepare

MakeModel = Callable[..., Path]


@pytest.fixture
def mine(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico model that a test may damage."""
    return Path(shutil.copytree(pico, tmp_path / "model"))


def test_locate_finds_a_directory(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert location.locate(str(pico), None) == pico
    monkeypatch.chdir(pico.parent)
    assert location.locate("pico", None) == pico
    with pytest.raises(ConfigError, match=r"^model.revision='abc' is for models of the hub; leave it out for pico"):
        location.locate("pico", "abc")


def test_locate_finds_a_sharded_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    sharded = make_model(tmp_path / "sharded", shard_size="20KB")
    assert location.locate(str(sharded), None) == sharded


@pytest.mark.parametrize("path", ["no-such-model", "./no/such", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_locate_names_a_missing_directory(path: str) -> None:
    with pytest.raises(ConfigError, match=f"model.path='{re.escape(path)}' is .*(give an existing|check the name)"):
        location.locate(path, None)


def test_locate_of_a_hub_name_without_network_is_one_error() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.path='nobody/no-model' is neither a directory nor reachable"
    ) as info:
        location.locate("nobody/no-model", None)
    assert "\n" not in str(info.value)


def test_locate_wants_a_config(mine: Path) -> None:
    (mine / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        location.locate(str(mine), None)


def test_locate_wants_safetensors(mine: Path) -> None:
    (mine / checkpoint.WEIGHTS).rename(mine / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors; convert it"):
        location.locate(str(mine), None)


def test_locate_wants_to_know_which_weights_are_meant(mine: Path) -> None:
    (mine / checkpoint.INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ConfigError, match=r"has both model\.safetensors and .*index\.json, and programs differ"):
        location.locate(str(mine), None)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_that_are_written_have_the_mode_of_any_file(umask: int, pico: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        model = checkpoint.from_pretrained(pico)
        writing.write_like(pico, tmp_path / "again", model.state_dict())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "again").iterdir()}
    assert modes[checkpoint.WEIGHTS] == modes["config.json"] == 0o666 & ~umask


def test_stored_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    for number in range(2):
        save_file({f"map.{number}": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    found = StoredTensors([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    (tmp_path / "0.safetensors").unlink()  # what is not asked for is not opened again
    assert list(found) == ["map.0", "map.1"]
    assert "map.0" in found
    assert found["map.1"].tolist() == [1.0, 1.0]
    with pytest.raises(KeyError):
        found["map.2"]


def config_with(**changes: Any) -> Callable[[Path], object]:
    """Change keys of config.json; None takes one out."""

    def damage(model: Path) -> None:
        config = {**json.loads((model / "config.json").read_text()), **changes}
        kept = {key: value for key, value in config.items() if key not in changes or value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return damage


def a_file(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def an_index(content: str) -> Callable[[Path], object]:
    def replace(model: Path) -> None:
        (model / checkpoint.WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
        (model / checkpoint.INDEX).write_text(content)

    return replace


def cut(size: int | None) -> Callable[[Path], object]:
    return lambda model: (model / checkpoint.WEIGHTS).write_bytes((model / checkpoint.WEIGHTS).read_bytes()[:size])


def without(name: str) -> Callable[[Path], object]:
    def damage(model: Path) -> None:
        tensors = load_file(model / checkpoint.WEIGHTS)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, model / checkpoint.WEIGHTS)

    return damage


def as_float8(model: Path) -> None:
    tensors = load_file(model / checkpoint.WEIGHTS)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, model / checkpoint.WEIGHTS)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut config": (a_file("config.json", '{"model_type": "lla'), r"config\.json is damaged \(.*; take a whole copy"),
    "a list": (a_file("config.json", "[]"), r"config\.json is damaged \(it holds a list, not an object\)"),
    "no type": (config_with(model_type=None), r"config\.json is damaged \(it names no model_type\)"),
    "no size": (config_with(intermediate_size=None), r"config\.json is damaged \(it has no 'intermediate_size'\)"),
    "no heads": (config_with(num_attention_heads=None), r"damaged \(it has no 'num_attention_heads'\)"),
    "no hidden size": (config_with(hidden_size=None), r"damaged \(it has no 'hidden_size'\)"),
    "no layers": (config_with(num_hidden_layers=None), r"damaged \(it has no 'num_hidden_layers'\)"),
    "a size of text": (config_with(intermediate_size="48"), r"config\.json is damaged \(.*expected int, got str"),
    "cut header": (cut(100), r"model\.safetensors is damaged \(.*header.*; take a whole copy of the model"),
    "no content": (cut(0), r"model\.safetensors is damaged \(.*header too small"),
    "cut weights": (cut(-100), r"model\.safetensors is damaged \(.*not fully covered"),
    "cut index": (an_index("{"), r"index\.json is damaged \(Expecting"),
    "no map": (an_index("{}"), r"index\.json is damaged \(it has no weight_map\)"),
    "a number for a file": (an_index('{"weight_map": {"a": 5}}'), r"lacks 5, which its index names"),
    "another's index": (
        an_index('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
        r"model-00001-of-00001\.safetensors is damaged \(.*\ba\b",
    ),
    "another width": (config_with(intermediate_size=64), r"has shape \(.*48.*\), config\.json says \(.*64.*\)"),
    "another vocabulary": (config_with(vocab_size=280), r"has shape \(300, 32\), config\.json says \(280, 32\)"),
    "a tensor less": (without("model.layers.1.mlp.up_proj.weight"), r"has no tensor 'model\.layers\.1\.mlp\.up_proj"),
    "float8": (as_float8, r"q_proj\.weight is F8_E4M3, and checkpoints are written in .*; give the checkpoint in"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_one_line_before_anything_is_done(
    damage: Callable[[Path], object], message: str, mine: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    damage(mine)
    with pytest.raises(ConfigError, match=message) as complaint:
        prepare(run_config(tmp_path, model={"path": str(mine)}))
    assert "\n" not in str(complaint.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", DAMAGED.keys() - {"a number for a file"})
def test_an_estimate_finds_the_same(
    damage: str, mine: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """But a file that is not there, for it wants none."""
    breaks, message = DAMAGED[damage]
    breaks(mine)
    with pytest.raises(ConfigError, match=message):
        estimate(run_config(tmp_path, model={"path": str(mine)}))


def test_a_size_of_text_where_modules_tell_the_family() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": "48", "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match=r"config\.json is damaged \(.*expected int, got str"):
        family_of({"model_type": "granite", **sizes})


def test_a_damaged_shard_is_found_too(
    make_model: MakeModel, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    sharded = make_model(tmp_path / "sharded", shard_size="20KB")
    last = sharded / list(checkpoint.weight_files(sharded))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{last.name} is damaged"):
        prepare(run_config(tmp_path, model={"path": str(sharded)}))


def test_a_missing_shard_is_one_of_our_errors(make_model: MakeModel, tmp_path: Path) -> None:
    sharded = make_model(tmp_path / "sharded", shard_size="20KB")
    lost = list(checkpoint.weight_files(sharded))[1]
    (sharded / lost).unlink()
    with pytest.raises((ConfigError, DataError), match=lost):
        checkpoint.fingerprint(location.locate(str(sharded), None))


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'mamba' is not known; known families: .*gemma2, .*llama, .*vit"):
        family_of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="None is not known"):
        family_of({})


def test_quantised_checkpoints_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantised"):
        family_of({"model_type": "llama", "quantization_config": {"bits": 4}})


def test_weight_files_cover_all_tensors(make_model: MakeModel, tmp_path: Path, pico: Path) -> None:
    sharded = make_model(tmp_path / "sharded", shard_size="20KB")
    names = [name for names in checkpoint.weight_files(sharded).values() for name in names]
    assert sorted(names) == sorted(load_file(pico / checkpoint.WEIGHTS))
    assert list(checkpoint.weight_files(pico)) == [checkpoint.WEIGHTS]


def test_fingerprint_sees_one_changed_weight(mine: Path, pico: Path) -> None:
    assert checkpoint.fingerprint(mine) == checkpoint.fingerprint(pico)
    tensors = load_file(mine / checkpoint.WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, mine / checkpoint.WEIGHTS, metadata={"format": "pt"})
    assert checkpoint.fingerprint(mine) != checkpoint.fingerprint(pico)


def test_fingerprint_sees_a_changed_config(mine: Path, pico: Path) -> None:
    config = checkpoint.read_config(mine)
    (mine / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert checkpoint.fingerprint(mine) != checkpoint.fingerprint(pico)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_counted_parameters_are_the_real_ones(
    tied: bool, model_type: str, make_model: MakeModel, tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    stored = sum(tensor.numel() for tensor in load_file(directory / checkpoint.WEIGHTS).values())
    loaded = sum(parameter.numel() for parameter in checkpoint.load_model(directory, Numerics()).parameters())
    counted = checkpoint.count_parameters(checkpoint.read_config(directory))
    assert counted == stored == loaded


def test_a_unit_costs_what_leaves_with_it(make_model: MakeModel, tmp_path: Path) -> None:
    for number, changes in enumerate([{}, {"mlp_bias": True}]):
        wide = make_model(tmp_path / f"wide-{number}", **changes)
        config = checkpoint.read_config(wide)
        narrow = {**config, "intermediate_size": 47}
        difference = checkpoint.count_parameters(config) - checkpoint.count_parameters(narrow)
        assert difference == 2 * family_of(config).unit_cost(Site(0), config)


def test_empty_model_takes_no_memory(pico: Path) -> None:
    model = checkpoint.empty_model(checkpoint.read_config(pico))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_tensor_reader_reads_across_shards(make_model: MakeModel, tmp_path: Path, pico: Path) -> None:
    sharded = make_model(tmp_path / "sharded", shard_size="20KB")
    whole = load_file(pico / checkpoint.WEIGHTS)
    with checkpoint.open_tensors(sharded) as tensors:
        for name, tensor in whole.items():
            assert torch.equal(tensors.read(name), tensor), name
        with pytest.raises(DataError, match=r"has no tensor 'model\.layers\.9\.nothing'"):
            tensors.read("model.layers.9.nothing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_model_computes_in_the_dtype_asked_for(dtype: str, pico: Path) -> None:
    model = checkpoint.load_model(pico, Numerics(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_load_model_sets_the_precision_of_matrix_products(pico: Path) -> None:
    try:
        checkpoint.load_model(pico, Numerics("float32", "medium"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        checkpoint.load_model(pico, Numerics())
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_missing_tokenizer_is_named(mine: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mine / name).unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in .*put tokenizer\.json beside the weights"):
        checkpoint.load_tokenizer(mine)


@pytest.mark.parametrize("tied", [True, False])
def test_write_like_keeps_layout_and_dtype(tied: bool, make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", dtype="bfloat16", shard_size="20KB", tie_word_embeddings=tied)
    model = checkpoint.load_model(source, Numerics("float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    writing.write_like(source, tmp_path / "target", model.state_dict())
    assert checkpoint.weight_files(tmp_path / "target") == checkpoint.weight_files(source)
    assert checkpoint.read_config(tmp_path / "target") == {**checkpoint.read_config(source), "rope_theta": 10000.0}
    for file in checkpoint.weight_files(source):
        old, new = load_file(source / file), load_file(tmp_path / "target" / file)
        for name in old:
            assert new[name].dtype == torch.bfloat16
            assert torch.equal(new[name], 2 * old[name])


def test_sites_are_the_mlps_of_all_layers(pico: Path) -> None:
    config = checkpoint.read_config(pico)
    assert family_of(config).widths(config) == {Site(0): 48, Site(1): 48}
    modules = family_of(config).modules(Site(1))
    names = dict(checkpoint.empty_model(config).named_modules())
    assert {*modules.inputs.values(), modules.output} <= set(names)
