"""What a recovery must keep to continue: trained parameters, the moments of AdamW, the best parameters so far."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig

WEIGHT_DECAY = 0.01


class TrainState:
    """Model and AdamW moments, saved as safetensors (no pickle on shared storage).

    Attributes:
        trained: parameters that learn, by name.
        optimizer: AdamW on them.
        best: their values at the least held-out loss, where one is watched.
        best_loss: that loss.
        waited: looks at the held-out loss since then.
    """

    def __init__(self, model: PreTrainedModel, config: RecoverConfig) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self.best: dict[str, torch.Tensor] | None = None
        self.best_loss = float("inf")
        self.waited = 0

    def remember(self, loss: float) -> None:
        """Keep a copy of the parameters: nothing was better."""
        self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}
        self.best_loss, self.waited = loss, 0

    def take_best(self) -> None:
        """Go back to the best parameters, if a loss was watched."""
        with torch.no_grad():
            for name, values in (self.best or {}).items():
                self.trained[name].copy_(values)

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
        if self.best is not None:
            tensors |= {f"best.{name}": values for name, values in self.best.items()}
            tensors["watched"] = torch.tensor([self.best_loss, self.waited], dtype=torch.float64)
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
        if "watched" in tensors:
            self.best = {name: tensors[f"best.{name}"] for name in self.trained}
            self.best_loss, self.waited = float(tensors["watched"][0]), int(tensors["watched"][1])
        return step
