"""Image-to-video at 256px: stage1 for a model that is also given the first frame, the last one, or both.

Hardware: 8 GPUs of 80 GB and more. Start from stage1's weights (--model.from_pretrained); the condition's layer, which
they lack, starts at zero.
"""

_base_ = ["stage1.py"]

model = {"cond_embed": True}
condition_config = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}

lr = 1e-5
optim = {"lr": lr}
