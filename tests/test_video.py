import multiprocessing
import os
import resource
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch

import test as script
from benchmarks.flicker import flicker
from utils import video
from utils.checkpoint import load_network
from utils.errors import UserError
from utils.inference import Derainer

av = pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-extras.txt")


def pictures(count, height=48, width=64, seed=0):
    """Frames of smooth colours that drift, which encoders keep well."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phases = rng.uniform(0, 6, 3)
    for number in range(count):
        waves = [np.sin(x / 20 + phase + number / 5) + np.cos(y / 15 - phase) for phase in phases]
        yield (128 + 50 * np.stack(waves, axis=2)).astype(np.uint8)


def write_clip(
    path, frames, times=None, rate=25, codec="libx264", sound=None, format="yuv420p", rotation=0, options=(), **colours
):
    """Writes H×W×3 frames, at `times` in units of 1/12800 s, with noise as sound."""
    frames = list(frames)
    with av.open(str(path), "w", options=dict(options)) as target:
        stream = target.add_stream(codec, rate=rate, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], format
        stream.codec_context.time_base = Fraction(1, rate) if times is None else Fraction(1, 12800)
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        tracks = [target.add_stream(name, rate=48000) for name in ([sound] if sound else [])]
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image)
            for name, value in colours.items():
                setattr(frame, name, value)
            frame = frame.reformat(format=format)
            frame.pts, frame.time_base = (number if times is None else times[number]), stream.codec_context.time_base
            target.mux(stream.encode(frame))
            for track in tracks:
                noise = np.random.default_rng(number).normal(0, 0.1, (2, 48000 // rate)).astype(np.float32)
                samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
                samples.sample_rate, samples.pts = 48000, number * 48000 // rate
                resampled = av.AudioResampler(track.format, track.layout, 48000).resample(samples)
                target.mux([packet for part in resampled for packet in track.encode(part)])
        for track in [stream, *tracks]:
            target.mux(track.encode(None))
    return path


def read_clip(path):
    """-> decoded frames, and the stream's facts."""
    with av.open(str(path)) as clip:
        return list(clip.decode(video=0)), clip.streams.video[0]


def times(path):
    frames = read_clip(path)[0]
    return [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]


def arrays(path, format="rgb24"):
    """Its frames as one array."""
    return np.stack([frame.to_ndarray(format=format) for frame in read_clip(path)[0]]).astype(int)


def sound_packets(path):
    with av.open(str(path)) as clip:
        return [
            (packet.time_base * packet.pts, bytes(packet)) for packet in clip.demux(audio=0) if packet.pts is not None
        ]


class Unchanged:
    """Stands in for a Derainer, and counts."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def pictures(self, pictures):
        for key, picture in pictures:
            if self.count == self.stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            yield key, picture


@pytest.fixture
def derain(tmp_path):
    """Runs a clip through a derainer -> the result's path, and asserts which problems there were."""
    weights = tmp_path / "weights.pth"
    weights.touch()

    def run(clip, derainer=None, settings=(), damp=False, problem=None):
        result = video.result_path(clip, tmp_path / "out")
        problems = video.derain_clips({clip: result}, derainer or Unchanged(), weights, settings, damp)
        assert list(problems) == ([clip] if problem else []), problems
        assert not problem or problem in problems[clip]
        return result

    return run


