"""What is appended to a caption: the clip's frame rate and how much moves in it, which prompts can ask for later."""

from __future__ import annotations

import math

from opensora.data.frame_rate import map_target_fps


def caption(text: str, fps: float, score: float | None, fps_max: float | None, vmaf: bool) -> str:
    """The text that the encoders get.

    Args:
        text: the caption as the table has it.
        fps: of the file, NaN where unknown; the rate of the clip after `fps_max` is told.
        score: motion score (vmafmotion), None or NaN where unknown; told, rounded, if `vmaf`.
        fps_max: None tells no rate.

    Returns:
        e.g. "A cat. 24 FPS, 3 motion score.", "A cat. 23.976 FPS.", "A cat. 3 motion score.", "A cat."
    """
    facts = []
    new_fps, _ = map_target_fps(fps, fps_max)
    if fps_max is not None and new_fps > 0:
        facts.append(f"{new_fps} FPS")
    if vmaf and score is not None and not math.isnan(score):
        facts.append(f"{int(score + 0.5)} motion score")
    return f"{text} {', '.join(facts)}." if facts else text
