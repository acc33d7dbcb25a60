"""What a recovery must keep to continue: trained parameters and the moments of AdamW."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig

WEIGHT_DECAY = 0.01


class TrainState:
    """Model and AdamW moments, saved as safetensors (no pickle on shared storage)."""

    def __init__(self, model: PreTrainedModel, config: RecoverConfig) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )

    def save(self, folder: Path, step: int) -> None:
        """Write trained parameters and optimiser moments."""
        tensors: dict[str, torch.Tensor] = {"step": torch.tensor([step])}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state[parameter]
            tensors |= {
                f"parameter.{name}": parameter.detach(),
                f"first.{name}": moments["exp_avg"],
                f"second.{name}": moments["exp_avg_sq"],
            }
        save_file(tensors, folder / "state.safetensors")

    def load(self, folder: Path) -> int:
        """Restore what :meth:`save` wrote; returns the step."""
        tensors = load_file(folder / "state.safetensors")
        step = int(tensors["step"][0])
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"first.{name}"].to(parameter),
                    "exp_avg_sq": tensors[f"second.{name}"].to(parameter),
                }
        return step
