"""stage1 with one sample a batch and few lengths: a short run of the whole 11B path to see that a machine can do it.

Hardware: 8 GPUs of 80 GB. (For a run that ends in minutes on any machine see shapes.py.)
"""

_base_ = ["stage1.py"]

bucket_config = {"_delete_": True, "256px": dict.fromkeys((1, 33, 97, 129), (1.0, 1))}
