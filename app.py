"""Derains pictures and clips in a browser.

pip install -r requirements-app.txt
python app.py                           then open the address that it prints
"""

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image

from utils import pictures
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import Derainer, derain_files
from utils.devices import add_gpus, choose_device, print_warnings
from utils.files import UserError, counted, listed, out_of_memory, reports_errors
from utils.pictures import CLIP_ENDINGS, ENDINGS, read_image
from utils.video import count_frames, is_clip, result_path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # read while it is imported
try:
    import gradio as gr
except ImportError:
    sys.exit("error: Gradio, which shows the page, is not installed: pip install -r requirements-app.txt")

EXAMPLES = sorted((Path(__file__).parent / "Datasets" / "demo" / "test" / "input").glob("*.png"))
UPLOAD_MB = 200  # of each file
KEPT, SWEEP = 3600, 60  # seconds until uploads and results are deleted, and between looks for them
PREVIEW = (1600, 1600)  # pixels that the slider shows at most


class Stopped(Exception):
    """The visitor or the time limit ended the work."""


def find_weights(chosen):
    """-> dict of name -> checkpoint: the chosen one first, this repository's own, and all others below checkpoints/."""
    folder = OWN_WEIGHTS.parent
    return {os.path.relpath(path, folder): path for path in [chosen, OWN_WEIGHTS, *sorted(folder.rglob("*.pth"))]}


def derain_uploads(uploads, folder, derainer, watch):
    """Derains uploaded files into a folder -> dict of upload -> result, and sentences about what could not be done.

    watch(pictures done so far, a fraction, and their number) is called after each batch of windows; what is finished
    when it raises Stopped is kept.
    """
    outputs, problems, done = {}, [], 0
    for path in map(Path, uploads):
        output = result_path(path, folder) if is_clip(path) else folder / f"{path.stem}.png"
        if output in outputs.values():
            problems.append(f"{path.name} and another file would both become {output.name}: rename one of them.")
        else:
            outputs[path] = output
    total = sum(map(count_frames, outputs))

    def progress(share):
        nonlocal done
        done += share
        watch(min(done, total), total)

    try:
        for _, error in derain_files(derainer, outputs, progress=progress):
            if error:
                problems.append(str(error))
    except Stopped as error:
        problems.append(str(error))
    for path, output in outputs.items():  # visitors know the names alone
        problems = [problem.replace(f"{path.parent}/", "").replace(f"{output.parent}/", "") for problem in problems]
    return {path: output for path, output in outputs.items() if output.exists()}, problems


def preview(path):
    image = Image.fromarray(read_image(path))
    image.thumbnail(PREVIEW)
    return image


def show(results, folder):
    """Results of derain_uploads in a folder -> what slider, video and file show."""
    if not results:
        return gr.update(value=None, visible=True), gr.update(value=None, visible=False), None
    (upload, result), *others = results.items()
    file = shutil.make_archive(f"{folder}/../derained", "zip", folder) if others else str(result)
    pair, video = (None, str(result)) if is_clip(upload) else ((preview(upload), preview(result)), None)
    return gr.update(value=pair, visible=not video), gr.update(value=video, visible=bool(video)), file


