"""Mixtures of experts: removing experts equals closing the router to them, in memory and on disk."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.blocks import BlockModel, partition
from cria_dist.models.checkpoint import Numerics, count_parameters, load_model, read_config
from cria_dist.models.experts import assembled, output_norms, routed_among, taken_apart
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery
from cria_dist.records import Site

MakeModel = Callable[..., Path]

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 256
SITES = [Site(0, "experts"), Site(2, "experts")]
KEPT = {"layer-000.experts": (0, 2, 3, 5), "layer-002.experts": (1, 2, 4, 5)}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "num_hidden_layers": 3},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_moe-normed": {
        "model_type": "qwen3_moe", "num_experts": 6, "num_hidden_layers": 3, "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids=str)
def dense(request: pytest.FixtureRequest, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six experts in every layer, but for the second one of Qwen3."""
    shape = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "shard_size": "60KB"}
    return make_model(tmp_path_factory.mktemp("dense") / request.param, **shape, **MODELS[request.param])


@pytest.fixture
def kept(dense: Path) -> dict[str, tuple[int, ...]]:
    return KEPT if read_config(dense)["model_type"] == "qwen3_moe" else KEPT | {"layer-001.experts": (0, 1, 2, 3)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def close(router: Any, removed: list[int], normed: bool) -> None:
    """The router as transformers has it, with logits of -inf for some experts."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_TE = hidden_states.reshape(-1, hidden_states.shape[-1]) @ router.weight.T
        logits_TE[:, removed] = -torch.inf
        top_TK, index_TK = logits_TE.softmax(dim=-1).topk(router.top_k, dim=-1)
        return logits_TE, top_TK / top_TK.sum(dim=-1, keepdim=True) if normed else top_TK, index_TK

    router.forward = forward


def mask_experts(model: Any, config: dict[str, Any], kept: dict[str, tuple[int, ...]]) -> None:
    for key, stay in kept.items():
        router = model.model.layers[Site.from_key(key).layer].mlp.gate
        close(router, sorted({*range(6)} - {*stay}), config.get("norm_topk_prob", True))


def masked_logits(directory: Path, kept: dict[str, tuple[int, ...]]) -> torch.Tensor:
    model, config = load_model(directory, Numerics()), read_config(directory)
    dense = logits(model)
    mask_experts(model, config, kept)
    masked = logits(model)
    assert (masked - dense).abs().max() > 1e-2, "the removed experts do nothing: this test could not fail"
    return masked


def test_removing_equals_closing_the_router(dense: Path, kept: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    config = read_config(dense)
    family, expected = family_of(config), masked_logits(dense, kept)
    operation = Surgery(family, config, kept)
    found = logits(surgery.pruned_copy(load_model(dense, Numerics()), operation))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(checkpoint.weight_files(dense)) > 2
    surgery.write_pruned(dense, tmp_path / "pruned", operation)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-5, atol=1e-5)
    assert model.generate(TOKENS[:1], attention_mask=torch.ones(1, 20), max_new_tokens=2).shape[1] > 20
    removed = 2 * len(kept) * family.unit_cost(SITES[0], config)
    assert count_parameters(config) - count_parameters(read_config(tmp_path / "pruned")) == removed
    kept_too_few = {key: len(KEPT["layer-000.experts"]) - 3 for key in kept}
    with pytest.raises(ConfigError, match=r"^1 experts would be left .* through 2, .*; lower prune\.ratio"):
        family.narrowed(config, kept_too_few, False)


def test_a_router_that_goes_past_experts(dense: Path, kept: dict[str, tuple[int, ...]]) -> None:
    model = load_model(dense, Numerics())
    whole = logits(model)
    with ExitStack() as stack:
        for key, stay in kept.items():
            stack.enter_context(routed_among(model.model.layers[Site.from_key(key).layer].mlp.gate, stay))
        torch.testing.assert_close(logits(model), masked_logits(dense, kept), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), whole)


def test_experts_and_layers_leave_together(dense: Path, kept: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """The last two of three layers stay: what is plain, and where the experts' tensors lie, is numbered anew."""
    config, model = read_config(dense), load_model(dense, Numerics())
    model.model.layers[0].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    mask_experts(model, config, kept)
    blocks = {f"layer-{layer:03d}.block": (0,) if layer else () for layer in range(3)}
    surgery.write_pruned(dense, tmp_path / "pruned", Surgery(family_of(config), config, {**kept, **blocks}))
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(found.eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_blocks_in_turn_are_the_whole_model(dense: Path) -> None:
    """The experts of a block are put together from what is on disk."""
    family = family_of(read_config(dense))
    (whole,) = partition(3, 1)
    expected, hidden = BlockModel(dense, Numerics(), family, whole)(TOKENS), TOKENS
    for block in partition(3, 3):
        hidden = BlockModel(dense, Numerics(), family, block)(hidden)
    assert torch.equal(hidden, expected)
    model = load_model(dense, Numerics())
    with torch.inference_mode():
        torch.testing.assert_close(model.model.norm(hidden), model.model(input_ids=TOKENS).last_hidden_state)


def test_tensors_in_memory_and_in_checkpoints(dense: Path) -> None:
    family, state = family_of(read_config(dense)), load_model(dense, Numerics()).state_dict()
    there: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        pieces = family.pieces(name, tensor.shape)
        there |= taken_apart(pieces, tensor) if pieces else {family.on_disk(name): tensor}
        assert not pieces or torch.equal(assembled(pieces, there.__getitem__), tensor)
    with checkpoint.open_tensors(dense) as tensors:
        names = [name for names in checkpoint.weight_files(dense).values() for name in names]
        assert all(torch.equal(tensors.read(name), there[name]) for name in names)


def test_norms_are_those_of_what_every_expert_gives(dense: Path) -> None:
    """Closing the router to all experts of a token but one, what the module gives is that one's output."""
    experts = load_model(dense, Numerics()).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_TK = torch.randn(9, 32, generator=generator), torch.rand(9, 2, generator=generator)
    index_TK = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(9)])
    with torch.inference_mode():
        found_TE = output_norms(experts, hidden_TD, index_TK, weight_TK)
        for place in (0, 1):
            alone_TK = torch.where(torch.arange(2) == place, weight_TK, 0.0)
            expected_T = experts(hidden_TD, index_TK, alone_TK).norm(dim=1)
            torch.testing.assert_close(found_TE.gather(1, index_TK[:, place : place + 1])[:, 0], expected_T)
    assert int((found_TE > 0).sum()) == 18
