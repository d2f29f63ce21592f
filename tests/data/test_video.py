"""Facts and clips of real files, against a plain decode of the whole file."""

import gc
import math
import pickle
import random
import re
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from video_files import copy_video, cut_file, decode_all, draw_frame, write_audio, write_video

from opensora.data.container_layout import mp4_layout
from opensora.data.media import MediaError
from opensora.data.probe import probe
from opensora.data.video import read_clip, window_indices

OPEN_GROUPS = "keyint=12:bframes=4:b-adapt=0:open-gop=1"
WRITERS = {
    "closed.mp4": {},
    "open.mp4": {"options": {"x264-params": OPEN_GROUPS}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"log-level=none:pools=none:{OPEN_GROUPS}"}},
    "one_group.mp4": {"options": {"x264-params": "keyint=250"}},
    "all_keys.mp4": {"options": {"x264-params": "keyint=1"}},
    "faststart.mp4": {"container": {"movflags": "faststart"}},
    "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "variable.mp4": {"times": [40 * i + 300 * (i > 10) + 7 * (i % 3) for i in range(40)]},
    "variable.mkv": {"times": [40 * i + 300 * (i > 10) + 7 * (i % 3) for i in range(40)]},
    "closed.mkv": {},
    "open.mkv": {"options": {"x264-params": OPEN_GROUPS}},
    "closed.mov": {},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "12"}},
    "hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "good"}},
    "closed.ts": {},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "animated.gif": {"codec": "gif", "pixels": "rgb8", "num_frames": 12, "rate": 10},
    "odd.mp4": {"height": 46, "width": 70, "options": {"x264-params": "keyint=12"}},
}
# Trimmed by an edit list: within the first group, and beyond it.
TRIMMED = {"trimmed.mp4": 5, "trimmed_far.mp4": 17}
# Files of which the header or packets say where a group begins: a start in the middle is possible.
SEEKABLE = ["closed.mp4", "open.mp4", "hevc.mp4", "faststart.mp4", "closed.mkv", "fragmented.mp4", "variable.mp4"]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A function from a file's name to its path; each is written once, when first asked for."""
    folder = tmp_path_factory.mktemp("media")

    def get(name):
        path = folder / name
        if not path.exists():
            if name in TRIMMED:
                copy_video(get("open.mp4"), path, drop=TRIMMED[name])
            else:
                write_video(path, **WRITERS[name])
        return path

    return get


