"""Batch norm as it was before it was folded into a map: ``gamma x + beta``, x of mean 0 and deviation 1.

Of what the map makes, beta is the mean and gamma the deviation. They are measured on the data at hand, with which batch
norm computes while it is trained, too. Shapes: S examples, T places, N channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from cria_dist.errors import NumericError
from cria_dist.records import Float64, Site
from cria_dist.stages.examples import Examples

EXAMPLES = 512
"""How many are measured, the first ones; every one has as many places as the grid."""
BATCH = 32


@dataclass(frozen=True, slots=True)
class Norm:
    """Batch norm of the channels of a site.

    Attributes:
        shift_N: beta.
        share_N: gamma, as a share of the largest of all sites.
    """

    shift_N: Float64
    share_N: Float64


def measured_norms(model: PreTrainedModel, maps: Mapping[Site, str], data: Examples) -> dict[Site, Norm]:
    """The batch norms behind some maps.

    Args:
        model: the model.
        maps: module name of every site's map.
        data: what the model is trained on.

    Raises:
        NumericError: no channel differs from its mean anywhere, or one is not finite.
    """
    sums: dict[Site, list[torch.Tensor]] = {site: [] for site in maps}
    hooks = [model.get_submodule(name).register_forward_hook(_adding(sums[site])) for site, name in maps.items()]
    with torch.inference_mode():
        for part in data[:EXAMPLES].split(BATCH):
            model(**part.tensors(model.device)[0])
    for hook in hooks:
        hook.remove()
    found: dict[Site, tuple[Float64, Float64]] = {}
    for site, parts in sums.items():
        count_N, total_N, squares_N = torch.stack(parts).sum(dim=0).cpu().numpy()
        mean_N = total_N / count_N
        found[site] = mean_N, np.sqrt(np.maximum(squares_N / count_N - mean_N**2, 0.0))
    largest = np.max([scale_N.max() for _, scale_N in found.values()])
    if not 0 < largest < np.inf:
        raise NumericError(f"the largest scale of batch norm is {largest}; check the weights of the model")
    return {site: Norm(mean_N, scale_N / largest) for site, (mean_N, scale_N) in found.items()}


def rescaled(signal_STN: torch.Tensor, factor_N: torch.Tensor, shift_N: Float64) -> torch.Tensor:
    """``factor gamma x + beta`` of ``gamma x + beta``."""
    shift = torch.from_numpy(shift_N).to(signal_STN)
    return shift + factor_N.to(signal_STN.dtype) * (signal_STN - shift)


def _adding(parts: list[torch.Tensor]) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _args: object, made_STN: torch.Tensor) -> None:
        made_TN = made_STN.flatten(0, 1).double()
        parts.append(torch.stack([torch.full_like(made_TN[0], len(made_TN)), made_TN.sum(0), made_TN.square().sum(0)]))

    return hook
