"""Deraining clips with PyAV, which brings its own FFmpeg libraries, frame by frame in constant memory."""

import contextlib
import heapq
import itertools
import logging
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from utils import pictures
from utils.files import UserError, atomic_write

try:
    import av
except ImportError:
    av = None

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # of results; other clips become .mp4
LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")  # by number of channels, for files without any
ENCODER = {"crf": "17", "bf": "0"}  # without B-frames, packets come in the order of their frames, from time 0 on
# For frames blurred by BLUR pixels, which hardly any rain survives, in levels of 255: how far the frames before and
# after may differ where a scene is still, and how far the one between them, in which a ball may pass.
BLUR, MOVED, PASSED = 2, 4, 20
logger = logging.getLogger(__name__)


def is_clip(path):
    """Whether a file is named like a video."""
    return Path(path).suffix.lower() in pictures.CLIP_ENDINGS


def result_path(clip, output_dir):
    """Where a clip's result goes: clip.webm becomes clip.webm.mp4, as there may be a clip.mp4, too."""
    clip = Path(clip)
    return Path(output_dir, clip.name if clip.suffix.lower() in CONTAINERS else f"{clip.name}.mp4")


class Clip:
    """A video file, open for reading. `damaged` tells whether a part of it could not be read, `length` estimates its
    number of frames. Raises UserError for a file that is missing or no video, and without PyAV."""

    def __init__(self, path):
        if av is None:
            raise UserError(f"{path} is a video, which needs PyAV: pip install -r requirements-extras.txt")
        old = int(av.__version__.partition(".")[0]) < 19  # newer releases do so by themselves
        try:
            self.container = av.open(str(path), **({"metadata_errors": "replace"} if old else {}))
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be read as a video ({error.strerror}): replace or remove it.") from error
        self.path, self.damaged = path, False
        self.start = Fraction(self.container.start_time or 0, av.time_base)  # seconds
        self.duration = Fraction(self.container.duration or 0, av.time_base)
        self.video = self.container.streams.best("video")
        if self.video is None:
            raise UserError(f"{path} has no video stream: remove it.")
        if self.video.width * self.video.height > pictures.MOST_PIXELS:
            raise UserError(f"{path} has more than {pictures.MOST_PIXELS // 10**6} megapixels a frame: reduce them.")
        self.rate = self.video.average_rate or Fraction(25)
        self.length = self.video.frames or round(self.duration * self.rate)

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
        """The frames that can be decoded, in order. Their times always increase, as encoders require."""
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


def count_frames(path):
    """-> the number of frames of a clip, an estimate; 1 for a picture and for a clip that cannot be read."""
    if is_clip(path):
        with contextlib.suppress(UserError), Clip(path) as clip:
            return max(1, clip.length)
    return 1


def quarter_turns(frame):
    """How many quarter turns, counterclockwise, bring a frame upright."""
    return round(frame.rotation / 90)


def to_array(frame, first):
    """A frame -> H×W×3 RGB, upright, in the size of the clip's first frame; uint16 where that has more than 8 bits."""
    depth = "rgb48le" if first.format.components[0].bits > 8 else "rgb24"
    return np.rot90(frame.to_ndarray(format=depth, width=first.width, height=first.height), quarter_turns(first))


def pixel_format(frame):
    """The pixel format to encode in: the frame's own where H.264 has it and its size allows."""
    deep = "10le" if frame.format.components[0].bits > 8 else ""
    name = frame.format.name.replace("yuvj", "yuv")  # color_range says that their range of values is full
    if frame.width % 2 or frame.height % 2:  # subsampling needs even sides
        return f"yuv444p{deep}"
    return name if name in (f"yuv422p{deep}", f"yuv444p{deep}") else f"yuv420p{deep}"


def steady_frame(before, now, after):
    """The second of three derained frames, H×W×3, without flicker: the median of the three wherever nothing moves."""
    frames = [frame.astype(np.float32) for frame in (before, now, after)]
    first, middle, last = (cv2.GaussianBlur(frame, (0, 0), BLUR) for frame in frames)
    moves = np.maximum(np.abs(last - first) / MOVED, np.abs(middle - (first + last) / 2) / PASSED)
    share = np.clip(2 - moves.max(axis=2, keepdims=True) * 255 / pictures.peak_value(now.dtype), 0, 1)
    return np.round(frames[1] + share * (np.median(frames, axis=0) - frames[1])).astype(now.dtype)


