"""The networks. Importing this package registers them: MODELS, AUTOENCODERS, TEXT_ENCODERS."""

from opensora.models import autoencoder, mmdit, text

__all__ = ["autoencoder", "mmdit", "text"]
