"""Text-to-video at 256px, with images up to 1024px beside the clips: the main stage.

Hardware: 8 GPUs of 80 GB and more. Data: clips of up to 129 frames.
"""

_base_ = ["image.py"]

dataset = {"memory_efficient": False}
bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 45),
        # 5-33, 37-65, 69-97 and 101-129 frames: the longer the clips, the fewer in a batch
        **{
            t: (1.0, size) for first, size in ((5, 12), (37, 6), (69, 4), (101, 3)) for t in range(first, first + 32, 4)
        },
    },
    "768px": {1: (0.5, 13)},
    "1024px": {1: (0.5, 7)},
}

lr = 5e-5
optim = {"lr": lr}
ckpt_every = 2000
