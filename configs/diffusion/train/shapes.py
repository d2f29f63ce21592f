"""The demo: a 5M-parameter model of moving shapes, trained from scratch in minutes.

Hardware: two CPU cores, or one GPU. Data: `make demo`, or scripts/demo/make_shapes.py and scripts/cnv/meta.py.
"""

# ---- data: clips of 9 and 5 frames and images, all 64 x 64
dataset = {"type": "video_text", "transform_name": "resize_crop", "fps_max": 12}
bucket_config = {"64px": {1: (1.0, 32), 5: (1.0, 16), 9: (1.0, 16)}}
num_workers = 1
prefetch_factor = 4

# ---- the frozen parts, made by scripts/demo/make_shapes.py
ae = {"type": "linear_causal", "from_pretrained": "./ckpts/shapes/ae.safetensors"}
t5 = {"type": "text_embedder", "from_pretrained": "./ckpts/shapes/t5", "max_length": 12}
clip = {"type": "text_embedder", "from_pretrained": "./ckpts/shapes/clip", "max_length": 16}
dropout_ratio = {"t5": 0.1, "clip": 0.1}

# ---- the model: Open-Sora 2.0's architecture, 16 times narrower, with 6 blocks
model = {
    "type": "flux",
    "from_pretrained": None,
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "in_channels": 64,  # 16 latent channels, 2 x 2 latents a token
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 192,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 16, 16],
    "theta": 100,  # positions go up to 3
    "qkv_bias": True,
    "cond_embed": True,
}
condition_config = {"t2v": 9, "i2v_head": 1}

# ---- optimization
lr = 2e-3
eps = 1e-8
optim = {"cls": "HybridAdam", "lr": lr, "eps": eps, "weight_decay": 0.0, "betas": (0.9, 0.99)}
warmup_steps = 50
use_cosine_scheduler = True
max_steps = 480
epochs = 100
grad_clip = 1.0
ema_decay = 0.99

dtype = "fp32"
plugin = "zero2"
plugin_config = {"reduce_bucket_size_in_m": 8, "overlap_allgather": False}
grad_checkpoint = False

# ---- what it leaves
seed = 42
outputs = "outputs"
exp_name = "shapes"
log_every = 20
ckpt_every = 100
keep_n_latest = 2
