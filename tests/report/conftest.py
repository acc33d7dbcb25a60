"""A realistic report without a model: 30 layers of 1536 units with scores, spectra and a loss curve."""

from dataclasses import replace

import numpy as np
import pytest

from cria_dist.records import Evaluation, Generation, Report, Scores, Site, SiteEvidence, Spectrum, StageTime

LAYERS = 30
UNITS = 1536


def site_evidence(layer: int, with_spectrum: bool = True) -> SiteEvidence:
    rng = np.random.default_rng(layer)
    keep_N = rng.lognormal(-4 - layer / 10, 1.0 + layer / 30, UNITS)
    dead = 3 * (layer % 4)
    keep_N[:dead] = -np.inf
    kept = np.sort(np.argsort(keep_N)[round((0.1 + 0.2 * layer / LAYERS) * UNITS) :])
    values_K = np.exp(2 - layer / 15) * np.arange(1, UNITS) ** -(0.5 + layer / 60.0)
    return SiteEvidence(
        site=Site(layer),
        scores=Scores(
            site=Site(layer),
            keep_N=keep_N,
            cost_N=np.full(UNITS, 3 * 576, dtype=np.int64),
            spectrum=Spectrum(values_K, residual=2.5e-9, complete=True) if with_spectrum else None,
            facts={"components": 1.0 + layer % 3, "mean_degree": 10.5 + layer, "dead": float(dead)},
        ),
        kept=tuple(int(index) for index in kept),
    )


def evaluation(label: str, method: str, repair: str, perplexity: float, parameters: int = 118_600_000) -> Evaluation:
    return Evaluation(
        label=label,
        method=method,
        repair=repair,
        parameters=parameters,
        perplexity=perplexity,
        scored_tokens=8176,
        weight_bytes=parameters * 4,
        prefill_ms=parameters / 1e6,
        decode_ms=parameters / 4.2e6,
    )


@pytest.fixture(scope="session")
def evidence() -> tuple[SiteEvidence, ...]:
    return tuple(site_evidence(layer) for layer in range(LAYERS))


@pytest.fixture(scope="session")
def report() -> Report:
    dense = evaluation("dense", "", "none", 21.32, parameters=134_515_008)
    rng = np.random.default_rng(0)
    return Report(
        name="demo",
        command="python -m jobs.prune jobs/configs/demo.toml prune.ratio=0.2",
        config={"name": "demo", "prune": {"ratio": 0.2}, "evaluate": {"prompts": ["a & b"]}},
        versions={"torch": "2.9.0", "machine": "2 CPU cores, 24 GiB"},
        digests={"model": "ab" * 32, "plan": "cd" * 32},
        protocol=("Token mean over 16 sequences of 512 tokens.", "Latency is the median of 5 repeats at batch 1."),
        effective_parameter_reduction=0.1183,
        variants=(
            dense,
            evaluation("pruned", "cria", "none", 91.57),
            evaluation("repaired", "cria", "least_squares", 33.14),
            evaluation("recovered", "cria", "least_squares", 26.75),
        ),
        comparison=(
            evaluation("cria, paper's score", "cria", "none", 412.75),
            evaluation("cria, paper's score", "cria", "least_squares", 58.02),
            evaluation("random", "random", "none", 159.04),
            evaluation("random", "random", "least_squares", 72.51),
            evaluation("magnitude", "magnitude", "least_squares", 41.23),
            evaluation("magnitude", "magnitude", "none", 88.1),
        ),
        generations=(
            Generation(
                "Question: What is the capital of France?\nAnswer:",
                {
                    "dense": " Paris.\nQuestion: What is the capital of Italy?\nAnswer: Rome.",
                    "pruned": " The the the capital of the the",
                    "repaired": " Paris is the capital and",
                    "recovered": " Paris. It is on the river Seine.",
                },
            ),
            Generation("<script>alert('x')</script> [/bold] \x1b[31m", {"dense": 'a < b & "c"', "pruned": "[red]"}),
        ),
        stages=tuple(
            StageTime(*one)
            for one in [("record", 41.3), ("analyse", 95.0), ("decide", 0.2), ("apply", 12.5), ("recover", 610.0)]
        ),
        loss=tuple((step, float(3 + np.exp(-step / 20) + rng.normal(0, 0.1))) for step in range(1, 101)),
        loaders={"transformers": "loaded in a fresh process, equal logits", "vLLM": "not tried"},
    )


@pytest.fixture(scope="session")
def bare_report(report: Report) -> Report:
    """The least a run can have: dense and pruned, nothing timed, no recovery."""
    variants = tuple(replace(one, prefill_ms=None, decode_ms=None) for one in report.variants[:2])
    return replace(report, variants=variants, comparison=(), generations=(), stages=(), loss=(), loaders={})
