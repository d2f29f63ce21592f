"""Group normalisation and SiLU in one kernel, compiled once for all sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In diffusers' blocks: an activation, and the normalisations that it follows.
FOLLOWS = {"nonlinearity": ("norm1", "norm2"), "conv_act": ("conv_norm_out",)}


def fuse_norms(vae: nn.Module) -> None:
    """Compile each normalisation of a diffusers autoencoder together with the SiLU after it, for inference only.

    Parameters keep their names. There is one graph for a single sample and one for several, whatever their sizes. A
    whole encoder would be compiled anew, for minutes, for images, for videos and for tiles at an edge, and not at all
    with dynamic sizes in PyTorch 2.13, whose Inductor fails on the strides of a padded Conv3d.
    """
    function = torch.compile(_group_norm_silu, dynamic=True)
    for block in list(vae.modules()):
        for activation, norms in FOLLOWS.items():
            if isinstance(getattr(block, activation, None), nn.SiLU):
                setattr(block, activation, nn.Identity())
                for name in norms:
                    setattr(block, name, NormSiLU(getattr(block, name), function))


class NormSiLU(nn.Module):
    """`function` of the parameters of a group normalisation, which keep their names."""

    def __init__(self, norm: nn.GroupNorm, function: Callable[..., Tensor]):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        # detached: the sizes of parameters, and of what a view is of, would be constants to the compiler
        rows = x.flatten(2).detach()  # [B, C, N]
        weight, bias = self.weight.detach(), self.bias.detach()
        return self.function(rows, self.num_groups, weight, bias, self.eps).reshape(x.shape)


def _group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
