"""Sampling with Open-Sora 2.0 (11B) at 768px.

Hardware: 8 GPUs of 80 GB, which share a sequence (plugins/sp.py).
"""

_base_ = ["256px.py", "plugins/sp.py"]

sampling_option = {"resolution": "768px"}
