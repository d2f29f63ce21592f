"""The image model for text-to-image-to-video: flux-dev (12B) and its autoencoder, beside the video model."""

use_t2i2v = True
img_resolution = "768px"
img_flux = {
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
img_flux_ae = {
    "type": "autoencoder_2d",
    "from_pretrained": "./ckpts/flux1-dev-ae.safetensors",
    "resolution": 256,
    "in_channels": 3,
    "ch": 128,
    "out_ch": 3,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_channels": 16,
    "scale_factor": 0.3611,
    "shift_factor": 0.1159,
}
