"""Deraining clips with PyAV, which brings its own ffmpeg libraries.

A clip is derained frame by frame, in constant memory, into segments that lie in a folder beside the result; at the end
they are joined with the clip's sound. The same command goes on after the segments that it finds.
"""

import glob
import hashlib
import heapq
import itertools
import logging
import os
import shutil
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import UserError, sentence
from utils.files import atomic_write, disk_failed, short_name
from utils.images import is_picture, peak_value

try:
    import av
except ImportError:
    av = None

EXTENSIONS = {".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts"}
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # of results; other clips become .mp4
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")  # of as many channels, where a file names none
SEGMENT = 24  # frames; what a killed run loses at most
# Without B-frames, packets come in the order of their frames, and segments of any frame rates can be joined. Without
# mbtree, small pictures give the same bytes in every run; with it, x264 reads memory that it has not written.
ENCODER = {"crf": "17", "bf": "0", "mbtree": "0"}
# In pictures blurred by BLUR pixels, which hardly any rain survives, levels of 255: how far the frames before and after
# may differ where a scene is still, and how far the one between them, in which a ball may pass.
BLUR, MOVED, PASSED = 2, 4, 20
logger = logging.getLogger(__name__)


def split_clips(sources):
    """Files, folders and glob patterns -> (the clips that they name, the sources that are left for pictures). Clips in
    a folder are left alone: photographs of telephones come with clips that nobody asked for.

    Raises UserError if there are clips but no PyAV.
    """
    clips, rest = [], []
    for source in sources:
        paths = [Path(source)] if Path(source).exists() else sorted(map(Path, glob.glob(source, recursive=True)))
        found = [path for path in paths if path.suffix.lower() in EXTENSIONS and path.is_file()]
        clips += found
        if not found or any(map(is_picture, paths)):
            rest.append(source)
    if clips and av is None:
        raise UserError(f"{clips[0]} is a video, which PyAV reads and writes: pip install -r requirements-extras.txt")
    return list(dict.fromkeys(clips)), rest


class Clip:
    """A video file, open for reading; `damaged` tells whether a part of it could not be read.

    Raises UserError for a file that is missing or no video.
    """

    def __init__(self, path):
        try:
            self.container = av.open(str(path), metadata_errors="replace")
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be read as a video ({error.strerror}): replace or remove it.") from error
        self.path, self.damaged = path, False
        self.start, self.duration = (
            Fraction(time or 0, av.time_base) for time in (self.container.start_time, self.container.duration)
        )
        self.video = self.container.streams.best("video")
        if self.video is None:
            raise UserError(f"{path} holds no moving pictures: remove it.")
        self.rate = self.video.average_rate or Fraction(25)
        self.length = self.video.frames or round(self.duration * self.rate)  # in frames; an estimate

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def packets(self):
        """The packets of all streams, up to where the file is cut off."""
        end = self.start
        try:
            for packet in self.container.demux():
                self.damaged |= packet.is_corrupt
                if packet.pts is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                yield packet
        except av.FFmpegError:
            self.damaged = True
        self.damaged |= end < self.start + self.duration - 1  # second; durations are rounded

    def frames(self):
        """The frames that can be decoded, in order; their times always increase, which encoders insist on."""
        step, last = max(1, round(1 / (self.rate * self.video.time_base))), None
        for packet in self.packets():
            if packet.stream is not self.video:
                continue
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.damaged = True
                continue
            for frame in frames:
                self.damaged |= frame.is_corrupt
                if last is not None:
                    frame.pts = last + step if frame.pts is None else max(frame.pts, last + 1)
                last = frame.pts = frame.pts or 0
                yield frame


def to_array(frame, like):
    """A frame -> H×W×3 RGB, upright, of the size of the frame `like`; uint16 where that has more than 8 bits."""
    depth = "rgb48le" if like.format.components[0].bits > 8 else "rgb24"
    return np.rot90(frame.to_ndarray(format=depth, width=like.width, height=like.height), turns(like))


def turns(frame):
    """How many quarter turns, counterclockwise, bring a frame upright."""
    return round(frame.rotation / 90)


