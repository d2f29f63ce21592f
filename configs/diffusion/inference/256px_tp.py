"""Sampling with Open-Sora 2.0 (11B) at 256px on GPUs that can't hold the model alone.

Hardware: 8 GPUs of 24 GB and more, which share each layer (plugins/tp.py).
"""

_base_ = ["256px.py", "plugins/tp.py"]
