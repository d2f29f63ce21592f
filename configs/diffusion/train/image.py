"""Text-to-image: the first stage of training, and the base that the other training configs build on.

Hardware: 8 GPUs of 80 GB (the 11B model under ZeRO-2). Data: a table of images, or of videos, of which it takes frames.
"""

# ---- data: {resolution: {frames: (probability, samples per batch)}}
dataset = {"type": "video_text", "transform_name": "resize_crop", "fps_max": 24, "vmaf": True}
bucket_config = {
    "256px": {1: (1.0, 50)},
    "768px": {1: (0.5, 11)},
    "1024px": {1: (0.5, 7)},
}
num_workers = 12
prefetch_factor = 2
num_bucket_build_workers = 64
pin_memory_cache_pre_alloc_numels = [280 << 20] * 24 + [54 << 20] * 4

# ---- model: 11.9B parameters; the first 8 double blocks and all single blocks are recomputed in the backward pass
grad_checkpoint = True
grad_ckpt_settings = (8, 100)
model = {
    "type": "flux",
    "from_pretrained": None,
    "strict_load": False,
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "grad_ckpt_settings": grad_ckpt_settings,
    "in_channels": 64,  # 16 latent channels, 2 x 2 latents a token
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "qkv_bias": True,
}

# ---- frozen parts
ae = {
    "type": "hunyuan_vae",
    "from_pretrained": "./ckpts/hunyuan_vae.safetensors",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_spatial_tiling": True,
    "use_temporal_tiling": False,
}
is_causal_vae = True
t5 = {"type": "text_embedder", "from_pretrained": "google/t5-v1_1-xxl", "max_length": 512, "shardformer": True}
clip = {"type": "text_embedder", "from_pretrained": "openai/clip-vit-large-patch14", "max_length": 77}
dropout_ratio = {"t5": 0.31622777, "clip": 0.31622777}  # both at once: 10 % of the samples

# ---- optimization
lr = 1e-5
eps = 1e-15
optim = {"cls": "HybridAdam", "lr": lr, "eps": eps, "weight_decay": 0.0, "adamw_mode": True}
warmup_steps = 0
update_warmup_steps = True
grad_clip = 1.0
accumulation_steps = 1
ema_decay = None

# ---- precision and devices
dtype = "bf16"
plugin = "zero2"
plugin_config = {"reduce_bucket_size_in_m": 128, "overlap_allgather": False}

# ---- the run
seed = 42
epochs = 1000
outputs = "outputs"
log_every = 10
ckpt_every = 100
keep_n_latest = 20
async_io = False
save_master_weights = True
load_master_weights = True
wandb_project = "mmdit"