def in_child(function):
    """Runs it in a process of its own -> its exit code: of a signal, the negative number."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def test_a_clip_is_derained_frame_by_frame_with_its_sound(tmp_path, narrow_weights, capsys):
    clip = write_clip(tmp_path / "clip.mp4", pictures(8), sound="aac")
    options = ["--weights", str(narrow_weights), "--win_size", "32", "--output_dir", str(tmp_path / "out")]
    script.main(["--input_dir", str(clip), *options])
    assert "on cpu: 1 clip ->" in capsys.readouterr().out
    result = tmp_path / "out" / "clip.mp4"
    derainer = Derainer(load_network(narrow_weights), window=32)
    luma = (0.299, 0.587, 0.114)  # the colours of what a random network makes are lost to their halved resolution
    expected = np.stack([derainer(image.astype(np.uint8)) for image in arrays(clip)[:3]]) @ luma
    assert np.abs(arrays(clip)[:3] @ luma - expected).mean() > 10  # the network does something
    assert np.abs(arrays(result)[:3] @ luma - expected).mean() < 4
    assert times(result) == times(clip) and len(times(result)) == 8
    assert read_clip(result)[1].average_rate == 25
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
    clip = write_clip(tmp_path / name, pictures(30), codec=codec, sound=sound)
    result = derain(clip)
    assert result.name == result_name
    assert times(result) == times(clip) and len(times(result)) == 30
    assert np.abs(arrays(result) - arrays(clip)).mean() < 2
    before, after = sound_packets(clip), sound_packets(result)
    assert len(before) == len(after)
    assert all(old.endswith(new) and new for (_, old), (_, new) in zip(before, after))  # .ts adds headers
    offset = [sound_packets(path)[0][0] - read_clip(path)[0][0].time for path in (clip, result)]
    assert offset[0] == pytest.approx(offset[1], abs=2e-3)  # sound and picture together
    assert read_clip(result)[0][0].time < 0.1  # programme streams begin later


def test_sound_that_the_container_cannot_hold_is_left_out_and_named(derain, tmp_path, caplog):
    clip = write_clip(tmp_path / "a.avi", pictures(3), codec="mpeg4", sound="pcm_mulaw")
    assert len(read_clip(derain(clip))[0]) == 3
    assert "its pcm_mulaw sound was left out" in caplog.text


def test_variable_frame_rates_are_kept(derain, tmp_path):
    moments = np.cumsum(np.random.default_rng(0).integers(100, 3000, 60)).tolist()
    clip = write_clip(tmp_path / "a.mp4", pictures(60), times=moments)
    assert times(derain(clip)) == times(clip)


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
    clip = write_clip(tmp_path / "a.mp4", pictures(3, *size), format=format, **colours)
    result = derain(clip)
    (before, *_), (after, *_) = read_clip(clip)[0], read_clip(result)[0]
    for name in ("width", "height", "colorspace", "color_range", "color_primaries", "color_trc"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.format.name == before.format.name
    difference = np.abs(arrays(result, "rgb48le") - arrays(clip, "rgb48le")) / 257
    assert difference.mean() < 2 and np.percentile(difference, 99) < 8


def test_odd_sizes_whose_colours_are_halved_keep_their_size(derain, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", pictures(3, 33, 47), codec="libvpx-vp9")
    assert read_clip(clip)[0][0].format.name == "yuv420p"
    result = derain(clip)
    assert arrays(result).shape == (3, 33, 47, 3)
    assert np.abs(arrays(result) - arrays(clip)).mean() < 3


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV is too old to turn a clip")
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_turned_clips_become_upright(derain, tmp_path, rotation):
    clip = write_clip(tmp_path / "a.mp4", pictures(2), rotation=rotation)
    assert read_clip(clip)[0][0].rotation % 360 == rotation % 360
    result = derain(clip)
    assert read_clip(result)[0][0].rotation == 0
    assert np.abs(arrays(result) - np.rot90(arrays(clip), rotation // 90, axes=(1, 2))).mean() < 2


@pytest.mark.parametrize("moment, damp", [(0, False), (30, False), (30, True), ("segment", False), ("join", True)])
def test_a_killed_run_goes_on_and_ends_in_the_same_video(derain, tmp_path, monkeypatch, moment, damp):
    clip = write_clip(tmp_path / "clip.mp4", pictures(72), sound="aac")
    expected = derain(clip, damp=damp).rename(tmp_path / "uninterrupted.mp4")

    def killed():
        if moment == "segment":  # written, but not yet renamed
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if moment == "join":
            merge = video.heapq.merge

            def half(*streams, key):
                for number, packet in enumerate(merge(*streams, key=key)):
                    if number == 70:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield packet

            monkeypatch.setattr(video.heapq, "merge", half)
        derain(clip, Unchanged(stop_at=moment), damp=damp)

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "out" / "clip.mp4").exists()
    derainer = Unchanged()
    result = derain(clip, derainer, damp=damp)
    again = 1 if damp and moment in (30, "join") else 0  # the last frame before, to damp the next one with it
    assert derainer.count == {0: 72, 30: 48, "segment": 72, "join": 0}[moment] + again
    assert (arrays(result) == arrays(expected)).all() and times(result) == times(expected)
    assert sound_packets(result) == sound_packets(clip)
    assert [path.name for path in result.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_what_is_there_already_is_not_made_again(derain, tmp_path, monkeypatch, name):
    clip, derainer = write_clip(tmp_path / name, pictures(3)), Unchanged()

    def killed():  # when the result had its name, before the segments were gone
        monkeypatch.setattr(video.shutil, "rmtree", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        derain(clip)

    assert in_child(killed) == -signal.SIGKILL
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert [path.name for path in derain(clip, derainer).parent.iterdir()] == [name]
    assert derainer.count == 0


@pytest.mark.parametrize("change", ["settings", "weights", "clip"])
def test_what_was_made_otherwise_is_made_anew(derain, tmp_path, change):
    clip = write_clip(tmp_path / "clip.mp4", pictures(50))
    assert in_child(lambda: derain(clip, Unchanged(stop_at=40))) == -signal.SIGKILL
    assert len(list((tmp_path / "out").iterdir())) == 1
    if change == "weights":
        (tmp_path / "weights.pth").write_bytes(b"other")
    if change == "clip":
        write_clip(clip, pictures(40))
    derainer = Unchanged()
    result = derain(clip, derainer, settings=("whole",) if change == "settings" else ())
    assert derainer.count == len(times(clip)) == len(times(result))
    assert [path.name for path in result.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_clip_that_is_cut_off_is_derained_as_far_as_it_goes(tmp_path, narrow_weights, name):
    noise = np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    clip = write_clip(tmp_path / name, noise, options={"movflags": "faststart"}.items())
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 3])
    options = ["--weights", str(narrow_weights), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        script.main(["--input_dir", str(clip), *options])
    assert f"{clip} is damaged or cut off: {tmp_path / 'out' / name} holds what could be read" in caught.value.code
    assert 10 < len(times(tmp_path / "out" / name)) < 30


def test_a_clip_with_a_hole_is_derained_around_it(derain, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    clip = write_clip(tmp_path / "clip.mp4", noise, options={"movflags": "faststart"}.items())
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    clip.write_bytes(data)
    for _ in range(2):  # it does not pass for whole the second time
        assert 30 < len(times(derain(clip, problem="is damaged or cut off"))) < 40


@pytest.mark.parametrize("damage", ["sound", "all sound"])
def test_damaged_sound_does_not_lose_the_pictures(derain, tmp_path, damage):
    clip = write_clip(tmp_path / "clip.ts", pictures(30), sound="aac")
    with av.open(str(clip)) as container:
        stream = container.streams.audio[0].id
    data = bytearray(clip.read_bytes())
    packets = [start for start in range(0, len(data), 188) if (data[start + 1] & 31) << 8 | data[start + 2] == stream]
    for start in packets if damage == "all sound" else packets[5::3]:
        data[start + 1 : start + 3] = b"\x1f\xff"  # becomes padding
    clip.write_bytes(data)
    for _ in range(2):  # it does not pass for whole the second time
        result = derain(clip, problem="is damaged or cut off")
        assert len(times(result)) == 30
    with av.open(str(result)) as container:
        assert len(container.streams.audio) == (damage == "sound")


def test_names_of_clips_are_as_long_as_names_may_be(derain, tmp_path):
    clip = write_clip(tmp_path / f"{'雨' * 83}.mp4", pictures(3))
    assert len(times(derain(clip))) == 3


def test_a_clip_that_vanishes_or_breaks_the_library_does_not_lose_the_others(derain, tmp_path, monkeypatch):
    derain(tmp_path / "gone.mp4", problem="gone.mp4 cannot be derained (No such file")
    clip, encode = write_clip(tmp_path / "clip.mp4", pictures(3)), video.write_segment

    def fail(*_):
        raise av.error.InvalidDataError(1, "a bug")

    monkeypatch.setattr(video, "write_segment", fail)
    derain(clip, problem="clip.mp4 cannot be derained (a bug)")
    monkeypatch.setattr(video, "write_segment", encode)
    assert len(times(derain(clip))) == 3


def test_what_is_no_video_is_named(derain, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    derain(tmp_path / "text.mp4", problem="text.mp4 cannot be read as a video (Invalid data")
    with av.open(str(tmp_path / "sound.mp4"), "w") as target:
        track = target.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((2, 4800), np.float32), format="fltp", layout="stereo")
        samples.sample_rate = 48000
        target.mux([*track.encode(samples), *track.encode(None)])
    derain(tmp_path / "sound.mp4", problem="sound.mp4 holds no moving pictures")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["000000.nut", "clip.mp4"])
def test_a_full_disk_leaves_no_half_clip(derain, tmp_path, what):
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 48, 3), dtype=np.uint8)
    clip = write_clip(tmp_path / "clip.mp4", noise)
    result, report = derain(clip), tmp_path / "report"
    limit = {"000000.nut": 2_000, "clip.mp4": result.stat().st_size - 2_000}[what]
    result.unlink()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            derain(clip)
        except UserError as error:
            report.write_text(str(error))

    assert in_child(limited) == 0
    assert f"{what} cannot be written (File too large): free some space" in report.read_text()
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(left) == ([] if what == "000000.nut" else ["000000.nut", "000001.nut"])
    assert len(times(derain(clip))) == 48


def test_memory_does_not_grow_with_a_clip(derain, tmp_path):
    def peak(count):
        clip = write_clip(tmp_path / f"{count}.mp4", (np.full((270, 480, 3), i % 256, np.uint8) for i in range(count)))
        report = tmp_path / "report"

        def run():
            derain(clip)
            report.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

        assert in_child(run) == 0
        return int(report.read_text()) / 1024

    frames = 200 * 270 * 480 * 3 / 2**20  # MiB that 200 frames more would take
    assert peak(260) - peak(60) < frames / 4


def test_steady_damps_flicker_and_leaves_alone_what_moves():
    rng = np.random.default_rng(0)
    scene = next(pictures(1, 64, 96)).astype(int)
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


def test_flicker_is_measured_where_nothing_moves():
    frames = np.full((4, 64, 64, 3), 100, np.uint8)
    frames[:, :, 48:] += np.array([0, 50, 0, 50], np.uint8)[:, None, None, None]  # something moves
    removed = frames.copy()
    removed[::2] += 6
    assert flicker(frames, removed) == pytest.approx(6)
    assert flicker(frames, frames) == 0


def test_clips_are_told_from_pictures(tmp_path):
    for name in ("a.mp4", "b.MOV", "c.png", ".d.mp4"):
        (tmp_path / name).touch()
    folder, pattern = str(tmp_path), f"{tmp_path}/*.*4"
    assert video.split_clips([folder, "nowhere.mp4"]) == ([], [folder, "nowhere.mp4"])
    assert video.split_clips([pattern, f"{folder}/a.mp4"]) == ([tmp_path / "a.mp4"], [])
    assert video.split_clips([f"{folder}/*"]) == ([tmp_path / "a.mp4", tmp_path / "b.MOV"], [f"{folder}/*"])


@pytest.fixture
def run(tmp_path, narrow_weights, monkeypatch):
    """Runs test.py as one of two processes -> the names of the results that there are then."""

    def run_script(clips, rank, out="out", *more):
        monkeypatch.setattr(script, "start_processes", lambda *_, **__: (torch.device("cpu"), rank, 2))
        monkeypatch.setattr(Derainer, "pictures", lambda _, frames: frames)
        options = ["--weights", str(narrow_weights), "--output_dir", str(tmp_path / out)]
        script.main(["--input_dir", *map(str, clips), *options, *more])
        return sorted(path.name for path in (tmp_path / out).glob("*.*"))

    return run_script


def test_processes_share_clips_by_size(run, tmp_path):
    lengths = {"a.mp4": 2, "b.mp4": 40, "c.mp4": 2}
    clips = [write_clip(tmp_path / name, pictures(count)) for name, count in lengths.items()]
    assert run(clips, rank=0) == ["b.mp4"]
    assert run(clips, rank=1) == ["a.mp4", "b.mp4", "c.mp4"]


def test_results_that_are_there_are_kept(run, tmp_path, capsys):
    clips = [write_clip(tmp_path / name, pictures(2)) for name in ("a.mp4", "b.mp4")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_bytes(b"mine")
    run(clips, 0, "out", "--skip_existing")
    run(clips, 1, "out", "--skip_existing")
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"mine" and (tmp_path / "out" / "b.mp4").stat().st_size > 4
    assert "2 clips (1 of them there already)" in capsys.readouterr().out


def test_results_overwrite_neither_clips_nor_each_other(run, tmp_path):
    (tmp_path / "x").mkdir()
    names = {"x/a.mkv": "libx264", "x/a.mp4": "libx264", "x/a.webm": "libvpx-vp9", "a.mp4": "libx264"}
    clips = [write_clip(tmp_path / name, pictures(2), codec=codec) for name, codec in names.items()]
    before = {path: path.read_bytes() for path in clips}
    with pytest.raises(SystemExit, match=f"{clips[3]} and {clips[1]} could both become .*: rename one of them"):
        run(clips, rank=0)
    assert run(clips, rank=1) == ["a.mkv", "a.mp4", "a.webm.mp4"]
    with pytest.raises(SystemExit, match=f"{clips[1]}: its result would overwrite {clips[3]}"):
        run(clips[1:], rank=0, out=".")
    assert {path: path.read_bytes() for path in clips} == before


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"a\.mp4 is a video, which PyAV .* pip install -r requirements-extras\.txt"):
        video.split_clips([str(tmp_path / "a.mp4")])
