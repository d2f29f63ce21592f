"""Text encoders by name (`TEXT_ENCODERS`)."""

from opensora.models.text.embedder import TextEmbedder, text_width

__all__ = ["TextEmbedder", "text_width"]
