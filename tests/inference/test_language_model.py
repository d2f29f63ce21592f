"""Prompts refined through a real HTTP server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mmengine.config import ConfigDict

from opensora.inference import language_model
from opensora.inference.language_model import Endpoint
from opensora.inference.prompts import Prompt
from opensora.inference.refine import clean_text, read_score, refine


class Server:
    """Answers `reply(instruction, text)`; the first `failures` requests with `status`."""

    def __init__(self):
        self.requests, self.headers, self.failures, self.status = [], [], 0, 500
        self.reply = lambda instruction, text: text.upper()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*server.answer(self.path, dict(self.headers), body))

            def answer(self, status, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path, headers, body):
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            if self.failures:
                self.failures -= 1
                return self.status, b'{"error": {"message": "busy"}}'
        if path != "/v1/chat/completions":
            return 404, b"no such path"
        instruction, text = (message["content"] for message in body["messages"])
        content = self.reply(instruction, text)
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()

    @property
    def asked(self):
        return sorted(body["messages"][1]["content"] for body in self.requests)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(language_model, "WAIT", 0.01)
    yield server
    server.http.shutdown()
    server.http.server_close()


def config(**settings):
    defaults = {"refine_prompt": True, "refine_model": "a-model", "motion_score": "4"}
    defaults |= {"cond_type": "t2v", "use_t2i2v": False}
    return ConfigDict({**defaults, **settings})


def prompts(*texts, references=()):
    return [Prompt(i, text, "", references, f"p_{i}") for i, text in enumerate(texts)]


def test_prompts_are_rewritten_and_the_answers_kept(server, tmp_path):
    server.reply = lambda instruction, text: f'<think>hm,\n{text}</think>\n"{text},\nin detail 雨"\n'
    asked = prompts("a 'cat', 猫", "a dog", "a 'cat', 猫")
    refined = refine(config(), asked, is_image=False, folder=tmp_path)
    assert [prompt.description for prompt in refined] == [f"{prompt.text}, in detail 雨" for prompt in asked]
    assert [prompt.text for prompt in refined] == [prompt.text for prompt in asked]
    assert server.asked == sorted({prompt.text for prompt in asked})  # each text once
    assert all(body["model"] == "a-model" for body in server.requests)
    assert "Authorization" not in server.headers[0]

    assert refine(config(), asked, is_image=False, folder=tmp_path) == refined and len(server.requests) == 2
    refine(config(refine_model="another"), asked[1:2], is_image=False, folder=tmp_path)
    assert len(server.requests) == 3


def test_the_key_is_sent_and_kept_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    refine(config(), prompts("a cat"), is_image=False, folder=tmp_path)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_what_is_asked_depends_on_what_is_drawn(server, tmp_path):
    server.reply = lambda instruction, text: instruction
    video, image, animation = (
        refine(config(cond_type=cond_type), prompts("a", references=refs), is_image, tmp_path)[0].description
        for cond_type, refs, is_image in (("t2v", (), False), ("t2v", (), True), ("i2v_head", ("a.png",), False))
    )
    assert "text-to-video" in video and "text-to-image" in image and "continues a given picture" in animation


def test_motion_is_rated(server, tmp_path):
    server.reply = lambda instruction, text: "Score: 6" if "storm" in text else "2."
    cfg = config(refine_prompt=False, motion_score="dynamic")
    rated = refine(cfg, prompts("a storm", "a stone"), is_image=False, folder=tmp_path)
    assert [prompt.motion for prompt in rated] == ["6", "2"]
    assert [prompt.refined for prompt in rated] == [None, None]
    assert refine(cfg, prompts("a storm"), is_image=True, folder=tmp_path)[0].motion is None


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failures, server.status = 2, 503
    assert refine(config(), prompts("a"), is_image=False, folder=tmp_path)[0].refined == "A"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "failures", "reply", "requests", "complaint"),
    [
        (401, 9, None, 1, "HTTP 401: .*busy"),
        (500, 9, None, 3, "HTTP 500"),
        (200, 0, lambda *_: "", 3, "an empty answer"),
        (200, 0, lambda *_: None, 3, "not an answer of this kind"),
    ],
)
def test_no_answer_is_one_line(server, tmp_path, status, failures, reply, requests, complaint):
    server.status, server.failures, server.reply = status, failures, reply or server.reply
    with pytest.raises(ValueError, match=complaint) as error:
        refine(config(), prompts("a"), is_image=False, folder=tmp_path)
    assert "\n" not in str(error.value) and "check OPENAI_BASE_URL, OPENAI_API_KEY and --refine-model" in str(
        error.value
    )
    assert len(server.requests) == requests


def test_no_server_is_one_line(server, tmp_path):
    server.http.server_close()
    with pytest.raises(ValueError, match=r"gives no answer .*refused"):
        refine(config(), prompts("a"), is_image=False, folder=tmp_path)


def test_answers_before_a_failure_are_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "AT_ONCE", 2)
    server.reply = lambda instruction, text: None if text == "a" else text.upper()
    with pytest.raises(ValueError, match="gives no answer"):
        refine(config(), prompts("a", "b"), is_image=False, folder=tmp_path)
    server.reply, server.requests = lambda instruction, text: text.upper(), []
    refine(config(), prompts("a", "b", "c"), is_image=False, folder=tmp_path)
    assert sorted(server.asked) == ["a", "c"]


def test_calls_for_parts_of_a_list_write_files_of_their_own_and_know_each_others(server, tmp_path):
    refine(config(), prompts("a", "b"), False, tmp_path, "_0000-0001")
    refine(config(), prompts("b", "c"), False, tmp_path, "_0002-0003")
    assert sorted(server.asked) == ["a", "b", "c"]
    assert [p.refined for p in refine(config(), prompts("a", "b", "c"), False, tmp_path)] == ["A", "B", "C"]
    assert len(server.requests) == 3
    names = ["refined_prompts_0000-0001.json", "refined_prompts_0002-0003.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_answers_are_cleaned():
    assert clean_text('  "a cat"  ') == "a cat"
    assert clean_text('"a" and "b"') == '"a" and "b"'
    assert read_score("Motion: 5 of 7") == "5"
    for nothing in ("<think>7</think>", "none", "10", "0", "8.5"):
        with pytest.raises(ValueError):
            read_score(nothing)
    with pytest.raises(ValueError, match="with nothing"):
        clean_text('""')


def test_openai_itself_is_the_default(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert Endpoint.from_environment("m", "refine_prompt=True").url == "https://api.openai.com/v1"


def test_a_key_from_a_file_with_windows_line_ends(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert language_model.Endpoint.from_environment("m", "refine_prompt=True").key == "sk-secret"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [("OPENAI_API_KEY", "sk\nsecret", "OPENAI_API_KEY has"), ("OPENAI_BASE_URL", "http://host:port/v1", "port")],
)
def test_what_no_request_can_be_made_of(monkeypatch, name, value, complaint):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=complaint) as error:
        language_model.Endpoint.from_environment("m", "refine_prompt=True")
    assert "secret" not in str(error.value)
