import contextlib
import os
import weakref
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_test import disk_with_room_for
from utils import video
from utils.derain import Derainer
from utils.files import UserError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-extras.txt")


def drifting_colours(count, height=48, width=64):
    """Frames of smooth colours that drift, which encoders keep well."""
    y, x = np.mgrid[:height, :width]
    phases = np.random.default_rng(0).uniform(0, 6, 3)
    for number in range(count):
        waves = [np.sin(x / 20 + phase + number / 5) + np.cos(y / 15 - phase) for phase in phases]
        yield (128 + 50 * np.stack(waves, axis=2)).astype(np.uint8)


def noise_frames(count, side):
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


def write_sound(target, codec, seconds):
    """Adds a track of noise to an open clip, in which no packets are yet."""
    track = target.add_stream(codec, rate=48000)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, round(48000 * seconds))).astype(np.float32)
    samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
    samples.sample_rate, samples.pts = 48000, 0
    resampled = av.AudioResampler(track.format, track.layout, 48000).resample(samples)
    target.mux([packet for frame in [*resampled, None] for packet in track.encode(frame)])


def write_clip(path, frames, times=None, codec="libx264", sound=None, format="yuv420p", rotation=0, **colours):
    """Writes H×W×3 frames, 25 a second or at `times` in units of 1/12800 s, with noise as sound."""
    frames = list(frames)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream(codec, rate=25, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], format
        stream.codec_context.time_base = Fraction(1, 12800 if times else 25)
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            write_sound(target, sound, len(frames) / 25)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image)
            for name, value in colours.items():
                setattr(frame, name, value)
            frame = frame.reformat(format=format)
            frame.pts, frame.time_base = times[number] if times else number, stream.codec_context.time_base
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def read_clip(path):
    with av.open(str(path)) as clip:
        return list(clip.decode(video=0))


def times(path):
    frames = read_clip(path)
    return [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]


def arrays(path, format="rgb24"):
    return np.stack([frame.to_ndarray(format=format) for frame in read_clip(path)]).astype(int)


def sound_packets(path):
    """-> list of (time, bytes)."""
    with av.open(str(path)) as clip:
        packets = [packet for packet in clip.demux(audio=0) if packet.pts is not None]
        return [(packet.time_base * packet.pts, bytes(packet)) for packet in packets]


@pytest.fixture
def derain(tmp_path):
    """Runs a clip through a stand-in for a Derainer, which changes nothing -> the result's path. The message of the
    UserError contains `problem`."""

    def run(clip, steady=False, problem=None):
        result = video.result_path(clip, tmp_path / "out")
        unchanged = SimpleNamespace(stream=lambda frames, progress: frames)
        with pytest.raises(UserError) if problem else contextlib.nullcontext() as caught:
            video.derain_clip(clip, result, unchanged, steady)
        assert not problem or problem in str(caught.value)
        return result

    return run


def test_a_clip_is_derained_frame_by_frame_with_its_sound(tmp_path, narrow_net):
    clip, result = write_clip(tmp_path / "clip.mp4", drifting_colours(8), sound="aac"), tmp_path / "out" / "clip.mp4"
    derainer, shares = Derainer(narrow_net, window=32), []
    video.derain_clip(clip, result, derainer, progress=shares.append)
    assert sum(shares) == pytest.approx(8) and len(shares) > 8
    luma = (0.299, 0.587, 0.114)  # the colours of what a random network makes are lost to their halved resolution
    expected = np.stack([derainer(image.astype(np.uint8)) for image in arrays(clip)[:3]]) @ luma
    assert np.abs(arrays(clip)[:3] @ luma - expected).mean() > 10  # the network does something
    assert np.abs(arrays(result)[:3] @ luma - expected).mean() < 4
    assert times(result) == times(clip) and len(times(result)) == 8
    assert video.count_frames(result) == 8
    assert sound_packets(result) == sound_packets(clip)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    "name, result_name, codec, sound",
    [
        ("a.mp4", "a.mp4", "libx264", "aac"),
        ("a.MOV", "a.MOV", "libx264", "pcm_s16le"),
        ("a.mkv", "a.mkv", "libx264", "flac"),
        ("a.avi", "a.avi.mp4", "mpeg4", "libmp3lame"),
        ("b.avi", "b.avi.mp4", "mpeg4", "pcm_s16le"),  # does not say where its channels belong
        ("a.webm", "a.webm.mp4", "libvpx-vp9", "libopus"),
        ("a.mpg", "a.mpg.mp4", "mpeg2video", "mp2"),
        ("a.ts", "a.ts.mp4", "libx264", "aac"),
    ],
)
def test_containers_keep_times_pictures_and_sound(derain, tmp_path, name, result_name, codec, sound):
    count = 300 if name == "a.mkv" else 30  # FFmpeg itself interleaves the packets of 10 seconds
    clip = write_clip(tmp_path / name, drifting_colours(count), codec=codec, sound=sound)
    result = derain(clip)
    assert result.name == result_name
    assert times(result) == times(clip) and len(times(result)) == count
    assert np.abs(arrays(result) - arrays(clip)).mean() < 2
    before, after = sound_packets(clip), sound_packets(result)
    assert len(before) == len(after)
    assert all(old.endswith(new) and new for (_, old), (_, new) in zip(before, after))  # .ts adds headers
    offset = [sound_packets(path)[0][0] - read_clip(path)[0].time for path in (clip, result)]
    assert offset[0] == pytest.approx(offset[1], abs=2e-3)  # sound and picture together
    assert read_clip(result)[0].time < 0.1  # programme streams begin later
    with av.open(str(result)) as container:  # players stall where sound and pictures are not interleaved
        moments = [float(packet.pts * packet.time_base) for packet in container.demux() if packet.pts is not None]
    assert np.diff(moments).min() > -0.2


