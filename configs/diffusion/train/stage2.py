"""Text-to-video up to 768px: the last stage.

Hardware: hundreds of GPUs of 80 GB and more; every 4 of them share a sequence. Start from stage1's weights.
"""

_base_ = ["image.py"]

bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 130),
        **dict.fromkeys(range(5, 37, 4), (1.0, 14)),
        **dict.fromkeys(range(37, 69, 4), (1.0, 10)),
        **dict.fromkeys(range(73, 101, 4), (1.0, 7)),  # 69 frames are not among them, as documented
        **dict.fromkeys(range(101, 133, 4), (1.0, 6)),
    },
    "768px": {
        1: (1.0, 38),
        **{t: (1.0, size) for first, size in ((5, 6), (37, 4), (69, 3), (101, 2)) for t in range(first, first + 32, 4)},
    },
}

grad_ckpt_settings = (100, 100)
model = {"grad_ckpt_settings": grad_ckpt_settings}

plugin = "hybrid"
plugin_config = {
    "tp_size": 1,
    "pp_size": 1,
    "sp_size": 4,
    "sequence_parallelism_mode": "ring_attn",
    "enable_sequence_parallelism": True,
    "static_graph": True,
    "zero_stage": 2,
}

lr = 5e-5
optim = {"lr": lr}
ckpt_every = 200
