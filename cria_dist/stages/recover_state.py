"""What a recovery must keep to continue: trained parameters, the moments of AdamW, the best parameters so far."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.stages.recover_shards import write_together
from cria_dist.stages.recover_slices import fill

WEIGHT_DECAY = 0.01
STATE = "state.safetensors"


class TrainState:
    """Model and AdamW moments, saved as safetensors (no pickle on shared storage), whole for any number of workers.

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
        self.best = {
            name: parameter.detach().clone() if isinstance(parameter, DTensor) else parameter.detach().cpu().clone()
            for name, parameter in self.trained.items()
        }
        self.best_loss, self.waited = loss, 0

    def take_best(self) -> None:
        """Go back to the best parameters, if a loss was watched."""
        with torch.no_grad():
            for name, values in (self.best or {}).items():
                self.trained[name].copy_(values)

    def save(self, folder: Path, step: int, rank: int = 0) -> None:
        """Write trained parameters and optimiser moments; all workers call this, and the first one writes."""
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
        write_together(folder / STATE, tensors, rank, {name: tensor.dtype for name, tensor in tensors.items()})

    def load(self, folder: Path) -> int:
        """Restore what :meth:`save` wrote with any number of workers; returns the step."""
        with safe_open(folder / STATE, framework="pt") as file:
            step = int(file.get_tensor("step")[0])
            for name, parameter in self.trained.items():
                moments = [torch.empty_like(parameter) for _ in range(2)]
                for target, kind in zip((parameter.detach(), *moments), ("parameter", "first", "second"), strict=True):
                    fill(target, file.get_tensor(f"{kind}.{name}"))
                state = {"step": torch.tensor(float(step)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
                self.optimizer.state[parameter] = state
            if "watched" in file.keys():  # noqa: SIM118  (a file, not a mapping)
                best_loss, waited = file.get_tensor("watched").tolist()
                self.remember(best_loss)
                self.waited = int(waited)
                for name, values in (self.best or {}).items():
                    fill(values, file.get_tensor(f"best.{name}"))
        return step
