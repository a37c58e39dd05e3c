"""Derains pictures and short clips in a browser, by the code of test.py.

pip install -r requirements-app.txt
python app.py                           then open the address that it prints
"""

import argparse
import contextlib
import html
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from PIL import EpsImagePlugin, Image

from test import derain_all, results_of, without_clashes
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.devices import add_gpus, choose_device
from utils.errors import UserError, listed, out_of_memory, reports_errors, sentence
from utils.formats import QUALITY, announced_pixels
from utils.huge import HUGE
from utils.images import is_picture, read_image
from utils.inference import LARGE, MODES, Derainer
from utils.video import Clip, derain_clips, result_path, split_clips

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # read while it is imported
os.environ.pop("GRADIO_TEMP_DIR", None)  # files lie where they vanish when the program ends
try:
    import gradio as gr
except ImportError:
    sys.exit("error: Gradio, which shows the page, is not installed: pip install -r requirements-app.txt")

EXAMPLES = sorted((Path(__file__).parent / "Datasets" / "demo" / "test" / "input").glob("*.png"))
OWN, AUTOMATIC = "this repository's own (NeRD-Rain-S)", "auto"
UPLOAD_MB = 200  # of each file
ZIP_FILES, ZIP_MB = 1000, 1000  # what a zip file may hold, unpacked
QUEUE = 10  # requests that may wait
NO_PROXY = "localhost,127.0.0.1"  # Gradio asks its own page whether it is there
KEPT = 3600  # seconds until uploads and results are deleted; more where a request may wait and run for longer
SWEEP = 60  # seconds from one look for what is to be deleted to the next
PREVIEW = (1600, 1600)  # pixels that the page shows at most
LISTED = 20  # problems shown at most


class Stopped(UserError):
    """Deraining was stopped, by its visitor or by the time limit."""


class Watched(Derainer):
    """A Derainer that calls watch(pictures done so far, a fraction) before each batch of windows. What that raises ends
    the work."""

    def __init__(self, net, mode, watch):
        super().__init__(net, mode)
        self.watch, self.done = watch, 0

    def launch(self, group):
        self.watch(self.done)
        self.done += sum(1 / (len(piece.canvas.rows) * len(piece.canvas.columns)) for piece in group)
        return super().launch(group)


def find_weights(chosen):
    """-> dict of name -> checkpoint: the `chosen` one first, this repository's own, and all below checkpoints/."""
    folder = OWN_WEIGHTS.parent
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.pth")) if path != OWN_WEIGHTS}
    names = {OWN: OWN_WEIGHTS} | names
    first = {path.resolve(): name for name, path in names.items()}.get(chosen.resolve(), str(chosen))
    return {first: chosen} | (names | {first: chosen})  # the chosen one first


