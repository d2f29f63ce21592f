"""Open-Sora: train and sample video diffusion transformers from a config file and a table of videos."""

__version__ = "0.1.0"
