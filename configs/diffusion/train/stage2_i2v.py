"""Image-to-video up to 768px: stage2 for a model that is also given the first frame, the last one, or both.

Hardware: hundreds of GPUs of 140 GB and more; the larger batches rest on activations that are offloaded to the host.
"""

_base_ = ["stage2.py"]

bucket_config = {
    "_delete_": True,
    "256px": {
        1: (1.0, 195),
        **{
            t: (1.0, size)
            for first, size in ((5, 80), (37, 40), (69, 28), (101, 23))
            for t in range(first, first + 32, 4)
        },
    },
    "768px": {
        1: (0.5, 38),
        **{
            t: (0.5, size) for first, size in ((5, 10), (37, 5), (69, 3), (101, 2)) for t in range(first, first + 32, 4)
        },
    },
}

model = {"cond_embed": True}
condition_config = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
grad_ckpt_buffer_size = 25 << 30  # 25 GiB of pinned host memory
