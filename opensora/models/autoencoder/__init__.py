"""Autoencoders by name: `AUTOENCODERS`."""

from opensora.models.autoencoder.flux_2d import Autoencoder2D
from opensora.models.autoencoder.hunyuan import HunyuanVAE
from opensora.models.autoencoder.linear_causal import LinearCausal

__all__ = ["Autoencoder2D", "HunyuanVAE", "LinearCausal"]
