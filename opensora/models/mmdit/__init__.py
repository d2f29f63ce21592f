"""The multimodal diffusion transformer (flux architecture)."""

from opensora.models.mmdit.model import MMDiT

__all__ = ["MMDiT"]