def test_sound_that_the_container_cannot_hold_is_left_out_and_named(derain, tmp_path, caplog):
    clip = write_clip(tmp_path / "a.avi", drifting_colours(3), codec="mpeg4", sound="pcm_mulaw")
    assert len(read_clip(derain(clip))) == 3
    assert "its pcm_mulaw sound was left out" in caplog.text


@pytest.mark.parametrize(
    "format, size, colours",
    [
        ("yuv420p", (48, 64), {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1}),
        ("yuv420p", (48, 64), {"colorspace": 1, "color_range": 2}),
        ("yuv444p", (33, 47), {}),
        ("yuv422p", (48, 64), {"colorspace": 6}),
        ("yuv420p10le", (48, 64), {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 18}),
    ],
)
def test_sizes_colours_and_depths_are_kept(derain, tmp_path, format, size, colours):
    clip = write_clip(tmp_path / "a.mp4", drifting_colours(3, *size), format=format, **colours)
    result = derain(clip)
    (before, *_), (after, *_) = read_clip(clip), read_clip(result)
    for name in ("width", "height", "colorspace", "color_range", "color_primaries", "color_trc"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.format.name == before.format.name
    difference = np.abs(arrays(result, "rgb48le") - arrays(clip, "rgb48le")) / 257
    assert difference.mean() < 2 and np.percentile(difference, 99) < 8


def test_odd_sizes_whose_colours_are_halved_keep_their_size(derain, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", drifting_colours(3, 33, 47), codec="libvpx-vp9")
    assert read_clip(clip)[0].format.name == "yuv420p"
    assert np.abs(arrays(derain(clip)) - arrays(clip)).mean() < 3


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV is too old to turn a clip")
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_turned_clips_become_upright(derain, tmp_path, rotation):
    clip = write_clip(tmp_path / "a.mp4", drifting_colours(2), rotation=rotation)
    assert read_clip(clip)[0].rotation % 360 == rotation % 360
    result = derain(clip)
    assert read_clip(result)[0].rotation == 0
    assert np.abs(arrays(result) - np.rot90(arrays(clip), rotation // 90, axes=(1, 2))).mean() < 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_clip_that_is_cut_off_is_derained_as_far_as_it_goes(derain, tmp_path, name):
    clip, result = write_clip(tmp_path / name, noise_frames(60, 16)), tmp_path / "out" / name
    os.truncate(clip, clip.stat().st_size // 3)
    derain(clip, problem=f"{clip} is damaged or cut off: {result} holds what could be decoded.")
    assert 10 < len(times(result)) < 30


def test_a_clip_with_a_hole_is_derained_around_it(derain, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(40, 32))
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    clip.write_bytes(data)
    assert 30 < len(times(derain(clip, problem="is damaged or cut off"))) < 40


@pytest.mark.parametrize("damage", ["some packets", "all packets"])
def test_damaged_sound_does_not_lose_the_pictures(derain, tmp_path, damage):
    clip = write_clip(tmp_path / "clip.ts", drifting_colours(30), sound="aac")
    with av.open(str(clip)) as container:
        stream = container.streams.audio[0].id
    data = bytearray(clip.read_bytes())
    packets = [start for start in range(0, len(data), 188) if (data[start + 1] & 31) << 8 | data[start + 2] == stream]
    for start in packets if damage == "all packets" else packets[5::3]:
        data[start + 1 : start + 3] = b"\x1f\xff"  # becomes padding
    clip.write_bytes(data)
    result = derain(clip, problem="is damaged or cut off")
    assert len(times(result)) == 30
    with av.open(str(result)) as container:
        assert len(container.streams.audio) == (damage == "some packets")


def test_what_is_no_video_is_named(derain, tmp_path, monkeypatch):
    derain(tmp_path / "gone.mp4", problem="gone.mp4 cannot be read as a video (No such file")
    (tmp_path / "text.mp4").write_text("no video")
    derain(tmp_path / "text.mp4", problem="text.mp4 cannot be read as a video (Invalid data")
    assert [video.count_frames(tmp_path / name) for name in ("text.mp4", "a.png")] == [1, 1]
    with av.open(str(tmp_path / "sound.mp4"), "w") as target:
        write_sound(target, "aac", 0.1)
    derain(tmp_path / "sound.mp4", problem="sound.mp4 has no video stream")
    monkeypatch.setattr(video.pictures, "MOST_PIXELS", 1000)
    derain(write_clip(tmp_path / "large.mp4", drifting_colours(1)), problem="large.mp4 has more than 0 megapixels")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.2, 0.98])  # of the result: while packets are written, or at the end
def test_a_full_disk_leaves_the_earlier_result_and_no_half_clip(derain, tmp_path, share):
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(48, 48))
    result = derain(clip)
    size = result.stat().st_size
    result.write_text("an earlier result")
    with disk_with_room_for(int(size * share)):
        derain(clip, problem=f"{result} cannot be written (File too large): free some space")
    assert list(result.parent.iterdir()) == [result] and result.read_text() == "an earlier result"


@pytest.mark.parametrize("name, steady", [("a.mp4", False), ("a.mkv", True)])
def test_variable_frame_rates_are_kept_and_frames_are_not(derain, tmp_path, monkeypatch, name, steady):
    """However long a clip is, few frames exist at a time."""
    moments = np.cumsum(np.random.default_rng(0).integers(100, 3000, 60)).tolist()
    clip = write_clip(tmp_path / name, drifting_colours(60), times=moments)
    decode, arrays, alive = video.to_array, [], []

    def counted(*frame):
        array = decode(*frame)
        arrays.append(weakref.ref(array))
        alive.append(sum(array() is not None for array in arrays))
        return array

    monkeypatch.setattr(video, "to_array", counted)
    assert times(derain(clip, steady)) == times(clip)
    assert len(alive) == 60 and max(alive) <= 5


def test_steady_damps_flicker_and_leaves_alone_what_moves():
    rng = np.random.default_rng(0)
    scene = next(drifting_colours(1, 64, 96)).astype(int)
    clean = np.stack([scene.copy() for _ in range(8)])
    for number, frame in enumerate(clean):
        frame[20:50, 4 + 6 * number : 34 + 6 * number] = rng.integers(90, 110, 3)  # a thing that passes
        frame[4:10, 4 + 10 * number : 10 + 10 * number] = 250  # one that is never twice where it was
    moving = np.abs(np.diff(clean, axis=0)).max(axis=3) > 0
    still = ~(moving[:-1] | moving[1:])
    flickering = np.clip(clean + 10 * (rng.random(clean.shape) < 0.05), 0, 255).astype(np.uint8)
    result = np.stack([frame for _, frame in video.steadied(enumerate(flickering))]).astype(int)
    assert np.abs(result - clean)[1:-1][still].mean() < np.abs(flickering - clean)[1:-1][still].mean() / 3
    assert np.abs(result - flickering)[1:-1][~still].mean() < 1
    deep = np.stack([frame for _, frame in video.steadied(enumerate(flickering.astype(np.uint16) * 257))])
    assert np.abs(deep / 257 - result).max() < 1


def test_a_missing_library_is_named(derain, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "av", None)
    derain(tmp_path / "a.mp4", problem="a.mp4 is a video, which needs PyAV: pip install -r requirements-extras.txt")