def pixel_format(frame):
    """The pixel format to encode in: the frame's own where H.264 has it and its size allows."""
    name = frame.format.name.replace("yuvj", "yuv")  # their full range of values is said elsewhere
    deep = "10le" if frame.format.components[0].bits > 8 else ""
    if name not in {f"yuv{chroma}p{deep}" for chroma in (420, 422, 444)}:
        name = f"yuv420p{deep}"
    return f"yuv444p{deep}" if frame.width % 2 or frame.height % 2 else name  # halved colours need even sides


def steady(before, now, after):
    """The second of three derained frames, H×W×3, without flicker: the median of the three wherever nothing moves."""
    frames = [frame.astype(np.float32) for frame in (before, now, after)]
    first, middle, last = (cv2.GaussianBlur(frame, (0, 0), BLUR) for frame in frames)
    moves = np.maximum(np.abs(last - first) / MOVED, np.abs(middle - (first + last) / 2) / PASSED)
    share = np.clip(2 - moves.max(axis=2, keepdims=True) * 255 / peak_value(now.dtype), 0, 1)
    return np.round(frames[1] + share * (np.median(frames, axis=0) - frames[1])).astype(now.dtype)


def steadied(results):
    """An iterable of (key, derained frame) -> the same with `steady` frames, each once the next one has come."""
    before = now = None
    for after in itertools.chain(results, [None]):
        if now:
            yield now[0], steady(*(frame[1] for frame in (before or now, now, after or now)))
        before, now = now, after


def write_segment(path, results, like, clip):
    """Encodes results, an iterable of ((time, duration), H×W×3 array), with the colours and times of the clip's frame
    `like`, as H.264 in NUT, a container that keeps every clip's times exactly."""
    with atomic_write(path) as file, av.open(file, "w", format="nut") as segment:
        stream = segment.add_stream("libx264", rate=clip.rate, options=ENCODER)
        encoder = stream.codec_context
        encoder.time_base = clip.video.time_base
        encoder.pix_fmt = pixel_format(like)
        encoder.width, encoder.height = like.width, like.height
        encoder.sample_aspect_ratio = clip.video.sample_aspect_ratio or Fraction(1)
        if turns(like) % 2:
            encoder.width, encoder.height = like.height, like.width
            encoder.sample_aspect_ratio = 1 / encoder.sample_aspect_ratio
        for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
            setattr(encoder, name, getattr(like, name))
        for (time, duration), image in results:
            frame = av.VideoFrame.from_ndarray(image, "rgb24" if image.dtype == np.uint8 else "rgb48le")
            frame.colorspace, frame.color_range = like.colorspace, like.color_range
            frame = frame.reformat(format=encoder.pix_fmt)
            frame.pts, frame.duration, frame.time_base = time, duration, clip.video.time_base
            segment.mux(encoder.encode(frame))
        segment.mux(encoder.encode(None))


def join(segments, path, output, comment):
    """Writes segments as one file, with a comment and with the sound of the clip `path`, which is copied as it is
    -> whether the container took all of it. Of damaged sound it refuses packets, which are left out."""
    whole = True
    with (
        Clip(path) as clip,
        av.open(segments[0]) as first,
        atomic_write(output) as file,
        av.open(file, "w", format=CONTAINERS[output.suffix.lower()]) as target,
    ):
        target.metadata["comment"] = comment
        video = target.add_stream_from_template(first.streams.video[0], opaque=True)
        video.codec_context.framerate = clip.rate
        tracks = {}
        for track in clip.container.streams.audio:
            if not getattr(track, "sample_rate", None):  # none of its packets could be read, or its kind is unknown
                whole = False
                continue
            try:
                tracks[track] = target.add_stream_from_template(track)
            except ValueError:
                logger.warning(
                    "%s: its %s sound was left out, as %s files hold no such; first copy the clip to .mkv to keep it",
                    *(path, track.name, output.suffix),
                )
                continue
            layout = track.codec_context.layout
            if layout.name.endswith("channels") and layout.nb_channels <= len(LAYOUTS):  # AVI's have no name
                tracks[track].codec_context.layout = LAYOUTS[layout.nb_channels - 1]

        def pictures():
            for segment in segments:
                with av.open(segment) as container:
                    yield from ((video, packet) for packet in container.demux(video=0))

        def timed(packets):
            for stream, packet in packets:
                if packet.pts is not None:  # the last packet is empty, to flush a decoder
                    packet.stream = stream
                    packet.pts = packet.dts = packet.pts - round(clip.start / packet.time_base)
                    yield packet

        sound = ((tracks[packet.stream], packet) for packet in clip.packets() if packet.stream in tracks)
        for packet in heapq.merge(timed(pictures()), timed(sound), key=lambda packet: packet.pts * packet.time_base):
            try:
                target.mux(packet)
            except av.FFmpegError as error:
                if packet.stream is video or isinstance(error, OSError):  # such as a full disk's
                    raise
                whole = False
    return whole