def to_clip(frames: np.ndarray) -> torch.Tensor:
    """[T, H, W, 3] -> [3, T, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)


class TestProbe:
    @pytest.mark.parametrize("name", [*WRITERS, *TRIMMED])
    def test_the_facts_are_those_of_a_full_decode(self, media, name):
        frames = decode_all(media(name))
        facts = probe(media(name))
        assert facts[:3] == frames.shape[:3]
        if "variable" not in name:
            assert facts.fps == pytest.approx(WRITERS.get(name, {}).get("rate", 24), rel=1e-3)

    @pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
    def test_a_variable_rate_is_the_mean_rate(self, media, name):
        times = WRITERS[name]["times"]
        assert probe(media(name)).fps == pytest.approx(39 / (times[-1] - times[0]) * 1000, rel=0.03)

    def test_trimmed_files_are_trimmed(self, media):
        assert [probe(media(name)).num_frames for name in TRIMMED] == [40 - drop for drop in TRIMMED.values()]

    @pytest.mark.parametrize(("rotation", "size"), [(90, (64, 48)), (-90, (64, 48)), (180, (48, 64))])
    @pytest.mark.parametrize("suffix", ["mp4", "mov"])
    def test_the_size_is_that_of_the_turned_picture(self, tmp_path, rotation, size, suffix):
        path = write_video(tmp_path / f"turned.{suffix}", num_frames=3, rotation=rotation)
        assert probe(path)[:3] == (3, *size)

    @pytest.mark.parametrize(
        "name", ["picture.png", "picture.jpg", "picture.webp", "picture.bmp", "picture.tif", "png.mp4"]
    )
    def test_an_image_is_one_frame_of_no_rate_whatever_its_name(self, tmp_path, name):
        kind = "png" if name == "png.mp4" else None
        Image.fromarray(draw_frame(0, 48, 64)).save(tmp_path / name, kind)
        facts = probe(tmp_path / name)
        assert facts[:3] == (1, 48, 64) and math.isnan(facts.fps)

    def test_an_image_is_turned_as_its_exif_says(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(draw_frame(0, 48, 64)).save(tmp_path / "turned.jpg", exif=exif)
        assert probe(tmp_path / "turned.jpg")[:3] == (1, 64, 48)

    def test_a_video_of_one_frame_has_no_rate(self, tmp_path):
        facts = probe(write_video(tmp_path / "one.mp4", num_frames=1))
        assert facts.num_frames == 1 and math.isnan(facts.fps)

    def test_names_are_names(self, tmp_path):
        for name in ("http:a%03d.mp4", "späce 猫'\".mp4"):
            assert probe(write_video(tmp_path / name, num_frames=2)).num_frames == 2

    def test_pictures_of_an_mp4_are_not_decoded(self, media, tmp_path):
        data = bytearray(media("closed.mp4").read_bytes())
        end = data.index(b"moov") - 4
        data[end // 2 : end] = bytes(end - end // 2)
        (tmp_path / "rotten.mp4").write_bytes(data)
        assert probe(tmp_path / "rotten.mp4") == probe(media("closed.mp4"))

    def test_layout_of_an_mp4(self, media, tmp_path):
        assert mp4_layout(media("closed.mkv")) is None
        assert mp4_layout(media("fragmented.mp4")).fragmented and not mp4_layout(media("closed.mp4")).fragmented
        assert mp4_layout(media("trimmed.mp4")).edits == 1
        turned = write_video(tmp_path / "turned.mp4", num_frames=2, rotation=90)
        assert mp4_layout(turned).turned and not mp4_layout(media("closed.mp4")).turned


class TestUnusableFiles:
    @pytest.mark.parametrize("fraction", [0.3, 0.9])
    @pytest.mark.parametrize(
        "name",
        ["closed.mp4", "faststart.mp4", "fragmented.mp4", "closed.mkv", "vp9.webm", "mpeg4.avi", "animated.gif"],
    )
    def test_truncated(self, media, tmp_path, name, fraction):
        path = cut_file(media(name), tmp_path / name, fraction)
        with pytest.raises(MediaError, match=f"{name}: truncated") as raised:
            probe(path)
        assert raised.value.reason.startswith("truncated:") and "\n" not in str(raised.value)

    @pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp"])
    def test_truncated_images(self, tmp_path, name):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        path = cut_file(tmp_path / name, tmp_path / name, 0.6)
        with pytest.raises(MediaError, match=r"truncated|damaged"):
            probe(path)
        with pytest.raises(MediaError, match=r"truncated|damaged"):
            read_clip(path, [0], 16, 16)

    def test_files_that_are_no_media(self, tmp_path):
        write_audio(tmp_path / "audio.mp4")
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "page.mp4").write_text("<html>404 not found</html>")
        (tmp_path / "notes.txt").write_text("some words")
        (tmp_path / "random.mp4").write_bytes(random.Random(0).randbytes(5000))
        (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
        (tmp_path / "fake.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
        (tmp_path / "folder.mp4").mkdir()
        reasons = {
            "audio.mp4": "no video stream",
            "empty.mp4": "empty file",
            "page.mp4": "not a video or image",
            "notes.txt": "not a video or image",
            "random.mp4": "not a video or image",
            "zeros.mp4": "not a video or image",
            "fake.jpg": "not a video or image",
            "folder.mp4": "not a file",
            "absent.mp4": "file not found",
        }
        for name, reason in reasons.items():
            for use in (probe, lambda path: read_clip(path, [0], 16, 16)):
                with pytest.raises(ValueError) as raised:
                    use(tmp_path / name)
                assert raised.value.reason.split(":")[0] == reason, name
                assert str(raised.value).startswith(str(tmp_path / name)) and "\n" not in str(raised.value)

    def test_an_absent_file_is_a_file_not_found_error_also_from_another_process(self, tmp_path):
        with pytest.raises(FileNotFoundError) as raised:
            probe(tmp_path / "absent.mp4")
        again = pickle.loads(pickle.dumps(raised.value))
        assert str(again) == str(raised.value) and again.reason == "file not found"

    def test_cover_art_is_no_video(self, tmp_path):
        path = tmp_path / "song.mp3"
        Image.fromarray(draw_frame(0, 48, 64)).save(tmp_path / "cover.png")
        with av.open(str(path), "w") as file:
            audio = file.add_stream("libmp3lame", rate=16000)
            cover = file.add_stream("png")
            cover.height, cover.width, cover.pix_fmt = 48, 64, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            file.mux(audio.encode(frame))
            file.mux(audio.encode())
            file.mux(cover.encode(av.VideoFrame.from_ndarray(draw_frame(0, 48, 64), format="rgb24")))
            file.mux(cover.encode())
        with pytest.raises(MediaError, match="no video stream"):
            probe(path)


class TestClip:
    @pytest.mark.parametrize("name", [*WRITERS, *TRIMMED])
    def test_exact_clips_equal_interpolation_of_the_fully_decoded_frames(self, media, name):
        frames = decode_all(media(name))
        full = to_clip(frames).permute(1, 0, 2, 3).float().div(255)  # [T, 3, h, w]
        scaled = interpolate(full, size=(32, 48), mode="bilinear", align_corners=False)
        if frames.shape[1] * 48 < frames.shape[2] * 32:  # "odd" is wider: 70 / 46 * 32 = 48.7
            scaled = interpolate(full, size=(32, 49), mode="bilinear", align_corners=False)[..., :48]
        elif frames.shape[1:3] == (48, 64):  # 36 rows: two above, two below
            scaled = interpolate(full, size=(36, 48), mode="bilinear", align_corners=False)[:, :, 2:34]
        expected = ((scaled - 0.5) / 0.5).permute(1, 0, 2, 3)  # [3, T, H, W]
        draw = random.Random(name)
        windows = [(0, 1), (len(frames) - 1, len(frames)), (0, len(frames))]
        windows += [sorted(draw.sample(range(len(frames) + 1), 2)) for _ in range(8)]
        for begin, end in windows:
            indices = range(begin, end, draw.choice([1, 1, 2, 3]))
            clip = read_clip(media(name), indices, 32, 48, resize="exact")
            assert clip.dtype == torch.float32 and clip.is_contiguous()
            assert torch.equal(clip, expected[:, list(indices)]), (name, indices)

    @pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "odd.mp4", "vp9.webm", "animated.gif"])
    def test_fast_clips_are_the_same_pictures(self, media, name):
        indices = [1, 4, 9]
        fast = read_clip(media(name), indices, 32, 48)
        exact = read_clip(media(name), indices, 32, 48, resize="exact")
        assert fast.dtype == torch.uint8 and fast.shape == (3, 3, 32, 48) and fast.is_contiguous()
        error = fast.double() - exact.double().add(1).mul(127.5)
        assert error.abs().mean() < 4 and error.mean().abs() < 2

    def test_fast_clips_at_the_files_own_size_are_its_pixels(self, media):
        frames = decode_all(media("closed.mp4"))
        clip = read_clip(media("closed.mp4"), [0, 20, 39], 48, 64)
        assert torch.equal(clip, to_clip(frames[[0, 20, 39]]))

    @pytest.mark.parametrize("size", [(100, 100), (16, 240), (240, 16)])
    def test_fast_clips_are_scaled_up_and_cropped(self, media, size):
        assert read_clip(media("closed.mp4"), [0, 1], *size).shape == (3, 2, *size)

    @pytest.mark.parametrize(("rotation", "quarters"), [(90, 1), (180, 2), (-90, 3)])
    def test_pictures_are_turned_as_a_player_turns_them(self, tmp_path, rotation, quarters):
        path = write_video(tmp_path / "turned.mp4", num_frames=3, rotation=rotation)
        expected = to_clip(np.rot90(decode_all(path), quarters, axes=(1, 2)))
        height, width = expected.shape[2:]
        assert torch.equal(read_clip(path, range(3), height, width), expected)
        exact = read_clip(path, range(3), height, width, resize="exact")
        assert torch.equal(exact.add(1).mul(127.5).round().to(torch.uint8), expected)

    def test_mirrored_pictures(self, tmp_path):
        path = tmp_path / "mirrored.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=24)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            stream.set_display_rotation(0, hflip=True)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(0, 48, 64), format="rgb24")))
            file.mux(stream.encode())
        assert torch.equal(read_clip(path, [0], 48, 64), to_clip(decode_all(path)[:, :, ::-1]))

    @pytest.mark.parametrize("name", SEEKABLE)
    def test_what_lies_in_groups_before_the_window_is_not_decoded(self, media, tmp_path, name):
        with av.open(str(media(name))) as file:
            packets = [packet for packet in file.demux(video=0) if packet.size]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        window = range(keys[2] + 3, keys[2] + 9)
        data = bytearray(media(name).read_bytes())
        # The first picture must be left: the decoder is set up by it. B-frames may belong to the group before.
        for packet in packets[2 : keys[1]]:
            place = data.index(bytes(packet))
            data[place + 5 : place + packet.size] = b"\x55" * (packet.size - 5)
        rotten = tmp_path / name
        rotten.write_bytes(data)
        expected = read_clip(media(name), window, 48, 64)
        assert torch.equal(read_clip(rotten, window, 48, 64), expected)

    def test_images(self, tmp_path):
        picture = Image.fromarray(draw_frame(0, 50, 90))
        picture.save(tmp_path / "picture.png")
        clip = read_clip(tmp_path / "picture.png", [0], 32, 48)
        expected = np.asarray(picture.resize((58, 32), Image.Resampling.BICUBIC))[:, 5:53]
        assert torch.equal(clip, to_clip(expected[None]))
        exact = read_clip(tmp_path / "picture.png", [0], 32, 48, resize="exact")
        assert torch.equal(exact, clip.float().div(255).sub(0.5).div(0.5))

    def test_images_of_every_mode_are_rgb_and_upright(self, tmp_path):
        grey = draw_frame(0, 48, 64)[..., 0]
        deep = Image.fromarray(grey.astype(np.uint16) * 256)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise by 90 degrees to see it upright
        Image.fromarray(grey).save(tmp_path / "grey.png")
        Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
        Image.fromarray(grey).convert("RGBA").save(tmp_path / "alpha.png")
        deep.save(tmp_path / "deep.png")
        Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)
        for name in ("grey", "palette", "alpha", "deep"):
            clip = read_clip(tmp_path / f"{name}.png", [0], 48, 64)
            assert torch.equal(clip[:, 0], torch.from_numpy(grey).expand(3, -1, -1)), name
        turned = read_clip(tmp_path / "turned.png", [0], 64, 48)[0, 0]
        assert torch.equal(turned, torch.from_numpy(np.rot90(grey, -1).copy()))

    @pytest.mark.parametrize("name", ["closed.mp4", "closed.mkv", "mpeg4.avi"])
    def test_a_file_with_fewer_frames_is_an_error(self, media, name):
        with pytest.raises(MediaError, match="too few frames: 40 can be decoded, number 40 "):
            read_clip(media(name), range(30, 41), 32, 48)

    def test_an_image_has_no_second_frame(self, tmp_path):
        Image.fromarray(draw_frame(0, 48, 64)).save(tmp_path / "picture.png")
        with pytest.raises(MediaError, match="too few frames: an image"):
            read_clip(tmp_path / "picture.png", [0, 1], 32, 48)

    @pytest.mark.parametrize(
        ("beyond", "reason"), [(0, "too few frames: 25 can be decoded, number 35 "), (9, "truncated: ")]
    )
    def test_a_window_beyond_the_cut_of_a_truncated_file_is_an_error(self, media, tmp_path, beyond, reason):
        data = media("faststart.mp4").read_bytes()
        with av.open(str(media("faststart.mp4"))) as file:
            end = [packet.pos for packet in file.demux(video=0) if packet.size][25]
        path = tmp_path / "cut.mp4"
        path.write_bytes(data[: end + beyond])
        assert torch.equal(read_clip(path, range(4), 48, 64), read_clip(media("faststart.mp4"), range(4), 48, 64))
        with pytest.raises(MediaError, match=rf"cut\.mp4: {re.escape(reason)}"):
            read_clip(path, range(30, 36), 48, 64)

    def test_wrong_calls(self, media):
        with pytest.raises(ValueError, match="resize='soft' is unknown: one of fast, exact"):
            read_clip(media("closed.mp4"), [0], 32, 48, resize="soft")
        for indices in ([], [3, 3], [4, 2], [-1, 0]):
            with pytest.raises(ValueError, match="not strictly ascending"):
                read_clip(media("closed.mp4"), indices, 32, 48)


class TestMemory:
    def test_no_frame_waits_for_the_garbage_collector(self, tmp_path):
        path = write_video(tmp_path / "turned.mp4", num_frames=30, rotation=90)
        gc.collect()
        gc.disable()
        try:
            for resize in ("fast", "exact"):
                read_clip(path, range(20), 32, 48, resize)
            frames = [item for item in gc.get_objects() if isinstance(item, av.VideoFrame)]
            assert all(frame.width * frame.height <= 256 for frame in frames)
        finally:
            gc.enable()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_it_is_flat_over_many_clips(self, tmp_path):
        path = write_video(tmp_path / "large.mp4", num_frames=20, height=480, width=640)

        def private_kib():
            return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

        for _ in range(5):
            read_clip(path, range(16), 32, 48)
        before = private_kib()
        gc.disable()
        try:
            for _ in range(40):
                read_clip(path, range(16), 32, 48)
        finally:
            gc.enable()
        assert private_kib() - before < 20 << 10  # the frames of all the clips are 280 MiB


class TestWindow:
    @pytest.mark.parametrize("interval", [1, 2, 3])
    @pytest.mark.parametrize("total", [33, 34, 35, 66, 67, 68, 100, 300])
    def test_the_draw_is_that_of_the_reference(self, total, interval):
        size = 33 * interval
        last = max(0, total - size - 1)
        begins = set()
        for step in range(8 * (last + 1)):
            indices = window_indices(total, 33, interval, step / (8 * (last + 1)))
            begin = int(indices[0])
            begins.add(begin)
            assert indices.tolist() == np.linspace(begin, min(begin + size, total) - 1, 33, dtype=int).tolist()
            assert indices[-1] < total and (np.diff(indices) >= 1).all()
        assert begins == set(range(last + 1))  # each is drawn for an equal share of [0, 1)

    def test_every_begin_is_equally_likely(self):
        counts = np.bincount([window_indices(12, 4, 1, u)[0] for u in (np.arange(800) + 0.5) / 800])
        assert counts.tolist() == [100] * 8

    def test_the_last_number_below_one_stays_inside(self):
        assert window_indices(300, 33, 1, math.nextafter(1, 0))[-1] < 300

    def test_an_image_is_a_window(self):
        assert window_indices(1, 1, 1, 0.9).tolist() == [0]

    def test_too_few_frames(self):
        with pytest.raises(ValueError, match="too few frames: 32 for a clip of 33"):
            window_indices(32, 33, 1, 0.5)
