"""The page of `scripts/diffusion/app.py`, in gradio."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import torch

from opensora.data.aspect import resolution_sizes
from opensora.diffusion.conditions import CONDITIONS
from opensora.inference.plan import base_seed
from opensora.inference.studio import Studio, Wish

RESOLUTIONS = ("256px", "768px")


def import_gradio() -> ModuleType:
    try:
        import gradio
    except ImportError:
        raise ValueError('the page needs the package gradio: pip install -e ".[app]"') from None
    return gradio


def build_page(studio: Studio, cfg) -> Any:
    """A gradio Blocks whose first values are the config's; its endpoint for programs is /draw."""
    gr = import_gradio()

    def draw(
        prompt,
        references,
        cond_type,
        resolution,
        aspect_ratio,
        num_frames,
        num_steps,
        guidance,
        guidance_img,
        negative,
        motion_score,
        seed,
        progress=gr.Progress(),  # noqa: B008 (gradio's way to ask for one)
    ):
        num_steps = int(num_steps)
        option = {"num_frames": num_frames, "num_steps": num_steps, "guidance": guidance, "guidance_img": guidance_img}
        option |= {"resolution": resolution, "aspect_ratio": aspect_ratio}
        given = tuple(map(str, references or ()))
        wish = Wish(prompt or "", negative or "", cond_type, given, (motion_score or "").strip(), seed, option)
        steps, begin = iter(range(1, num_steps + 1)), time.perf_counter()
        progress(0, desc="reading the prompt")
        try:
            path = studio.draw(wish, lambda: progress((next(steps), num_steps), unit="steps"))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        except torch.OutOfMemoryError as error:
            said = "out of memory: ask for fewer frames or a smaller resolution, or start the page with --offload True"
            raise gr.Error(said, duration=None, print_exception=False) from error
        facts = f"{path} in {time.perf_counter() - begin:.1f} s"
        return (None, str(path), facts) if path.suffix == ".png" else (str(path), None, facts)

    with gr.Blocks(title="Open-Sora", analytics_enabled=False) as page:
        gr.Markdown(f"# Open-Sora\n`{cfg.model.get('from_pretrained') or 'a model with random weights'}`")
        with gr.Row():
            with gr.Column():
                inputs = _inputs(gr, cfg)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                outputs = [
                    gr.Video(label="Video", autoplay=True, loop=True),
                    gr.Image(label="Image", type="filepath"),
                    gr.Textbox(label="File", interactive=False),
                ]
        button.click(draw, inputs, outputs, api_name="draw")
    return page


def _inputs(gr: ModuleType, cfg) -> list[Any]:
    """In the order of the arguments of /draw."""
    option = cfg.sampling_option
    ratios = list(resolution_sizes(option.resolution or RESOLUTIONS[0], 16, training=False))
    conditions = list(CONDITIONS) if cfg.model.get("cond_embed") else ["t2v"]
    resolution = option.resolution if option.height is None else None
    motion = "" if cfg.motion_score is None else str(cfg.motion_score)
    return [
        gr.Textbox(label="Prompt", lines=4, placeholder="raining, sea"),
        gr.File(label="References: images or videos", file_count="multiple", type="filepath"),
        gr.Dropdown(conditions, value="t2v", label="What they give; t2v: there are none"),
        gr.Dropdown(list(RESOLUTIONS), value=resolution, label="Resolution", allow_custom_value=True),
        gr.Dropdown(ratios, value=option.aspect_ratio, label="Width : height"),
        gr.Number(option.num_frames, label="Frames: 4n + 1, or 1 for an image", precision=0, minimum=1),
        gr.Slider(1, 100, value=option.num_steps, step=1, label="Steps"),
        gr.Slider(0, 15, value=option.guidance, step=0.1, label="Guidance by the text"),
        gr.Slider(0, 15, value=option.guidance_img or 1.0, step=0.1, label="Guidance by the references"),
        gr.Textbox(cfg.neg, label="Not to be shown"),
        gr.Textbox(motion, label="Motion score, 1 (little) to 7 (much)"),
        gr.Number(base_seed(cfg), label="Seed", precision=0, minimum=0),
    ]