def is_derained(output, digest):
    """Whether a result is there that was made with this digest."""
    try:
        with av.open(output) as clip:
            return {name.lower(): value for name, value in clip.metadata.items()}.get("comment") == digest
    except av.FFmpegError:
        return False


def digest_of(settings, *paths):
    """-> a short name that changes with the settings and with the files."""
    facts = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, paths)]
    return hashlib.sha256(repr((settings, facts, SEGMENT, ENCODER, av.__version__)).encode()).hexdigest()[:12]


def derain_clip(path, output, derainer, digest, damp):
    """Derains a clip to a file, unless it is there already; goes on where a call with the same digest stopped.

    Raises UserError for what is no video, and for a damaged one, of which what can be read is derained.
    """
    name = short_name(output.name)
    work = output.with_name(f"{name}.{digest}.parts")
    complete = is_derained(output, digest)
    for folder in output.parent.glob(f"{glob.escape(name)}.{'[0-9a-f]' * len(digest)}.parts"):
        if complete or folder != work:
            shutil.rmtree(folder)
    if complete:
        logger.info("%s is there already, made of %s with these weights and options", output, path)
        return
    done = len(list(work.glob("*.nut")))
    with Clip(path) as clip:
        frames = clip.frames()
        like = next(frames, None)
        if like is None:
            raise UserError(f"{path} holds no picture that can be decoded: replace or remove it.")
        known = 1 if damp and done else 0  # the last frame that was done is needed once more
        left = itertools.islice(itertools.chain([like], frames), done * SEGMENT - known, None)
        results = derainer.pictures(((frame.pts, frame.duration), to_array(frame, like)) for frame in left)
        results = itertools.islice(steadied(results) if damp else results, known, None)
        bar = {"desc": path.name, "unit": "frame", "initial": done * SEGMENT, "disable": None}
        results = iter(tqdm(results, total=clip.length, **bar))
        for first in results:
            segment = itertools.chain([first], itertools.islice(results, SEGMENT - 1))
            write_segment(work / f"{done:06}.nut", segment, like, clip)
            done += 1
    segments = sorted(work.glob("*.nut"))
    whole = not clip.damaged and join(segments, path, output, digest)
    if not whole:
        join(segments, path, output, "")
    shutil.rmtree(work)
    if not whole:
        raise UserError(f"{path} is damaged or cut off: {output} holds what could be read of it.")


def result_path(clip, output_dir):
    """Where a clip's result goes. Another container's ending stands behind the clip's own: clip.webm and clip.mp4 are
    two clips, also in two runs."""
    return output_dir / (clip.name if clip.suffix.lower() in CONTAINERS else f"{clip.name}.mp4")


def derain_clips(outputs, derainer, weights, settings, damp=False):
    """Derains the clips of a dict of input path -> result path -> dict of a clip's path -> why it, or a part of it,
    could not be done. What was made with the same weights, a path, and the same settings is kept. `damp` damps flicker
    (`steady`)."""
    problems = {}
    for path, output in outputs.items():
        try:
            derain_clip(path, output, derainer, digest_of((settings, damp), path, weights), damp)
        except UserError as error:
            if disk_failed(error):
                raise
            problems[path] = sentence(error)
        except (av.FFmpegError, OSError) as error:
            problems[path] = f"{path} cannot be derained ({error.strerror}): convert or remove it."
    return problems
