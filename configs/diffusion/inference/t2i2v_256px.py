"""Sampling at 256px by way of an image: flux draws the first frame from the text, Open-Sora 2.0 (11B) moves it.

Hardware: 1 GPU of 80 GB.
"""

_base_ = ["256px.py", "plugins/t2i2v.py"]
