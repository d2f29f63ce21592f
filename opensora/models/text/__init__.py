"""Text encoders by name (`TEXT_ENCODERS`)."""

from opensora.models.text.embedder import TextEmbedder, cut_summary
from opensora.models.text.loading import text_width

__all__ = ["TextEmbedder", "cut_summary", "text_width"]
