"""`from_pretrained` names on the Hugging Face hub, against a server here that speaks the hub's few addresses."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from opensora.models.weights import build_model

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

FIND = """
import json, sys
from opensora.models.sources import find_weights
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = str(find_weights(name))
    except (FileNotFoundError, ValueError) as error:
        found[name] = f"{type(error).__name__}: {error}"
json.dump(found, open("found.json", "w"))
"""


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dict of files; `downloaded` are the files that were asked for in full."""

    daemon_threads = True

    def __init__(self, repositories):
        self.repositories, self.downloaded = repositories, set()
        super().__init__(("127.0.0.1", 0), Address)


class Address(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[4:5])
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))  # owner/repository/resolve/revision/file

    def describe(self, repository, what):
        files = self.server.repositories.get(repository)
        if files is None:
            return self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        tree = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]
        entry = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        return self.reply(200, json.dumps(tree if what == ["tree"] else entry).encode())

    def file(self, repository, path):
        data = self.server.repositories.get(repository, {}).get(path)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if self.command == "GET":
            self.server.downloaded.add(f"{repository}/{path}")
        etag = hashlib.sha256(data).hexdigest()
        return self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def sharded(state, stem, place=""):
    """The files of a folder with an index and two shards."""
    names = list(state)
    shards = {f"{stem}-{k + 1:05d}-of-00002.safetensors": names[k::2] for k in range(2)}
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    files = {f"{stem}.safetensors.index.json": json.dumps(index).encode()}
    files |= {file: save({name: state[name] for name in part}) for file, part in shards.items()}
    return {place + file: data for file, data in files.items()}


@pytest.fixture
def find(tmp_path):
    """find(hub or None, *names) -> what `find_weights` gives or says, in a process of its own with its own cache."""

    def run(hub, *names):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"} if hub else {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", FIND, *names]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads((tmp_path / "found.json").read_text())

    return run


@pytest.fixture
def state(small_mmdit):
    return {name: tensor.clone() for name, tensor in small_mmdit().state_dict().items()}


@pytest.fixture
def hub(state):
    whole, zeros = save(state), save({name: 0 * tensor for name, tensor in state.items()})
    server = Hub(
        {
            "org/video": {
                "README.md": b"#",
                "Open_Sora_v2.safetensors": whole,
                "hunyuan_vae.safetensors": zeros,
                **sharded(state, "model", "v3/256px/"),
                "v3/256px/notes.txt": b"-",
            },
            "org/sharded": {**sharded(state, "model"), "optimizer.bin": b"-", "tokenizer/spiece.model": b"-"},
            "org/flux-pipeline": {
                "flux.safetensors": zeros,
                "model_index.json": b"{}",
                **sharded(state, "diffusion_pytorch_model", "transformer/"),
                **sharded(state, "model", "text_encoder_2/"),
            },
        }
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_names_on_the_hub(find, hub, small_settings, state):
    cached = ["org/video/Open_Sora_v2.safetensors", "org/sharded", "org/video/v3/256px", "org/flux-pipeline"]
    found = find(hub, *cached, "org/video", "org/absent", "org/video/absent.safetensors", "org/video/v4")

    shards = [f"-0000{k}-of-00002.safetensors" for k in (1, 2)] + [".safetensors.index.json"]
    assert hub.downloaded == {
        "org/video/Open_Sora_v2.safetensors",
        *(f"org/sharded/model{end}" for end in shards),
        *(f"org/video/v3/256px/model{end}" for end in shards),
        *(f"org/flux-pipeline/transformer/diffusion_pytorch_model{end}" for end in shards),
    }
    for name in cached:
        model = build_model(small_settings(from_pretrained=found[name]), torch.float32, "cpu")
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    assert "ValueError: org/video has 2 files of weights and no *.index.json" in found["org/video"]
    assert "org/video/Open_Sora_v2.safetensors" in found["org/video"]
    assert "the Hugging Face hub did not give it" in found["org/absent"]
    assert "the Hugging Face hub did not give it" in found["org/video/absent.safetensors"]
    assert "FileNotFoundError: org/video/v4 has no weights" in found["org/video/v4"]
    assert not any("\n" in line for line in found.values())

    offline = find(None, *cached, "org/video/hunyuan_vae.safetensors", "org/other", "outputs/exp/epoch0-global_step5")
    assert [offline[name] for name in cached] == [found[name] for name in cached]
    for name in ("org/video/hunyuan_vae.safetensors", "org/other"):
        assert f"FileNotFoundError: {name}: no such file or folder here, and the Hugging Face hub" in offline[name]
        assert "\n" not in offline[name] and len(offline[name]) < 700
    assert (
        "epoch0-global_step5: no such file or folder; give a checkpoint" in offline["outputs/exp/epoch0-global_step5"]
    )
