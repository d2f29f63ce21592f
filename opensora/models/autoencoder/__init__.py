"""Autoencoders by name (`AUTOENCODERS`): those that this version builds, and those whose settings it knows."""

from opensora.models.autoencoder import planned
from opensora.models.autoencoder.linear_causal import LinearCausal

__all__ = ["LinearCausal", "planned"]
