"""A sentence classifier from labelled sentences to the report: what counts are its tokens, never padding."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from cria_dist import files, load_pruned
from cria_dist.config import RunConfig
from cria_dist.config_file import parse
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.methods import GradientSample
from cria_dist.models import checkpoint
from cria_dist.models.blocks import partition
from cria_dist.models.checkpoint import Numerics
from cria_dist.pipeline import Context, prune, results
from cria_dist.pool import LocalPool
from cria_dist.records import Evaluation, PruningPlan, Report, Site, Stage
from cria_dist.report import html
from cria_dist.report.writer import report_from_json
from cria_dist.stages import evaluate, schedule
from cria_dist.stages.examples import PADDING, Examples, model_inputs, read_examples, sentence_lengths, unpadded
from cria_dist.stages.footprint import Workload
from cria_dist.stages.gradients import GradientTaker, GradientTask, cut
from cria_dist.stages.job import Job
from cria_dist.stages.prepare import prepare
from cria_dist.store.recording import MANIFEST, Recording
from cria_dist.store.saliences import Saliences
from cria_dist.store.site_scores import read_scores
from cria_dist.store.storage import LocalStorage

MakeConfig = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

SENTENCES, TESTS, LONGEST = 26, 14, 40
SITES = [Site(0), Site(1), Site(2)]
WORDS = ["fine", "dull", "warm", "cold", "bright", "slow", "sharp", "weak", "rich", "thin"]


def classify(model_dir: Path, sentence: str) -> torch.Tensor:
    """Logits of one sentence, by the stock class and nothing of ours."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model_dir)(
        sentence, return_tensors="pt", truncation=True, max_length=LONGEST
    )
    with torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(model_dir)
        return model(input_ids=tokens["input_ids"]).logits[0]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """40 different ones of 1 to 9 words; some are longer than the model gets to see."""
    rng = random.Random(3)
    found = {" ".join(rng.choices(WORDS, k=rng.randint(1, 9))): None for _ in range(60)}
    return [*found][: SENTENCES + TESTS]


