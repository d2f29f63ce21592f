"""Files behind URLs: the same facts and clips as of the files on the disk."""

import builtins
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import torch
from PIL import Image
from video_files import cut_file, draw_frame, write_video

from opensora.data.metadata import add_metadata
from opensora.data.probe import probe
from opensora.data.records import Table
from opensora.data.remote import RemoteFile, locate
from opensora.data.video import read_clip

NAMES = ["closed.mp4", "faststart.mp4", "open.mkv", "turned.mp4", "animated.gif", "picture.png"]
NO_VIDEO = {"empty.mp4": "empty file", "text.mp4": "not a video or image", "cut.mp4": "truncated"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_video(folder / "closed.mp4")
    write_video(folder / "faststart.mp4", container={"movflags": "faststart"})
    write_video(folder / "open.mkv", options={"x264-params": "keyint=12:bframes=4:b-adapt=0:open-gop=1"})
    write_video(folder / "turned.mp4", num_frames=12, rotation=90)
    write_video(folder / "animated.gif", num_frames=12, codec="gif", pixels="rgb8", rate=10)
    Image.fromarray(draw_frame(0, 48, 64)).save(folder / "picture.png")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    cut_file(folder / "closed.mp4", folder / "cut.mp4", 0.5)
    return folder


class _RangeHandler(SimpleHTTPRequestHandler):
    """A file server that also sends a part of a file (RFC 9110, section 14); notes the bytes that it was asked for."""

    def __init__(self, *arguments, sent: list[int], ranges: bool, **options):
        self.sent, self.ranges = sent, ranges
        super().__init__(*arguments, **options)

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range") if self.ranges else None
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(data)) + 1, len(data))
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
            data = data[int(first) : end]
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.sent.append(len(data))
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(folder):
    """Starts a server of the folder: its address, and the sizes of what it has sent."""
    servers = []

    def start(ranges: bool = True):
        pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
        sent: list[int] = []
        handler = partial(_RangeHandler, directory=str(folder), sent=sent, ranges=ranges)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["memory", "http", "file"])
def address(request, folder):
    """Of a folder with the files."""
    if request.param == "http":
        return request.getfixturevalue("serve")()[0]
    if request.param == "file":
        return f"file://{folder}"
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/served/{path.name}", path.read_bytes())
    return "memory://served"


def test_facts_and_clips_are_those_of_the_files(folder, address):
    for name in NAMES:
        facts = probe(folder / name)
        assert repr(probe(f"{address}/{name}")) == repr(facts)
        window = range(facts.num_frames // 2, facts.num_frames)
        for resize in ("fast", "exact"):
            clip = read_clip(f"{address}/{name}", window, 32, 48, resize)
            assert torch.equal(clip, read_clip(folder / name, window, 32, 48, resize)), name


def test_what_is_wrong_is_one_line(address):
    for name, reason in NO_VIDEO.items():
        for use in (probe, lambda path: read_clip(path, [0], 16, 16)):
            with pytest.raises(ValueError) as raised:
                use(f"{address}/{name}")
            if name == "empty.mp4" and address.startswith("http"):
                reason = "cannot be read"  # fsspec takes a length of 0 for an unknown one
            assert raised.value.reason.split(":")[0] == reason
            assert str(raised.value).startswith(f"{address}/{name}: ") and "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="file not found"):
        probe(f"{address}/absent.mp4")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_table_of_urls(folder, address, tmp_path, num_workers):
    urls = [f"{address}/{name}" for name in NAMES]
    pd.DataFrame({"path": [*urls, f"{address}/absent.mp4"], "text": "words"}).to_csv(tmp_path / "t.csv", index=False)
    summary = add_metadata(tmp_path / "t.csv", tmp_path / "out.csv", num_workers)
    assert summary.rejected == {"file not found": 1}
    table = Table(tmp_path / "out.csv")
    assert [table.path(row) for row in range(len(NAMES))] == urls
    assert table.num_frames.tolist() == [probe(folder / name).num_frames for name in NAMES]


@pytest.fixture
def big(folder):
    """As "closed.mp4", with a box of nothing between the pictures and the index."""
    data, filler = (folder / "closed.mp4").read_bytes(), 64 << 20
    place = data.index(b"moov") - 4
    path = folder / "big.mp4"
    path.write_bytes(data[:place] + filler.to_bytes(4, "big") + b"free" + bytes(filler - 8) + data[place:])
    yield path
    path.unlink()


def test_only_the_parts_that_are_needed_are_fetched(folder, big, serve):
    address, sent = serve()
    clip = read_clip(f"{address}/big.mp4", range(20, 24), 32, 48)
    assert torch.equal(clip, read_clip(folder / "closed.mp4", range(20, 24), 32, 48))
    assert sum(sent) < 4 << 20


def test_a_server_that_sends_no_parts_is_the_reason(big, serve):
    address, _ = serve(ranges=False)
    with pytest.raises(ValueError, match="cannot be read: "):
        read_clip(f"{address}/{big.name}", [3], 32, 48)


def test_without_fsspec_or_a_protocols_package_the_reason_says_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match=r"cannot be read: .*nowhere"):
        probe("nowhere://bucket/a.mp4")
    real_import = builtins.__import__

    def without_fsspec(name, *arguments, **options):
        if name == "fsspec":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_fsspec)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.mp4: cannot be read: a URL needs the package fsspec: pip"):
        probe("s3://bucket/a.mp4")


def test_what_is_a_url():
    assert isinstance(locate("s3://bucket/a.mp4"), RemoteFile) and isinstance(locate("HTTPS://x/a"), RemoteFile)
    for name in ("http:a%03d.mp4", "a/b://c", "/a.mp4", "://x", "C:/a.mp4"):
        assert locate(name) == Path(name)
