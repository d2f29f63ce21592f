"""Samples of fixed prompts, drawn while training as `scripts/diffusion/inference.py` draws them from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.common import get_logger
from opensora.data.aspect import resolution_area
from opensora.diffusion.random import SampleRandom, derive_seed
from opensora.inference.output import sample_suffix, save_sample, to_uint8
from opensora.inference.prompts import Prompt, PromptFile, add_fps, prompts_from_texts
from opensora.inference.sampler import Sampler, SamplerOptions, TextEmbedding
from opensora.inference.size import Compression, SampleSize
from opensora.parallel.context import ParallelContext
from opensora.parallel.work import SharedWork
from opensora.registry import AUTOENCODERS
from opensora.training.encoders import TextEncoders

CRF = 18
DEFAULT_FPS = 24
PROMPT_FILES = (".csv", ".txt")


class DrawnSample(NamedTuple):
    """A sample's prompt and its file."""

    prompt: str
    path: Path


def read_prompts(eval_prompts: str | Sequence[str] | None) -> list[Prompt]:
    """Of the setting: prompts, or a file of them.

    Raises:
        ValueError, FileNotFoundError: no such file, one without prompts, or prompts with references.
    """
    if eval_prompts is None:
        return []
    if not isinstance(eval_prompts, str) and len(eval_prompts) == 1:
        eval_prompts = eval_prompts[0]
    if not isinstance(eval_prompts, str) or Path(eval_prompts).suffix not in PROMPT_FILES:
        return prompts_from_texts(eval_prompts, None, "")
    try:
        prompts = PromptFile(eval_prompts).prompts(None, "")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("dataset.data_path", "eval_prompts")) from error
    if not prompts:
        raise ValueError(f"eval_prompts={eval_prompts}: there is no prompt in it")
    if any(prompt.references for prompt in prompts):
        raise ValueError(
            f"eval_prompts={eval_prompts}: samples while training are of text alone: leave the column 'ref' out"
        )
    return prompts


def eval_size(cfg: Mapping[str, Any]) -> SampleSize:
    """Of the setting `eval_option`, where that says nothing the longest clip of the lowest resolution that is trained.

    Raises:
        ValueError: half a size, or frames that do not fit the autoencoder.
    """
    option, buckets = dict(cfg["eval_option"]), cfg["bucket_config"]
    resolution = min((name for name in buckets if buckets[name]), key=resolution_area)
    if option["resolution"] is None and option["height"] is None:
        option["resolution"] = resolution
    if option["num_frames"] is None:
        option["num_frames"] = max(buckets.get(option["resolution"]) or buckets[resolution])
    return SampleSize.from_config(
        option, Compression.of(AUTOENCODERS.get(cfg["ae"]["type"])), cfg["model"].get("patch_size", 2)
    )


class PromptSamples:
    """Draws one sample of each prompt; the data-parallel ranks share the prompts.

    A sample's seed is that of its place in the list, as at inference: the same weights give the same sample there.

    Args:
        prompts: of all ranks.
        text: embeds them once, here; the embeddings wait on the host.
        autoencoder: decodes; to be on the device when samples are drawn.
    """

    def __init__(
        self, cfg, prompts: list[Prompt], text: TextEncoders, autoencoder: nn.Module, context: ParallelContext
    ):
        self._size, self._prompts, self._context = eval_size(cfg), prompts, context
        self._work = SharedWork(context)
        self._autoencoder, self._dtype = autoencoder, text.dtype
        self._options = SamplerOptions.from_config(cfg.eval_option)
        self._seed = cfg.seed if cfg.eval_option.seed is None else cfg.eval_option.seed
        fps = float(cfg.dataset.get("fps_max") or DEFAULT_FPS)
        self._fps = int(fps) if fps.is_integer() else fps  # captions say "24 FPS", not "24.0 FPS"
        self._mine = prompts[context.data_parallel_rank :: context.data_parallel_size]
        self._texts = {
            prompt.index: [_embed(text, caption) for caption in (self._spoken(prompt), prompt.negative)]
            for prompt in self._mine
        }

    def _spoken(self, prompt: Prompt) -> str:
        """The prompt as the model reads it."""
        return prompt.text if self._size.is_image else add_fps(prompt.text, self._fps)

    def draw(self, model: nn.Module, folder: Path) -> list[DrawnSample]:
        """Draw and write this rank's samples; returns those of all ranks, as far as they could be written."""
        sampler, written = Sampler(model, self._options, self._dtype, self._context.model.of_first), []
        for prompt in self._mine:
            video = self._sample(sampler, prompt)
            if self._context.model.rank == 0 and self._write(prompt, video, folder):  # its ranks drew the same
                written.append(prompt.index)
        self._work.wait()  # others may have one prompt more, which takes what it takes
        written = set(chain.from_iterable(self._context.gather_objects(written)))
        drawn = [prompt for prompt in self._prompts if prompt.index in written]
        return [DrawnSample(prompt.text, self._path(prompt, folder)) for prompt in drawn]

    def _write(self, prompt: Prompt, video: Tensor, folder: Path) -> bool:
        """Whether the sample could be written; if not, it is said why."""
        path = self._path(prompt, folder)
        try:
            save_sample(path, video, self._fps, CRF, prompt.text)
        except Exception as error:  # a full disk must not end a run of weeks
            get_logger().warning(f"evaluation goes without {path}, which cannot be written: {error}")
            return False
        return True

    def _path(self, prompt: Prompt, folder: Path) -> Path:
        return folder / (prompt.name + sample_suffix(self._size.num_frames))

    @torch.inference_mode()
    def _sample(self, sampler: Sampler, prompt: Prompt) -> Tensor:
        """Frames uint8 [T, H, W, 3] on the host."""
        size, device = self._size, self._context.device
        draws = SampleRandom([derive_seed(self._seed, prompt.index, 0)], "cpu")
        latent_size = self._autoencoder.latent_size((size.num_frames, size.height, size.width))
        noise = draws.normal((self._autoencoder.latent_channels, *latent_size)).to(device)  # [1, C, t, h, w]
        text, negative = (
            TextEmbedding(*(part.to(device) for part in embedding)) for embedding in self._texts[prompt.index]
        )
        latents = sampler(noise, text, negative)
        return to_uint8(self._autoencoder.decode(latents.to(self._dtype))[0])


def _embed(text: TextEncoders, caption: str) -> tuple[Tensor, Tensor]:
    """[1, S, D] of T5, [1, V] of CLIP; on the host."""
    entries = text.entries([caption])
    return entries["t5"].cpu(), entries["clip"].cpu()
