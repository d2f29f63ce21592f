"""Text encoders and their tokenizers from folders in the layout of the Hugging Face hub, or from the hub itself.

Weights are mapped (safetensors, and torch files in the zip format) and copied to their dtype and device one by one:
what a process allocates is the encoder in its dtype, or nothing where the file already has that dtype on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

POOLED = {
    "t5": False,
    "clip": True,
    "clip_text_model": True,
}  # by config.json's model_type: one vector per text or token
TOKENIZER_FILES = {False: "spiece.model", True: "vocab.json with merges.txt"}  # or tokenizer.json
SPIECE_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # what reads spiece.model
DOWNLOAD = "download it again (ckpts/README.md)"


def text_width(from_pretrained: str) -> int:
    """The width of a text encoder's embeddings, from its config.json alone."""
    return width_of(text_config(from_pretrained))


def width_of(config: Any) -> int:
    if config.model_type == "t5":
        return config.d_model
    return getattr(config, "text_config", config).hidden_size


def positions_of(config: Any) -> int:
    """The most tokens that a CLIP's text encoder takes."""
    return getattr(config, "text_config", config).max_position_embeddings


def text_config(from_pretrained: str) -> Any:
    """The transformers config of a folder or hub id; FileNotFoundError or ValueError if it is not a T5 or CLIP."""
    from transformers import AutoConfig

    folder = Path(from_pretrained)
    try:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise OSError("no config.json")  # transformers 4 would guess one from the folder's name
        config = AutoConfig.from_pretrained(from_pretrained)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"from_pretrained='{from_pretrained}' is neither a folder with the config.json of a text encoder nor a "
            "model that the Hugging Face hub gave: download it first (ckpts/README.md)"
        ) from error
    if config.model_type not in POOLED:
        raise ValueError(
            f"from_pretrained='{from_pretrained}' is a '{config.model_type}': give one of {', '.join(POOLED)}"
        )
    return config


def load_tokenizer(from_pretrained: str, pooled: bool) -> Any:
    """The tokenizer of a T5 (or, if `pooled`, CLIP) folder or hub id; ValueError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(from_pretrained)
    except Exception as error:  # each tokenizer library has errors of its own
        absent = [] if pooled else [name for module, name in SPIECE_PACKAGES.items() if not _importable(module)]
        if absent:
            raise ValueError(
                f"from_pretrained='{from_pretrained}': reading its spiece.model needs {' and '.join(absent)}: "
                f"pip install {' '.join(absent)}"
            ) from error
        raise _no_tokenizer(from_pretrained, pooled, first_line(error)) from error
    # Without a file that holds its vocabulary, transformers 5 makes a tokenizer that knows no letter.
    if tokenizer.unk_token_id in tokenizer("a", add_special_tokens=False).input_ids:
        raise _no_tokenizer(from_pretrained, pooled, "there is no vocabulary")
    return tokenizer


def load_encoder(from_pretrained: str, pooled: bool, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The T5 (or, if `pooled`, CLIP) text encoder in `dtype` on `device`, without gradients. Of a file that holds more
    (T5's decoder, CLIP's image encoder) only the encoder is read.

    With fp16, transformers keeps T5's `wo` in fp32: its activations leave the range of fp16.

    Raises:
        ValueError: weights that can't be read, are missing (transformers would draw them at random) or misshapen.
    """
    import transformers

    cls = transformers.CLIPTextModel if pooled else transformers.T5EncoderModel
    dtype_argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {dtype_argument: dtype, "device_map": {"": torch.device(device)}}
    try:
        with quiet_transformers():
            encoder, report = cls.from_pretrained(
                from_pretrained, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each file format has errors of its own
        raise ValueError(
            f"from_pretrained='{from_pretrained}': its weights can't be read ({first_line(error)}): {DOWNLOAD}"
        ) from error
    _check_whole(report, from_pretrained, cls.__name__)
    return encoder.eval().requires_grad_(False)


def _check_whole(report: dict[str, Any], from_pretrained: str, model: str) -> None:
    missing = sorted(report["missing_keys"])
    misshapen = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    if misshapen:
        raise ValueError(
            f"from_pretrained='{from_pretrained}': {len(misshapen)} weights have another shape than its config.json "
            f"says, the first '{misshapen[0]}': {DOWNLOAD}"
        )
    if missing:
        raise ValueError(
            f"from_pretrained='{from_pretrained}' lacks {len(missing)} weights of {model}, the first "
            f"'{missing[0]}': {DOWNLOAD}"
        )


def _no_tokenizer(from_pretrained: str, pooled: bool, reason: str) -> ValueError:
    return ValueError(
        f"from_pretrained='{from_pretrained}' has no tokenizer that can be read ({reason}): it needs tokenizer.json, "
        f"or {TOKENIZER_FILES[pooled]}: {DOWNLOAD}"
    )


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars (one for each rank) and its reports of weights that are not the encoder's."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
