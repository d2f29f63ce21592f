"""The page about a run: what it draws and tells, from files whose numbers are known."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.inference.output import write_mp4
from opensora.training.report.charts import Line, binned, line_chart, number, ticks
from opensora.training.report.page import write_report
from opensora.training.report.samples import spread

SCRIPT = Path(__file__).parents[2] / "scripts/diffusion/report.py"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROMPT = 'a "red" <script>alert(1)</script> & blue'
VOID = {"meta", "img", "br"}


class Strict(HTMLParser):
    """Fails where a tag is not closed in order; collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: Path) -> Strict:
    parser = Strict()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def update(step: int, **changed) -> dict:
    return {
        "step": step,
        "epoch": step // 10,
        "loss": 2.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "samples": 8,
        "tokens": 1000,
        "seconds": {"data": 0.25, "forward_backward": 0.75, "eval": 3.0 * (step == 3)},
        "skipped": 0,
        "clip": [9, 8, 8] if step % 4 else [1, 8, 8],
        **changed,
    }


@pytest.fixture
def make_run(tmp_path):
    def make(name="first", steps=20, **config):
        run = tmp_path / "outputs" / name
        (run / "eval/step0000010").mkdir(parents=True)
        frames = torch.arange(9 * 32 * 48 * 3).reshape(9, 32, 48, 3).remainder(255).to(torch.uint8)
        write_mp4(run / "eval/step0000010/a.mp4", frames, 8, 18)
        Image.fromarray(frames[0].numpy()).save(run / "eval/step0000010/b.png")
        lines = [json.dumps(update(step)) for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 21, "lo')
        samples = [
            {"prompt": PROMPT, "file": "eval/step0000010/a.mp4"},
            {"prompt": "b", "file": "eval/step0000010/b.png"},
        ]
        found = {"step": 10, "averaged": True, "seconds": 1.0, "loss": 0.5, "by_clip": {"64px/9": 0.5}}
        found |= {"by_time": {"0.3": 0.4, "0.7": 0.6}, "samples": samples}
        (run / "eval.jsonl").write_text(json.dumps(found) + "\n")
        rejected = [{"path": "a/ü.mp4", "index": 1, "reason": "truncated <file>", "replaced_by": 2}] * 2
        (run / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rejected))
        (run / "config.txt").write_text(json.dumps({"seed": 1, "model": {"depth": 2}, **config}))
        return run

    return make


def test_one_run_on_a_page_of_its_own(make_run, tmp_path):
    run = make_run()
    write_report([run], run / "report.html")
    page = parsed(run / "report.html")
    text = " ".join(page.text)
    assert "script" not in page.tags and PROMPT in text and "truncated <file>" in text and "a/ü.mp4" in text
    assert [part for part in page.sources if not part.startswith("data:")] == []
    videos = [part for part in page.sources if part.startswith("data:video/mp4;base64,")]
    assert [base64.b64decode(part.split(",")[1]) for part in videos] == [(run / "eval/step0000010/a.mp4").read_bytes()]
    assert page.tags.count("img") == 1 and page.tags.count("video") == 1
    cells = re.sub(r"<[^>]+>", "|", (run / "report.html").read_text())
    assert "|first||20||2||160|" in cells  # updates, epoch, samples
    assert "|8||1,000||" in cells  # a second, without the evaluation's 3
    assert "|9 frames, 8 x 8 latents||15||75.0%|" in cells and "|image, 8 x 8 latents||5||25.0%|" in cells
    assert "2 times a sample was replaced, 1 files" in text


def test_many_prompts_many_clips_and_a_prompt_twice(make_run):
    run = make_run()
    drawn = [{"prompt": f"p {max(i, 1)}", "file": f"eval/step0000010/{i}.mp4"} for i in range(100)]
    clips = {f"{side}px/{n}": 0.5 for n in (129, 33, 5, 1) for side in (768, 256, 1024)}
    (run / "eval.jsonl").write_text(json.dumps({"step": 10, "samples": drawn, "by_clip": clips}) + "\n")
    write_report([run], run / "report.html")
    text = parsed(run / "report.html").text
    assert text.count("p 1") == 2 and "p 23" in text and "p 24" not in text and "24 of 100 prompts" in " ".join(text)
    assert "The same by clip, 8 of 12" in text
    assert [part for part in text if re.fullmatch(r"\d+px/\d+", part)][::7] == ["256px/1", "1024px/129"]


