"""Sampling at 768px by way of an image: flux draws the first frame from the text, Open-Sora 2.0 (11B) moves it.

Hardware: 8 GPUs of 80 GB.
"""

_base_ = ["768px.py", "plugins/t2i2v.py"]