@pytest.fixture(scope="module")
def model_dir(
    make_encoder: Callable[..., Path], sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A classifier that says each class about as often as the other."""
    from transformers import AutoModelForSequenceClassification

    folder = make_encoder(tmp_path_factory.mktemp("models") / "bert")
    logits = torch.stack([classify(folder, sentence) for sentence in sentences])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(model_dir: Path, sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.tsv`` and ``test.tsv``, labelled by the dense model itself."""
    folder = tmp_path_factory.mktemp("corpus")
    labels = [int(classify(model_dir, sentence).argmax()) for sentence in sentences]
    assert 0.3 < np.mean(labels) < 0.7
    for name, part in (("train", slice(0, SENTENCES)), ("test", slice(SENTENCES, None))):
        lines = [f"{text}\t{label}\n" for text, label in zip(sentences[part], labels[part], strict=True)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def tree(model_dir: Path, corpus: Path) -> dict[str, Any]:
    columns = {"field": "sentence", "label": "label"}
    return {
        "name": "sentences",
        "model": {"path": str(model_dir)},
        "data": {
            "calibration": {"source": str(corpus / "train.tsv"), **columns},
            "test": {"source": str(corpus / "test.tsv"), **columns},
            "sequence_length": LONGEST,
            "calibration_sequences": SENTENCES,
            "test_sequences": TESTS,
        },
        "record": {"tokens": 120, "shard_sequences": 10, "batch_sequences": 3},
        "method": {"name": "conditional"},
        "prune": {"ratio": 0.25, "multiple": 4},
        "recover": {"steps": 0},
        "evaluate": {"latency_repeats": 1, "batch_sequences": 3},
        "run": {"pool": "local"},
    }


@pytest.fixture
def make_config(tree: dict[str, Any], tmp_path: Path) -> MakeConfig:
    def make(**changes: Any) -> RunConfig:
        run = {"root": str(tmp_path / "runs"), "pool": "local"}
        sections = {key: value for key, value in changes.items() if isinstance(value, dict) and key != "method"}
        laid = {key: {**tree.get(key, {}), **value} for key, value in {"run": {}, **sections}.items()}
        return parse({**tree, **changes, **laid, "run": {**run, **laid["run"]}})

    return make


def carry_out(make_context: MakeContext, config: RunConfig, until: Stage) -> Job:
    context = make_context(config, until=until)
    assert prune(context, until=until) is None
    return context.job


def plan_of(job: Job) -> PruningPlan:
    return PruningPlan.from_json((job.folder / "round-00" / "plan.json").read_text())


def recording_of(job: Job) -> Recording:
    manifest = files.read_json(job.folder / "round-00" / MANIFEST)
    return Recording(LocalStorage(job.folder / "round-00"), manifest["digest"])


def observed(job: Job, site: Site) -> list[np.ndarray]:
    """What the output map of a site reads, [tokens, units] of each sentence alone, from a hook on the stock model."""
    model = checkpoint.load_model(job.model_dir, Numerics())
    found: list[np.ndarray] = []
    layer = model.bert.encoder.layer[site.layer]
    layer.output.dense.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double().numpy()))
    for tokens_T in np.load(job.calibration_path):
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(tokens_T[tokens_T != PADDING]).long()[None])
    return found


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key)
def test_what_is_recorded_are_the_tokens_of_the_sentences_and_no_padding(
    site: Site, make_config: MakeConfig, make_context: MakeContext
) -> None:
    job = carry_out(make_context, make_config(), "record")
    recording, expected = recording_of(job), observed(job, site)
    lengths = [len(one) for one in expected]
    assert min(lengths) < 10
    assert max(lengths) == LONGEST
    moments, all_TN = recording.moments(site), np.concatenate(expected)
    assert moments.count == sum(lengths)
    np.testing.assert_allclose(moments.total_N, all_TN.sum(axis=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(moments.gram_NN, all_TN.T @ all_TN, rtol=1e-5, atol=1e-3)
    paths = sorted((job.folder / "round-00" / "activations" / site.key).glob("*.parquet"))
    table = pa.concat_tables([parquet.read_table(path, columns=["sequence", "position"]) for path in paths])
    places = list(zip(table["sequence"].to_pylist(), table["position"].to_pylist(), strict=True))
    assert len(set(places)) == len(places) == 120
    assert min(position for _, position in places) == 1
    stored_NM = recording.signals(site)["output"]
    rows_MN = np.stack([expected[sequence][position] for sequence, position in places])
    np.testing.assert_allclose(stored_NM.T, rows_MN, rtol=1e-5, atol=1e-6)


def test_neither_moments_nor_plan_depend_on_the_batch_size(make_config: MakeConfig, make_context: MakeContext) -> None:
    jobs = [
        carry_out(make_context, make_config(name=f"batch-{batch}", record={"batch_sequences": batch}), "decide")
        for batch in (1, 4, 26)
    ]
    first = recording_of(jobs[0])
    for job in jobs[1:]:
        assert plan_of(job).kept == plan_of(jobs[0]).kept
        for site in SITES:
            one, other = first.moments(site), recording_of(job).moments(site)
            assert one.count == other.count
            np.testing.assert_allclose(one.gram_NN, other.gram_NN, rtol=1e-5, atol=1e-4)


def test_layer_by_layer_the_same_is_recorded(
    make_config: MakeConfig, make_context: MakeContext, model_dir: Path, tmp_path: Path
) -> None:
    small = {"shard_sequences": 2, "batch_sequences": 2, "tokens": 40}
    work = Workload(make_config(record=small), checkpoint.read_config(model_dir))
    needed = schedule.peak(work, partition(3, 3), 1).total
    manifests = []
    for kind, memory, blocks in (("replicate", None, 1), ("sweep", needed / 1e9, 3)):
        record = {**small, "schedule": kind, "memory_gb": memory}
        config = make_config(record=record, run={"folder": str(tmp_path / kind / "run")})
        assert len(schedule.choose(config, checkpoint.read_config(model_dir), LocalPool()).blocks) == blocks
        manifests.append((carry_out(make_context, config, "record").folder / "round-00" / MANIFEST).read_bytes())
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padding_with_a_mask_leaves_no_trace(family: str, make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    """Which is what the recovery trains with."""
    model = checkpoint.load_model(make_encoder(tmp_path / "model", family), Numerics())
    tokens_ST = np.full((3, 12), PADDING, dtype=np.int32)
    for row, length in enumerate((12, 5, 2)):
        tokens_ST[row, :length] = np.random.default_rng(row).integers(2, 256, length)
    with torch.inference_mode():
        together_SC = model(**model_inputs(tokens_ST)).logits
        alone_SC = torch.cat([model(**model_inputs(tokens_ST[row : row + 1])).logits for row in range(3)])
    assert "attention_mask" not in model_inputs(tokens_ST[1:2])
    assert model_inputs(tokens_ST[1:2])["input_ids"].shape == (1, 5)
    torch.testing.assert_close(together_SC, alone_SC, rtol=1e-5, atol=1e-5)


def test_batches_for_scoring_have_sentences_of_one_length() -> None:
    tokens_ST = np.full((7, 9), PADDING, dtype=np.int32)
    for row, length in enumerate((3, 9, 3, 4, 3, 9, 2)):
        tokens_ST[row, :length] = row
    seen: list[int] = []
    for part in unpadded(Examples(tokens_ST, np.arange(7)), 2):
        assert len(part) <= 2
        assert len(set(sentence_lengths(part.inputs))) == 1
        seen += part.labels_S.tolist()
    assert sorted(seen) == list(range(7))


@pytest.fixture(scope="module")
def finished(
    tree: dict[str, Any], make_context: MakeContext, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Report]:
    """The whole story, with methods that need gradients and a recovery that also learns from the dense model."""
    changes = {
        "compare": [{"name": "taylor"}, {"name": "eigenvalue", "steps": 4}, {"name": "magnitude"}],
        "prune": {"ratio": 0.5, "multiple": 4},
        "recover": {"steps": 60, "workers": 1, "batch_sequences": 8, "learning_rate": 2e-3, "distill": 0.5},
        "run": {"root": str(tmp_path_factory.mktemp("runs")), "pool": "local"},
    }
    context = make_context(parse({**tree, **changes}))
    report = prune(context)
    assert report is not None
    return context.job, report


def by_label(report: Report) -> dict[str, Evaluation]:
    return {one.label: one for one in report.variants}


def test_accuracy_is_that_of_the_stock_model_sentence_by_sentence(
    finished: tuple[Job, Report], sentences: list[str], corpus: Path
) -> None:
    job, report = finished
    labels = [int(line.split("\t")[1]) for line in (corpus / "test.tsv").read_text().splitlines()[1:]]
    for label, folder in (
        ("dense", job.model_dir),
        ("repaired", job.folder / "pruned"),
        ("recovered", job.folder / "recovered"),
    ):
        logits_SC = torch.stack([classify(folder, sentence) for sentence in sentences[SENTENCES:]])
        found = by_label(report)[label]
        assert found.accuracy == pytest.approx((logits_SC.argmax(dim=1) == torch.tensor(labels)).double().mean())
        loss = torch.nn.functional.cross_entropy(logits_SC, torch.tensor(labels))
        assert np.log(found.perplexity) == pytest.approx(float(loss), rel=1e-4)
        assert found.scored_tokens == TESTS
    assert by_label(report)["dense"].accuracy == 1.0


def test_recovery_brings_back_what_pruning_took(finished: tuple[Job, Report]) -> None:
    variants = by_label(finished[1])
    assert list(variants) == ["dense", "pruned", "repaired", "recovered"]
    losses = {label: np.log(one.perplexity) for label, one in variants.items()}
    assert losses["recovered"] < losses["repaired"]
    assert variants["pruned"].accuracy < 1.0
    trained = [loss for _, loss in finished[1].loss]
    assert len(trained) == 60
    assert np.mean(trained[-5:]) < np.mean(trained[:5])


def test_the_report_speaks_of_accuracy(finished: tuple[Job, Report]) -> None:
    job, report = finished
    assert report_from_json(job.folder / "report.json") == report
    page = (job.folder / "report.html").read_text()
    assert "perplexity" not in page.lower().replace("perplexity, but", "")
    assert "accuracy went from 100.0 % to " in html.headline(report)
    assert (job.folder / "plots" / "accuracy.png").is_file()
    assert not (job.folder / "plots" / "perplexity.png").exists()
    assert {one.method for one in report.comparison} == {"taylor", "eigenvalue", "magnitude"}
    assert all(one.accuracy is not None for one in report.comparison)
    assert report.generations == ()
    assert all(one.prefill_ms is not None and one.decode_ms is None for one in report.variants)
    assert all("logits equal" in report.loaders[f"transformers, {name}"] for name in ("pruned", "recovered"))
    assert report.protocol[0].startswith(f"Accuracy: share of {TESTS} sentences (at most {LONGEST} tokens of each")


def test_a_recovered_classifier_keeps_names_and_shapes(finished: tuple[Job, Report]) -> None:
    pruned, recovered = (load_file(finished[0].folder / name / checkpoint.WEIGHTS) for name in ("pruned", "recovered"))
    assert {name: one.shape for name, one in pruned.items()} == {name: one.shape for name, one in recovered.items()}
    assert not torch.equal(pruned["classifier.weight"], recovered["classifier.weight"])
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(pruned[words], recovered[words])  # recover.train = blocks


def test_a_second_start_computes_nothing_again(
    finished: tuple[Job, Report], make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "label_quality", None)
    context = make_context(finished[0].config)
    report = prune(context)
    assert report is not None
    assert replace(report, stages=()) == replace(finished[1], stages=())


def test_the_dense_model_is_measured_once_for_runs_side_by_side(
    make_config: MakeConfig, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [make_context(make_config(name=name)) for name in ("one", "other")]
    dense = [(evaluate.Variant("dense", context.job.model_dir), context.job.digests["model"]) for context in contexts]
    (measured,) = results.evaluate_variants(contexts[0], dense[:1])
    monkeypatch.setattr(evaluate, "label_quality", None)
    assert results.evaluate_variants(contexts[1], dense[1:]) == [measured]


def test_gradients_are_those_of_the_labels(make_config: MakeConfig, tmp_path: Path) -> None:
    job = prepare(make_config())
    sample = GradientSample(6, 6)
    saliences = Saliences(tmp_path / "saliences", "digest", (6,))
    task = GradientTask(
        job.model_dir, job.calibration_path, Numerics(), saliences, labels_path=job.calibration_labels_path
    )
    assert GradientTaker(task)(cut(sample)[0]) == 6
    assert job.calibration_labels_path is not None
    examples = read_examples(job.calibration_path, job.calibration_labels_path)[:6]
    model = checkpoint.load_model(job.model_dir, Numerics())
    inputs, labels_S = examples.tensors(model.device)
    model(**inputs, labels=labels_S).loss.backward()  # padded, together, by transformers' own loss
    layer = model.bert.encoder.layer[1]
    parts = [(layer.intermediate.dense.weight, 0), (layer.intermediate.dense.bias, 0), (layer.output.dense.weight, 1)]
    expected_N = sum((one * one.grad).abs().double().movedim(dim, 0).reshape(48, -1).sum(1) for one, dim in parts)
    np.testing.assert_allclose(saliences.mean(Site(1)), expected_N.detach().numpy(), rtol=1e-3, atol=1e-6)


def test_scores_of_other_labels_are_not_taken_over(
    make_config: MakeConfig, make_context: MakeContext, corpus: Path, tmp_path: Path
) -> None:
    """Of the same sentences: the recording is taken over, what learned from the labels is not."""
    turned = tmp_path / "turned.tsv"
    head, *lines = (corpus / "train.tsv").read_text().splitlines()
    turned.write_text("\n".join([head, *(f"{one[:-1]}{1 - int(one[-1])}" for one in lines)]) + "\n")
    taylor = {"name": "taylor", "sequences": SENTENCES, "shard_sequences": 13}
    found: list[np.ndarray] = []
    for source in (corpus / "train.tsv", turned):
        data = {"calibration": {"source": str(source), "field": "sentence", "label": "label"}}
        job = carry_out(make_context, make_config(method=taylor, data=data), "analyse")
        found.append(read_scores(job.folder / "round-00", Site(0)).keep_N)
    assert not np.array_equal(*found)


def test_the_kind_of_file_makes_no_difference(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in (corpus / "train.tsv").read_text().splitlines()[1:]]
    names = ["bad", "good"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"s": text, "l": names[int(one)]}) + "\n" for text, one in rows)
    )
    parquet.write_table(
        pa.table({"s": [text for text, _ in rows], "l": [int(one) for _, one in rows]}), tmp_path / "rows.parquet"
    )
    expected = prepare(make_config()).digests
    for kind in ("jsonl", "parquet"):
        calibration = {"source": str(tmp_path / f"rows.{kind}"), "field": "s", "label": "l"}
        data = {**make_config().data.model_dump(), "calibration": calibration}
        assert prepare(make_config(name=kind, data=data)).digests == expected
    assert {"calibration_sentences", "calibration_labels", "test_sentences", "test_labels"} <= expected.keys()


def test_whole_layers_go(make_config: MakeConfig, make_context: MakeContext) -> None:
    job = carry_out(make_context, make_config(method={"name": "block_influence"}), "apply")
    gone = [layer for layer in range(3) if not plan_of(job).kept[f"layer-{layer:03d}.block"]]
    assert len(gone) == 1
    masked, pruned = (checkpoint.load_model(folder, Numerics()) for folder in (job.model_dir, job.folder / "pruned"))
    masked.bert.encoder.layer[gone[0]].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    inputs = model_inputs(np.load(job.calibration_path))
    with torch.inference_mode():
        torch.testing.assert_close(pruned(**inputs).logits, masked(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_heads_and_neurons_of_distilbert_go(
    make_config: MakeConfig,
    make_context: MakeContext,
    make_encoder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the report: what the checkpoint computes is the accuracy that the report has."""
    monkeypatch.setattr(results, "verify_exports", lambda *_: {})  # a fresh process has tests of its own
    own = {"path": str(make_encoder(tmp_path / "model", "distilbert", hidden_dim=48))}
    mixed = {"units": ["mlp", "attention"], "budget": "parameters", "ratio": 0.1, "repair": "least_squares"}
    config = make_config(model=own, prune=mixed, compare=[{"name": "taylor"}], evaluate={"latency_repeats": 0})
    context = make_context(config)
    report = prune(context)
    assert report is not None
    job = context.job
    plan, shape = plan_of(job), checkpoint.read_config(job.folder / "pruned")
    assert {len(kept) for key, kept in plan.kept.items() if key.endswith("attention")} == {3}
    assert shape["num_key_value_heads_per_layer"] == [3, 3, 3]
    assert plan.parameters == (job.dense_parameters, checkpoint.count_parameters(shape))
    data, model = read_examples(job.test_path, job.test_labels_path), load_pruned(job.folder / "pruned")
    with torch.inference_mode():
        rows = [model(**model_inputs(data.inputs[row : row + 1])).logits for row in range(TESTS)]
    found = torch.cat(rows).argmax(dim=1) == torch.from_numpy(data.labels_S)
    assert by_label(report)["repaired"].accuracy == pytest.approx(float(found.double().mean()))
    assert report.comparison[0].accuracy is not None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Stage, type[CriaError], str]] = {
    "no labels": (
        {"label": None}, {"label": None}, "evaluate", ConfigError,
        r"'bert' is a classifier, and recover and evaluate \(hence prune\) need labels; set data\.calibration\.label",
    ),
    "labels of one": ({}, {"label": None}, "record", ConfigError, r"^data\.test\.label is missing; calibration and"),
    "no such column": (
        {"label": "mark"}, {}, "record", ConfigError,
        r"^label='mark' is not in .*train\.tsv; it has: 'sentence', 'label'$",
    ),
    "labels are words": (
        {"label": "sentence"}, {}, "record", DataError,
        r"^label='sentence' of .*train\.tsv line 2 is '.*', and the model has 2 labels, 0 to 1 \(bad, good\); name the",
    ),
    "images": (
        {"format": "images"}, {}, "record", ConfigError,
        r"'bert' takes sentences, but data\.calibration\.format=images; set it to text, or give",
    ),
    "the same sentences": (
        {"source": "TEST"}, {}, "record", ConfigError,
        r"^14 of 14 calibration examples \(100\.00%\) are also test examples, the first is number 0 .*raise data\.m",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, make_config: MakeConfig, tmp_path: Path) -> None:
    calibration, test, until, error, message = REFUSED[case]
    data = make_config().data.model_dump()
    if calibration.get("source") == "TEST":
        calibration = {"source": data["test"]["source"]}
        data["calibration_sequences"] = TESTS
    data = {**data, "calibration": {**data["calibration"], **calibration}, "test": {**data["test"], **test}}
    with pytest.raises(error, match=message) as refusal:
        prepare(make_config(data=data, record={"tokens": 50}), until)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"calibration_sequences": 27}},
            r"calibration corpus has 26 sentences, but 27 were asked for; .* to 26",
        ),
        ({"data": {"sequence_length": 65}}, r"data\.sequence_length=65 is more than the model's 64; lower it"),
        ({"record": {"tokens": 800}}, r"record\.tokens=800 is more than the \d+ tokens of 26 calibration sentences"),
        ({"prune": {"allocation": "sensitivity"}}, r"takes sentences; use prune\.allocation=uniform"),
        ({"prune": {"units": ["attention"], "budget": "kv_cache"}}, r"kv_cache is of models that write text"),
        (
            {"method": {"name": "mpruner"}},
            r"^mpruner needs 4 sampled tokens of every calibration sentence, and a short one",
        ),
        (
            {"method": {"name": "eigenvalue", "batch_sequences": 30}},
            r"batches of 30 examples and there are 26 calibration",
        ),
    ],
)
def test_what_does_not_fit_is_said_first(changes: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(CriaError, match=message):
        prepare(make_config(**changes))


def test_a_checkpoint_with_another_head_is_refused(make_config: MakeConfig, model_dir: Path, tmp_path: Path) -> None:
    """transformers would make a new one up, with a warning."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(model_dir)).save_pretrained(tmp_path / "model")
    checkpoint.load_tokenizer(model_dir).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"has no tensor 'bert\.pooler\.dense\.weight'; .*BertFor|AutoModelForSequence"
    ):
        prepare(make_config(model={"path": str(tmp_path / "model")}))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_model_that_does_not_choose_is_refused(
    problem: str, make_config: MakeConfig, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_encoder(tmp_path / "model", problem_type=problem)
    with pytest.raises(
        ConfigError, match=rf"the model has 2 labels and problem_type='{problem}'; accuracy and recovery"
    ):
        prepare(make_config(model={"path": str(model)}))


def test_a_language_model_takes_no_labels(run_config: MakeConfig, tmp_path: Path) -> None:
    data = {"calibration": {"label": "label"}, "test": {"label": "label"}}
    with pytest.raises(
        ConfigError, match=r"data\.calibration\.label='label' is for classifiers, and model_type 'llama'"
    ):
        prepare(run_config(tmp_path, data=data))


def test_labels_that_are_not_there_change_no_digest(run_config: MakeConfig, tmp_path: Path) -> None:
    tree = run_config(tmp_path).result_part()
    assert "label" not in tree["data"]["calibration"]
    assert "label" not in tree["data"]["test"]
