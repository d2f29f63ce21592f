"""Tensor parallelism on 8 GPUs: every layer of the transformer, and of the autoencoder, is split among them."""

plugin = "hybrid"
plugin_config = {"tp_size": 8, "pp_size": 1, "sp_size": 1, "zero_stage": 2, "overlap_allgather": False}
plugin_ae = "hybrid"
plugin_config_ae = {"tp_size": 8, "pp_size": 1, "sp_size": 1, "zero_stage": 2, "overlap_allgather": False}