def test_several_runs_are_told_apart(make_run):
    first, second = make_run("first"), make_run("second", steps=5, seed=2)
    write_report([first, second], first / "both.html")
    page = (first / "both.html").read_text()
    parsed(first / "both.html")
    different = page.split("<h2>Settings</h2>")[1].split("<details>")[0]
    assert "seed" in different and "model.depth" not in different
    assert page.count('class="line c1"') >= 4


def test_large_samples_are_linked_to(make_run, tmp_path):
    run = make_run()
    big = run / "eval/step0000010/a.mp4"
    big.write_bytes(big.read_bytes() + bytes(300_000))
    write_report([run], tmp_path / "pages/report.html")
    assert "../outputs/first/eval/step0000010/a.mp4" in parsed(tmp_path / "pages/report.html").sources


def test_a_run_that_has_just_begun_and_lost_numbers(make_run):
    run = make_run(steps=1)
    for name in ("eval.jsonl", "rejected.jsonl", "config.txt"):
        (run / name).unlink()
    lines = [update(1), update(2, loss=float("nan")), update(3, loss=float("inf"), grad_norm=None), update(4)]
    for line in lines[:2]:
        del line["clip"], line["skipped"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([run], run / "report.html")
    page = parsed(run / "report.html")
    assert not {"nan", "inf", "infT"} & set(page.text) and page.tags.count("figure") >= 5


@pytest.mark.parametrize(("made", "said"), [(False, "there is no such folder"), (True, "has no metrics.jsonl")])
def test_what_is_no_run(tmp_path, made, said):
    if made:
        (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=said):
        write_report([tmp_path / "run"], tmp_path / "run/report.html")
    assert list(tmp_path.glob("**/*.html")) == [] and (tmp_path / "run").exists() == made


def test_a_page_that_cannot_be_written(make_run, tmp_path):
    run = make_run()
    for page in (run, run / "metrics.jsonl/page.html"):  # a folder, and a file where a folder should be
        with pytest.raises(ValueError, match=r"cannot be written .*--output FILE"):
            write_report([run], page)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_the_command(make_run):
    first, second = make_run("first"), make_run("second")
    done = subprocess.run([sys.executable, SCRIPT, first, second], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(first / "report-with-second.html")
    assert parsed(first / "report-with-second.html").tags.count("video") == 2
    failed = subprocess.run([sys.executable, SCRIPT, first / "none"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_lines_are_where_the_numbers_are():
    """Linear axes: x from the first to the last step, y places proportional to the values."""
    chart = line_chart("t", [Line("a", [(0, 1.0), (5, 2.0), (10, 3.0)], 0), Line("b", [(0, 1.5)], 1)])
    first = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', chart)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2) and y0 > y2
    labels = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', chart))
    place = {float(value): float(y) - 3.5 for y, value in labels.items()}
    assert place[2.0] == pytest.approx(y1, abs=0.11)


def test_many_points_become_means_over_bands():
    points = [(i, float(i % 10)) for i in range(1400)]
    found = binned(points, 140)
    assert len(found) == 140 and all((b.mean, b.low, b.high, b.count) == (4.5, 0.0, 9.0, 10) for b in found)
    chart = line_chart("t", [Line("a", points, 0)])
    assert 'class="band' in chart and len(chart) < 60_000
    assert 'class="band' not in line_chart("t", [Line("a", points[:50], 0)])
    assert line_chart("t", [Line("a", [], 0)]) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.012345, "0.01235"),
        (1.5e-5, "1.5e-5"),
        (3.4e6, "3.4M"),
        (-2e9, "-2G"),
        (12, "12"),
    ],
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown


def test_ticks_are_round_and_within():
    for low, high in ((0, 1), (3, 17), (-0.2, 0.31), (1e-6, 9e-6), (5, 5)):
        marks = ticks(low, high)
        assert 1 <= len(marks) <= 8 and min(marks) >= low - 1e-12 and max(marks) <= high + 1e-12
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_it(make_run, tmp_path):
    run, picture = make_run(), tmp_path / "page.png"
    write_report([run], run / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--no-first-run", "--disable-component-update", "--disable-sync", "--window-size=1280,2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    subprocess.run([CHROMIUM, *flags, (run / "report.html").as_uri()], check=True, capture_output=True, timeout=240)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels[2, 2].tolist() in ([0xFB, 0xFB, 0xFA], [0x14, 0x17, 0x1A])  # light or dark
    line = [0x2F, 0x6F, 0xB7] if pixels[2, 2, 0] > 128 else [0x6B, 0xA6, 0xE6]
    assert (np.abs(pixels - line).max(-1) < 8).sum() > 500  # charts are drawn in the first colour
