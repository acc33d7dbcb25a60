"""Configuration of a run: a typed, frozen tree; unknown keys are errors; stored beside the result."""

from cria_dist.config.inputs import CorpusConfig, DataConfig, ModelConfig, RecordConfig
from cria_dist.config.prune import PruneConfig, Repair
from cria_dist.config.recover import RecoverConfig
from cria_dist.config.run import EvaluateConfig, RunConfig, RunSettings
from cria_dist.config.section import Section
from cria_dist.config.sweep import SweepConfig

__all__ = [
    "CorpusConfig",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PruneConfig",
    "RecordConfig",
    "RecoverConfig",
    "Repair",
    "RunConfig",
    "RunSettings",
    "Section",
    "SweepConfig",
]