def steadied(results):
    """Iterable of (key, derained frame) -> yields (key, steady frame), each after the next one has come."""
    before = now = None
    for after in itertools.chain(results, [None]):
        if now:
            yield now[0], steady_frame(*(frame[1] for frame in (before or now, now, after or now)))
        before, now = now, after


def video_packets(target, clip, first, results):
    """Encodes ((time, duration), derained frame) as H.264 with the rate, size, depth and colours of the clip's first
    frame -> yields packets for the container `target`; the clip's start becomes time 0."""
    stream = target.add_stream("libx264", rate=clip.rate, options=ENCODER)
    encoder, turned = stream.codec_context, quarter_turns(first) % 2
    encoder.time_base, encoder.pix_fmt = clip.video.time_base, pixel_format(first)
    encoder.width, encoder.height = (first.height, first.width) if turned else (first.width, first.height)
    aspect = clip.video.sample_aspect_ratio or Fraction(1)
    encoder.sample_aspect_ratio = 1 / aspect if turned else aspect
    for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(encoder, name, getattr(first, name))
    for (time, duration), image in results:
        frame = av.VideoFrame.from_ndarray(image, "rgb24" if image.dtype == np.uint8 else "rgb48le")
        frame.colorspace, frame.color_range = encoder.colorspace, encoder.color_range
        frame = frame.reformat(format=encoder.pix_fmt)
        frame.pts, frame.duration = time - round(clip.start / encoder.time_base), duration
        frame.time_base = encoder.time_base
        yield from stream.encode(frame)
    yield from stream.encode(None)


def sound_packets(target, clip):
    """Yields the packets of the clip's sound for the container `target`; the clip's start becomes time 0. Kinds that it
    cannot hold are left out."""
    streams = {}
    for sound in clip.container.streams.audio:
        if not getattr(sound, "sample_rate", None):  # none of its packets could be read, or its kind is unknown
            clip.damaged = True
            continue
        try:
            streams[sound] = target.add_stream_from_template(sound)
        except ValueError:
            logger.warning(
                f"{clip.path}: its {sound.name} sound was left out, as {target.format.name} files cannot hold it; to "
                "keep it, convert the clip to .mkv first"
            )
            continue
        layout = sound.codec_context.layout
        if layout.name.endswith("channels") and layout.nb_channels <= len(LAYOUTS):  # AVI's have no name
            streams[sound].codec_context.layout = LAYOUTS[layout.nb_channels - 1]
    for packet in clip.packets():
        if packet.stream in streams and packet.pts is not None:  # a stream's last packet is empty
            packet.stream = streams[packet.stream]
            packet.pts = packet.dts = packet.pts - round(clip.start / packet.time_base)
            yield packet


def derain_clip(path, output, derainer, steady=False, progress=None):
    """Derains a clip to `output`, a `result_path`, with H.264 video and the clip's own sound. `steady` damps flicker;
    `progress` is called with the share of a frame that was just done.

    Raises UserError for what cannot be read as a video; and for a damaged one, after deraining what can be decoded.
    """
    with Clip(path) as clip, Clip(path) as sound:
        frames = clip.frames()
        first = next(frames, None)
        if first is None:
            raise UserError(f"{path} has no frame that can be decoded: replace or remove it.")
        arrays = (((frame.pts, frame.duration), to_array(frame, first)) for frame in itertools.chain([first], frames))
        results = derainer.stream(arrays, progress)
        if steady:
            results = steadied(results)
        try:
            with atomic_write(output) as file, av.open(file, "w", format=CONTAINERS[output.suffix.lower()]) as target:
                # Both add their streams before the first packet comes.
                streams = video_packets(target, clip, first, results), sound_packets(target, sound)
                for packet in heapq.merge(*streams, key=lambda packet: packet.pts * packet.time_base):
                    try:
                        target.mux(packet)
                    except av.FFmpegError as error:
                        if packet.stream.type == "video" or isinstance(error, OSError):  # such as a full disk's
                            raise
                        sound.damaged = True
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be derained ({error.strerror}): convert or remove it.") from error
    if clip.damaged or sound.damaged:
        raise UserError(f"{path} is damaged or cut off: {output} holds what could be decoded.")