def unpack(archive, folder):
    """Unpacks a zip file into an empty folder -> (its pictures, sentences about what else is in it).

    Raises UserError for what is no zip file, and for one that holds too much.
    """
    try:
        file = zipfile.ZipFile(archive)
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(f"{archive} cannot be read as a zip file ({error}): pack it again.") from error
    problems = []
    with file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
        size = sum(entry.file_size for entry in entries) / 2**20  # no entry gives more than it says
        if len(entries) > ZIP_FILES or size > ZIP_MB:
            raise UserError(
                f"{archive} holds {len(entries)} files, unpacked {size:.0f} MB; here at most {ZIP_FILES} files and "
                f"{ZIP_MB} MB are taken: split it."
            )
        for entry in entries:
            try:
                file.extract(entry, folder)  # stays in the folder, whatever path the entry has
            except Exception as error:
                problems.append(f"{entry.filename} cannot be unpacked ({error}): pack it again.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    problems += [f"{path} is not named like a picture: it was left out." for path in paths if not is_picture(path)]
    return list(filter(is_picture, paths)), problems


def find_uploads(uploads, work):
    """Uploaded pictures, zip files and clips -> (clips, pictures as (paths, the folder they are relative to), sentences
    about what was left out). Zip files are unpacked below the folder `work`."""
    clips, rest = split_clips(uploads)
    found, problems = [], []
    for path in map(Path, rest):
        if path.suffix.lower() == ".zip":
            folder = Path(tempfile.mkdtemp(dir=work))
            try:
                pictures, left_out = unpack(path, folder)
            except UserError as error:
                pictures, left_out = [], [str(error)]
            found.append((pictures, folder))
            problems += left_out
        else:
            found.append(([path], path.parent))
    return clips, found, problems


def too_large(path, mode, megapixels):
    """-> why a picture is too large for this demo, or None."""
    pixels = announced_pixels(path)
    if pixels > megapixels * 10**6:
        return f"{path} has more than {megapixels} megapixels, the most that is taken here: make it smaller."
    if mode == "whole" and pixels > LARGE:
        return f"{path} has more than a megapixel, the most that is derained whole here: choose another mode."
    return None


def derain_uploads(uploads, work, weights, device, mode, megapixels, watch):
    """Derains uploaded files into work/results -> (results, (picture, its result) or None, sentences about problems).

    watch(pictures done, of how many) is called before each batch of windows; what is done when it raises Stopped is
    kept.
    """
    results = work / "results"
    clips, found, problems = find_uploads(uploads, work)
    outputs, refused = without_clashes(results_of(found, results, keep_format=False), [])
    refused |= {path: why for path in outputs if (why := too_large(path, mode, megapixels))}
    outputs = {path: output for path, output in outputs.items() if path not in refused}
    clips, clashes = without_clashes([(clip, result_path(clip, results)) for clip in clips], [])
    refused |= clashes
    frames = {}
    for path in clips:
        try:
            with Clip(path) as clip:
                frames[path] = max(1, clip.length)
                if clip.video.width * clip.video.height > megapixels * 10**6:
                    refused[path] = f"{path} has frames of more than {megapixels} megapixels: make it smaller."
        except UserError as error:
            refused[path] = str(error)
    clips = {path: output for path, output in clips.items() if path not in refused}
    total = len(outputs) + sum(frames[path] for path in clips)
    problems += refused.values()

    if total:
        net = load_network(weights).to(device)
        derainer = Watched(net, mode, lambda done: watch(done, total))
        try:
            for _, failure in derain_all(derainer, outputs, {}, QUALITY):
                problems += [sentence(failure)] if failure else []
            problems += derain_clips(clips, derainer, weights, (mode,)).values()
        except Stopped as error:
            problems.append(str(error))
    for unfinished in results.glob("*.parts"):  # of clips
        shutil.rmtree(unfinished)
    folders = [work, results, *(Path(path).parent for path in uploads), *(root for _, root in found)]
    for folder in sorted(map(str, folders), key=len, reverse=True):
        problems = [problem.replace(f"{folder}/", "") for problem in problems]  # visitors know the names alone
    done = sorted(path for path in results.rglob("*") if path.is_file())
    return done, next((pair for pair in outputs.items() if pair[1].exists()), None), list(dict.fromkeys(problems))


def preview(path, output):
    """Writes a picture as the page shows it -> its path."""
    image = Image.fromarray(read_image(path))
    image.thumbnail(PREVIEW)
    image.save(output, quality=QUALITY)
    return output


def sweep_fragments(folder, kept):
    """Deletes uploads that broke off, once they are older than `kept` seconds: Gradio forgets them."""
    while True:
        time.sleep(SWEEP)
        for path in folder.glob("gradio/tmp*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if path.is_file() and path.stat().st_mtime < time.time() - kept:
                    path.unlink()


def build(device, weights, megapixels, seconds, running):
    """-> the page. `weights`: dict of name -> checkpoint, the first one chosen at the start; `running`: a dict for the
    work that goes on, session -> the event that stops it."""
    kept, waiting = max(KEPT, (QUEUE + 2) * seconds), {}

    def enlist(request: gr.Request):
        """Runs as soon as the button is pressed: the last result is no longer on offer, what waits can be stopped."""
        waiting[request.session_hash] = threading.Event()
        return None, gr.update(value=None, visible=False), gr.update(label="Download", interactive=False), None

    def derain(uploads, name, mode, request: gr.Request, progress=gr.Progress()):  # noqa: B008 (how Gradio wants it)
        start, stop = time.monotonic(), waiting.pop(request.session_hash, threading.Event())
        running[request.session_hash] = stop

        def watch(done, total):
            if stop.is_set():
                raise Stopped("Stopped before all was done.")
            if time.monotonic() - start > seconds:
                raise Stopped(f"Stopped at the time limit of {seconds} seconds, before all was done.")
            number = min(int(done + 1e-6) + 1, total)  # how many frames a clip has is an estimate
            progress(min(done / total, 1), desc=f"picture {number} of {total}")

        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            try:
                if stop.is_set():
                    raise Stopped("Stopped before it began.")
                if not uploads:
                    raise UserError("There is nothing to derain yet: choose pictures, a zip file or a clip.")
                if gone := [path for path in uploads if not Path(path).exists()]:
                    raise UserError(f"{Path(gone[0]).name} has been deleted meanwhile: upload it again.")
                chosen = None if mode == AUTOMATIC else mode
                derained = derain_uploads(uploads, work, weights[name], device, chosen, megapixels, watch)
                results, pair, problems = derained
                if not results:
                    raise UserError("Nothing was derained." + listed(problems, LISTED))
            except UserError as error:
                message = html.escape(str(error)).replace("\n", "<br>")
                raise gr.Error(message, duration=None, print_exception=False) from error
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise gr.Error("The memory is too small for this: choose mode tile, or a smaller picture.") from error
            finally:
                del running[request.session_hash]
            result = results[0]
            if len(results) > 1:
                result = Path(shutil.make_archive(str(work / "derained"), "zip", work / "results"))
            pictures = pair and [preview(path, work / f"{i}.jpg") for i, path in enumerate(pair)]
            clip = str(result) if pair is None and len(results) == 1 else None
            done = f"{len(results)} done" if len(results) > 1 else f"{result.name} is done"
            yield (  # what it names is copied before this goes on
                gr.update(value=pictures, visible=not clip),
                gr.update(value=clip, visible=bool(clip)),
                gr.update(label=f"Download {result.name}", value=str(result), interactive=True),
                f"{done}, in {time.monotonic() - start:.0f} seconds.{listed(problems, LISTED)}",
            )

    def leave(request: gr.Request):
        for stops in (waiting, running):
            if request.session_hash in stops:
                stops[request.session_hash].set()

    def stop_work(request: gr.Request):
        leave(request)
        return "Stopped: nothing is done when its turn comes." if request.session_hash in waiting else gr.skip()

    with gr.Blocks(title="NeRD-Rain", delete_cache=(SWEEP, kept), analytics_enabled=False) as page:
        gr.Markdown(
            "# NeRD-Rain\nRemoves rain from photographs and short clips. Up to "
            f"{megapixels} megapixels a picture, {UPLOAD_MB} MB a file and {seconds} seconds a request; uploads and "
            f"results are deleted after {kept // 60} minutes."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=400):
                uploads = gr.File(
                    label="Pictures, a zip file of pictures, or a clip", file_count="multiple", height=180
                )
                folder = gr.UploadButton("… or a whole folder", file_count="directory", size="sm")
                examples = gr.Dataset(
                    label="… or an example",
                    components=[gr.Image(visible=False)],
                    samples=[[str(path)] for path in EXAMPLES],
                    type="index",
                )
                name = gr.Dropdown(list(weights), label="Weights", filterable=False)
                mode = gr.Radio([AUTOMATIC, *MODES], value=AUTOMATIC, label="Mode")
                with gr.Row():
                    button = gr.Button("Derain", variant="primary", scale=3, min_width=0)
                    stopper = gr.Button("Stop", min_width=0)
            with gr.Column(scale=4):
                slider = gr.ImageSlider(
                    label="Rainy and derained", interactive=False, height=440, buttons=["fullscreen"]
                )
                video = gr.Video(label="Derained", visible=False, height=440)
                status = gr.Textbox(label="What was done", interactive=False)
                download = gr.DownloadButton("Download", variant="primary", interactive=False)
        internal = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        folder.upload(lambda paths: paths, folder, uploads, **internal)
        examples.click(lambda index: [str(EXAMPLES[index])], examples, uploads, **internal)
        stopper.click(stop_work, None, status, **internal)
        shown = [slider, video, download, status]
        button.click(enlist, None, shown, **internal)
        button.click(
            derain,
            [uploads, name, mode],
            shown,
            concurrency_limit=1,
            api_visibility="private",
            show_progress_on=[slider, video],
        )
        page.unload(leave)
    return page.queue(max_size=QUEUE)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="the checkpoint that is chosen at the start")
    add_gpus(parser)
    parser.add_argument("--max_megapixels", type=int, default=24, help="of a picture (default: %(default)s)")
    parser.add_argument("--max_seconds", type=int, default=900, help="of a request's work (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.max_megapixels <= HUGE // 10**6:
        parser.error(f"--max_megapixels must lie between 1 and {HUGE // 10**6}; test.py derains larger pictures")
    if args.max_seconds < 1:
        parser.error("--max_seconds must be at least 1")
    if args.port is not None and not 0 < args.port < 2**16:
        parser.error(f"--port must lie between 1 and {2**16 - 1}")
    return args


@reports_errors
def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.gpus)
    load_network(args.weights)  # says now what is wrong with it
    if ":" in args.host:
        raise UserError(f"--host {args.host}: Gradio takes no IPv6 addresses, choose one such as 127.0.0.1.")
    try:  # Gradio would try a hundred ports for minutes
        socket.create_server((args.host, args.port or 0)).close()
    except OSError as error:
        where = args.host if args.port is None else f"{args.host}:{args.port}"
        raise UserError(f"{where} cannot be used ({error}): choose another --host or --port.") from error
    EpsImagePlugin.gs_binary = False  # PostScript is a programming language: what visitors send is not run
    for name in ("SIGTERM", "SIGHUP"):  # the latter of a terminal that is closed, where there is no nohup
        number = getattr(signal, name, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # what was uploaded is deleted then, too
    without_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, (without_proxy, NO_PROXY, args.host)))
    with tempfile.TemporaryDirectory(prefix="nerd_rain_", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder  # for all that this process writes
        running = {}
        page = build(device, find_weights(args.weights), args.max_megapixels, args.max_seconds, running)
        threading.Thread(target=sweep_fragments, args=(Path(folder), page.delete_cache[1]), daemon=True).start()
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=f"{UPLOAD_MB}mb",
            allowed_paths=[str(EXAMPLES[0].parent)],
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
        print(f"{url} derains pictures on {device}; Ctrl-C ends it.")
        page.block_thread()
        for stop in list(running.values()):
            stop.set()
        while running:  # a network that still computes while Python ends makes it crash
            time.sleep(0.1)


if __name__ == "__main__":
    main()
