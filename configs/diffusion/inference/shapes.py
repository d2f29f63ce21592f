"""Sampling with the demo's model of moving shapes; also --cond_type i2v_head --ref FIRST_FRAME.png.

Hardware: any.
"""

save_dir = "samples"
seed = 42
batch_size = 16
dtype = "fp32"
use_ema = True

cond_type = "t2v"
dataset = {"type": "text"}
sampling_option = {
    "resolution": "64px",
    "aspect_ratio": "1:1",
    "num_frames": 9,
    "num_steps": 24,
    "shift": True,
    "guidance": 4.0,
    "guidance_img": 1.0,
    "text_osci": True,
    "image_osci": False,
    "scale_temporal_osci": False,
    "method": "i2v",
    "seed": None,
}
fps_save = 12

model = {
    "type": "flux",
    "from_pretrained": "./outputs/shapes",
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
ae = {"type": "linear_causal", "from_pretrained": "./ckpts/shapes/ae.safetensors"}
t5 = {"type": "text_embedder", "from_pretrained": "./ckpts/shapes/t5", "max_length": 12}
clip = {"type": "text_embedder", "from_pretrained": "./ckpts/shapes/clip", "max_length": 16}