def build(device, weights, seconds, stops):
    """-> the page.

    Args:
        device: where networks compute
        weights: dict of name -> checkpoint, the first one chosen at the start
        seconds: time limit of a request's work
        stops: an empty dict, to hold the event that stops the work of each visitor (session hash)
    """

    def derain(uploads, name, mode, request: gr.Request, progress=gr.Progress()):  # noqa: B008 (Gradio's convention)
        start, stop, results = time.monotonic(), threading.Event(), {}
        stops[request.session_hash] = stop

        def watch(done, total):
            if stop.is_set():
                raise Stopped("Stopped before all was done.")
            if time.monotonic() - start > seconds:
                raise Stopped(f"Stopped at the time limit of {seconds} seconds, before all was done.")
            progress(done / total, desc=f"{done:.1f} of {counted(total, 'picture')}")

        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder, "results")
            folder.mkdir()
            try:
                if not uploads:
                    raise UserError("Choose pictures or a clip first.")
                derainer = Derainer(load_network(weights[name]).to(device), mode)
                results, problems = derain_uploads(uploads, folder, derainer, watch)
            except UserError as error:
                problems = [str(error)]
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                problems = ["There is not enough memory for this: choose smaller pictures."]
            finally:
                del stops[request.session_hash]
            message = f"{counted(len(results), 'file')} derained in {time.monotonic() - start:.0f} seconds."
            yield *show(results, folder), message + listed(problems)  # Gradio copies the files before this goes on

    def stop(request: gr.Request):
        if request.session_hash in stops:
            stops[request.session_hash].set()

    with gr.Blocks(title="NeRD-Rain", delete_cache=(SWEEP, KEPT + seconds), analytics_enabled=False) as page:
        gr.Markdown(
            "# NeRD-Rain\nRemoves rain from photographs and clips: up to "
            f"{pictures.MOST_PIXELS // 10**6} megapixels a picture, {UPLOAD_MB} MB a file and {seconds} seconds a "
            f"request. Uploads and results are deleted after {(KEPT + seconds) // 60} minutes."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=400):
                endings = sorted(ENDINGS | CLIP_ENDINGS)
                uploads = gr.File(label="Pictures or a clip", file_count="multiple", file_types=endings)
                examples = gr.Dataset(  # not gr.Examples, whose files are deleted after a while
                    label="Examples",
                    components=[gr.Image(visible=False)],
                    samples=[[str(path)] for path in EXAMPLES],
                    type="index",
                )
                name = gr.Dropdown(list(weights), label="Weights")
                mode = gr.Radio(["tile", "window"], value="tile", label="Mode")
                with gr.Row():
                    button = gr.Button("Derain", variant="primary", scale=3, min_width=0)
                    stopper = gr.Button("Stop", min_width=0)
            with gr.Column(scale=4):
                slider = gr.ImageSlider(label="Rainy and derained", interactive=False, format="png", max_height=600)
                video = gr.Video(label="Derained", visible=False)
                file = gr.File(label="Result", interactive=False, height=120)
                status = gr.Textbox(label="What was done", interactive=False)
        examples.click(lambda index: [str(EXAMPLES[index])], examples, uploads, queue=False, api_visibility="private")
        results = [slider, video, file, status]
        button.click(derain, [uploads, name, mode], results, show_progress_on=[slider, video])
        stopper.click(stop, queue=False)
        page.unload(stop)
    return page


def serve(args, device):
    """Shows the page until Ctrl-C."""
    stops = {}
    page = build(device, find_weights(args.weights), args.max_seconds, stops)
    _, url, _ = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=f"{UPLOAD_MB}mb",
        allowed_paths=[str(path) for path in EXAMPLES],
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # not from Google's servers
    )
    print(f"{url} derains pictures on {device}; Ctrl-C ends it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        for stop in list(stops.values()):
            stop.set()
        while stops:  # a network that still computes while Python ends makes it crash
            time.sleep(0.1)
        page.close(verbose=False)


@reports_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--weights", type=Path, default=OWN_WEIGHTS, help="the checkpoint that is chosen at the start")
    add_gpus(parser)
    parser.add_argument("--max_megapixels", type=int, default=24, help="of a picture (default: %(default)s)")
    parser.add_argument("--max_seconds", type=int, default=900, help="of a request's work (default: %(default)s)")
    args = parser.parse_args(argv)
    device = choose_device(args.gpus)
    print_warnings(device, args.gpus)
    load_network(args.weights)  # says now what is wrong with it
    try:  # Gradio would try a hundred ports for minutes
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{args.host} cannot be used ({error}): choose another --host or --port.") from error
    pictures.MOST_PIXELS = args.max_megapixels * 10**6
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    os.environ["no_proxy"] = f"{os.environ.get('no_proxy', '')},localhost,{args.host}"  # Gradio asks its own page
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads and results: nothing is left when the app ends
        serve(args, device)


if __name__ == "__main__":
    main()
