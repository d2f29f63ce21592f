"""Images with flux-dev (12B) and its autoencoder: what t2i2v_768px.py draws as first frames.

Hardware: 1 GPU of 80 GB.
"""

_base_ = "256px.py"

sampling_option = {
    "resolution": "768px",
    "num_frames": 1,
    "guidance": 4.0,
    "guidance_img": None,
    "text_osci": False,
    "image_osci": False,
    "scale_temporal_osci": False,
    "method": "distill",  # the model is told the guidance
}

model = {
    "_delete_": True,
    "type": "flux",
    "from_pretrained": "./ckpts/flux1-dev.safetensors",
    "guidance_embed": True,
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
    "cond_embed": False,
}
ae = {
    "_delete_": True,
    "type": "autoencoder_2d",
    "from_pretrained": "./ckpts/flux1-dev-ae.safetensors",
    "z_channels": 16,
    "scale_factor": 0.3611,
    "shift_factor": 0.1159,
}
