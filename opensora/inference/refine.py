"""Prompts rewritten, and their motion rated, by a language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opensora.common import get_logger
from opensora.inference.language_model import AnswerFile, Endpoint
from opensora.inference.prompts import Prompt
from opensora.inference.references import condition_type

DYNAMIC = "dynamic"  # as motion_score: let the language model rate each prompt

INSTRUCTIONS = {
    "video": (
        "You write prompts for a text-to-video model. Rewrite the user's prompt as one paragraph of 60 to 120 "
        "English words that describes a single continuous shot of about five seconds: the subject and how it "
        "looks, what it does and how it moves, the surroundings, the light, the style and the camera. Keep "
        "everything the user asks for, add nothing that contradicts it, and describe only what can be seen. Answer "
        "with the paragraph alone."
    ),
    "animation": (
        "You write prompts for a model that continues a given picture as a video. Rewrite the user's prompt as one "
        "paragraph of 30 to 80 English words about what moves, how it moves and what the camera does. Keep "
        "everything the user asks for and invent nothing about how things look: the picture shows that. Answer "
        "with the paragraph alone."
    ),
    "image": (
        "You write prompts for a text-to-image model. Rewrite the user's prompt as one paragraph of 50 to 100 "
        "English words that describes a single picture: the subject, the surroundings, the composition, the light "
        "and the style. Keep everything the user asks for and add nothing that contradicts it. Answer with the "
        "paragraph alone."
    ),
    "motion": (
        "Rate how much moves in the video that the user describes, from 1 (nearly still) over 4 (ordinary motion) "
        "to 7 (fast and violent motion). Answer with the digit alone."
    ),
}


def endpoint_of(cfg) -> Endpoint | None:
    """The language model that the settings need; None if they need none.

    Raises:
        ValueError: they need one, and the environment names none.
    """
    if cfg["refine_prompt"]:
        return Endpoint.from_environment(cfg["refine_model"], "refine_prompt=True")
    if cfg["motion_score"] == DYNAMIC:
        return Endpoint.from_environment(cfg["refine_model"], f"motion_score='{DYNAMIC}'")
    return None


def refine(cfg, prompts: Sequence[Prompt], is_image: bool, folder: Path, part: str = "") -> list[Prompt]:
    """The prompts with what a language model makes of them, as far as the settings ask for it.

    Answers are kept in `folder`, so that samples drawn later have the same text; `part` names the rows of a call that
    draws a part of a list.
    """
    endpoint = endpoint_of(cfg)
    if endpoint is None or not prompts:
        return list(prompts)
    answers = AnswerFile(folder, part)
    if cfg["refine_prompt"]:
        prompts = _rewritten(prompts, is_image, condition_type(cfg), answers, endpoint)
    if cfg["motion_score"] == DYNAMIC and not is_image:
        texts = [prompt.description for prompt in prompts]
        scores = answers.all(endpoint, "motion", INSTRUCTIONS["motion"], texts, read_score)
        prompts = [replace(prompt, motion=scores[prompt.description]) for prompt in prompts]
    return list(prompts)


def _rewritten(
    prompts: Sequence[Prompt], is_image: bool, cond_type: str, answers: AnswerFile, endpoint: Endpoint
) -> list[Prompt]:
    def task(prompt: Prompt) -> str:
        if is_image:
            return "image"
        return "animation" if prompt.references and cond_type != "t2v" else "video"

    refined: dict[int, str] = {}
    for name in sorted(set(map(task, prompts))):
        of_task = [prompt for prompt in prompts if task(prompt) == name]
        found = answers.all(endpoint, name, INSTRUCTIONS[name], [p.text for p in of_task], clean_text)
        refined |= {prompt.index: found[prompt.text] for prompt in of_task}
    get_logger().info(f"refined prompts, the first: {refined[prompts[0].index]}")
    return [replace(prompt, refined=refined[prompt.index]) for prompt in prompts]


def clean_text(answer: str) -> str:
    """One line, without what models put around an answer: their reasoning, quotes."""
    answer = re.sub(r"<think>.*?</think>", " ", answer, flags=re.DOTALL)
    text = " ".join(answer.split())
    text = text[1:-1].strip() if text[:1] == text[-1:] == '"' and text.count('"') == 2 else text
    if not text:
        raise ValueError("the language model answered a prompt with nothing: give another --refine-model")
    return text


def read_score(answer: str) -> str:
    """The first digit from 1 to 7 of an answer; ValueError if it has none."""
    found = re.search(r"(?<![\d.])[1-7](?![\d.]*\d)", clean_text(answer))
    if not found:
        raise ValueError(f"the language model was to rate motion from 1 to 7 and answered '{answer[:100]}'")
    return found[0]
