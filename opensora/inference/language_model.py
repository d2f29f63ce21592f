"""A language model behind an endpoint like OpenAI's (vLLM, Ollama, llama.cpp, ...), asked about texts.

OPENAI_BASE_URL is the endpoint ("http://localhost:8000/v1"; without it OpenAI's own), OPENAI_API_KEY the key for it.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from opensora.common import get_logger
from opensora.durable import write_whole

OPENAI = "https://api.openai.com/v1"
TRIES = 3
WAIT = 2.0  # seconds before the second try, twice as many before the third
TIMEOUT = 120.0  # seconds for an answer
AT_ONCE = 8  # requests under way
ANSWERS = "refined_prompts"


class Endpoint(NamedTuple):
    """Where a language model answers, and which one."""

    url: str
    key: str | None
    model: str

    @classmethod
    def from_environment(cls, model: str, setting: str) -> Endpoint:
        """ValueError unless the environment names an endpoint; `setting` is what needs it, for the message."""
        url, key = (os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
        if not url and not key:
            raise ValueError(
                f"{setting} asks a language model, and there is none: set OPENAI_API_KEY, or OPENAI_BASE_URL to an "
                "endpoint like OpenAI's (http://localhost:8000/v1), and --refine-model to a model that it has"
            )
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL={url} must begin with http:// or https://")
        if not _has_valid_port(url):
            raise ValueError(f"OPENAI_BASE_URL={url} has a port that is none")
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY has characters that no key has: set it anew")
        return cls((url or OPENAI).rstrip("/"), key or None, model)

    def ask(self, instruction: str, text: str) -> str:
        """The model's answer to `text`.

        Raises:
            ValueError: no answer after `TRIES`, or the endpoint refuses the request.
        """
        failure = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                return _answer(self._post(instruction, text))
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}: {_first_line(error.read())}"
                if error.code not in (408, 429) and error.code < 500:
                    break  # the same request would be refused again
            except (OSError, ValueError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", error)) or type(error).__name__
        raise ValueError(
            f"the language model '{self.model}' at {self.url} gives no answer ({failure}): check OPENAI_BASE_URL, "
            "OPENAI_API_KEY and --refine-model"
        )

    def _post(self, instruction: str, text: str) -> bytes:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return response.read()


def _has_valid_port(url: str) -> bool:
    try:
        return urllib.parse.urlsplit(url).port != 0
    except ValueError:
        return False


def _answer(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"].strip()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"not an answer of this kind: {_first_line(body)}") from None
    if not text:
        raise ValueError("an empty answer")
    return text


def _first_line(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:200]


class AnswerFile:
    """Answers by model, task and text, kept in a json file: a list that is continued keeps its texts.

    part: of the file's name, so that calls for other parts of a list write other files. All of the folder are read.
    """

    def __init__(self, folder: Path, part: str = ""):
        self._path = folder / f"{ANSWERS}{part}.json"
        self._answers: dict[str, str] = {}
        for path in (*sorted(folder.glob(f"{ANSWERS}*.json")), self._path):  # where two differ, its own counts
            with suppress(OSError, ValueError):
                found = json.loads(path.read_text(encoding="utf-8"))
                self._answers |= found if isinstance(found, dict) else {}

    def all(
        self, endpoint: Endpoint, task: str, instruction: str, texts: Sequence[str], read: Callable[[str], str]
    ) -> Mapping[str, str]:
        """What `read` makes of the answer to each text, by text; those that are not in the file are asked for.

        task: names the instruction in the file.
        """
        keys = {text: json.dumps([endpoint.model, task, text], ensure_ascii=False) for text in texts}
        missing = [text for text, key in keys.items() if key not in self._answers]
        if missing:
            get_logger().info(f"asking '{endpoint.model}' at {endpoint.url} about {len(missing)} prompts")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = [
                (keys[text], pool.submit(lambda text: read(endpoint.ask(instruction, text)), text)) for text in missing
            ]
            try:
                for _, answer in asked:
                    answer.result()
            finally:
                pool.shutdown(cancel_futures=True)
                self._keep(asked)
        return {text: self._answers[key] for text, key in keys.items()}

    def _keep(self, asked: Sequence[tuple[str, Future[str]]]) -> None:
        """Those that were answered: after a failure, others were under way."""
        answered = [(key, answer) for key, answer in asked if not answer.cancelled() and not answer.exception()]
        self._answers |= {key: answer.result() for key, answer in answered}
        if answered:
            write_whole(self._path, json.dumps(self._answers, indent=1, ensure_ascii=False) + "\n")
