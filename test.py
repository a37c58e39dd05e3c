"""Derains pictures: a file, a folder, a folder tree or a pattern; and clips: a file or a pattern.

python test.py --input_dir photo.jpg
python test.py --input_dir Datasets/Rain200L/test --target_dir Datasets/Rain200L/test --weights model_best.pth
torchrun --standalone --nproc_per_node 4 test.py --input_dir album/ --skip_existing
"""

import argparse
import glob
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from os.path import isdir, realpath
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.distributed import rendezvous
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ablations import network_name
from evaluations.evaluate import clean_folder
from evaluations.metrics import PROTOCOLS, psnr_ssim
from model import MULTIPLE
from utils import pictures
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import MODES, WINDOW, Derainer, is_current, remember_settings, remembered_settings, results_settings
from utils.devices import add_gpus, choose_device, cpu_warnings
from utils.files import UserError, counted, disk_failed, listed, reports_errors, sentence, write_csv
from utils.pairs import DATASETS, Pair, known_dataset, match_by_name
from utils.pictures import find_pictures, read_image
from utils.video import Clip, derain_clip, is_clip, result_path

ENSEMBLE_NOTE = "note: these weights were trained mostly on falling rain: --ensemble may lower quality."
BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"
COLUMNS = ("picture", "psnr_rainy", "ssim_rainy", "psnr_derained", "ssim_derained")
PANEL_ROWS = 6


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", nargs="+", required=True, help="rainy pictures: files, folders, 'patterns'; clips")
    add("--output_dir", type=Path, help="folder of results, or one picture's file (default: results/<input's name>)")
    add("--keep_format", action="store_true", help="write JPEG, WebP, TIFF, … for such inputs, instead of PNG")
    add("--skip_existing", action="store_true", help="keep earlier results of the same weights and settings")
    add("--quality", type=int, default=pictures.QUALITY, help="of JPEG, WebP and AVIF (default: %(default)s)")
    add("--weights", type=Path, default=OWN_WEIGHTS, help="a checkpoint of any network (default: our own weights)")
    add_gpus(parser)
    add("--mode", choices=MODES, help="default: window for test sets and with --target_dir, tile for other pictures")
    add("--win_size", type=int, default=WINDOW, help="side of windows and tiles (default: %(default)s)")
    add("--ensemble", action="store_true", help="mean of the eight turned and mirrored pictures")
    add("--bf16", action="store_true", help="bfloat16: faster, and nearly the same pictures")
    add("--compile", action="store_true", help="compile the network, which takes minutes: then faster on GPUs")
    add("--steady", action="store_true", help="clips: damp flicker where nothing moves")
    add("--target_dir", type=Path, help="clean pictures, or a test set's folder: measure PSNR and SSIM")
    add("--protocol", choices=PROTOCOLS, help="of measuring (default: the test set's in the paper, or rain200)")
    add("--panel", type=Path, help="with --target_dir: a PNG of rainy, derained and clean side by side")
    args = parser.parse_args(argv)
    if (args.panel or args.protocol) and not args.target_dir:
        parser.error("--panel and --protocol need clean pictures: give their folder with --target_dir")
    if args.win_size < MULTIPLE or args.win_size % MULTIPLE:
        parser.error(f"--win_size must be a multiple of {MULTIPLE}")
    if args.compile and args.mode == "whole":
        parser.error("--compile needs --mode window or tile")
    if not 1 <= args.quality <= 100:
        parser.error("--quality must lie between 1 and 100")
    return args


def split_clips(sources):
    """-> the clips that are named or match a pattern, and the sources of pictures. Clips within folders are skipped:
    phones store them beside photographs."""
    clips, others = [], []
    for source in sources:
        paths = [Path(source)] if os.path.exists(source) else sorted(map(Path, glob.glob(source, recursive=True)))
        found = [path for path in paths if is_clip(path) and path.is_file()]
        clips += found
        if not found or any(map(pictures.is_picture, paths)):
            others.append(source)
    return list(dict.fromkeys(clips)), others


def rainy_folder(source):
    """-> the folder itself, or its input/ if it is a data set's, with target/ beside."""
    return Path(source, "input") if isdir(Path(source, "input")) and isdir(Path(source, "target")) else source


def is_test_set(folder):
    parts = [part.lower() for part in Path(os.path.abspath(folder)).parts]
    return known_dataset(folder) is not None and (parts[-1] == "test" or parts[-2:] == ["test", "input"])


def default_output_dir(source):
    """-> results/<name of the data set or folder>, results/Rain200L for Datasets/Rain200L/test/input; results/ for a
    single file."""
    if os.path.isfile(source):
        return Path("results")
    parts = Path(os.path.abspath(find_pictures(source)[1])).parts[1:]
    return Path("results", *[part for part in parts if part not in ("test", "train", "input")][-1:])


def described(paths):
    """-> such as "3 pictures and 1 clip"."""
    clips = sum(map(is_clip, paths))
    numbers = {"picture": len(paths) - clips, "clip": clips}
    return " and ".join(counted(number, noun) for noun, number in numbers.items() if number) or "nothing"


def without_clashes(wanted, given):
    """Sorts out results that would overwrite another one or a file that was given.

    Takes (input path, result path) pairs and the given paths; returns dicts of input path: result path, and of input
    path: why it cannot be derained."""
    outputs, inputs, failures = {}, {}, {}
    given = set(map(realpath, given))
    for path, output in wanted:
        name = realpath(output)
        if name in given:
            failures[path] = f"{path}: its result would overwrite {output}, choose another --output_dir."
        elif inputs.setdefault(name, path) != path:
            failures[path] = f"{path} and {inputs[name]} would both become {output}: rename one of them."
        else:
            outputs[path] = output
    return outputs, failures


def find_targets(found, target_dir):
    """-> dict of rainy picture: clean picture, and all clean pictures. Raises UserError if none belong together."""
    clean, clean_root = find_pictures(clean_folder(target_dir))
    inputs = [path for paths, _ in found for path in paths]
    if len(inputs) == len(clean) == 1:
        return {inputs[0]: clean[0]}, clean  # whatever their names
    matches = [match_by_name(paths, clean, root, clean_root) for paths, root in found]
    targets = {pair.input: pair.target for pairs, _ in matches for pair in pairs}
    if not targets:
        problems = [problem for _, problems in matches for problem in problems]
        raise UserError(f"none of the pictures has a clean one in {target_dir}:{listed(problems, 3)}")
    return targets, clean


class Plan(NamedTuple):
    outputs: dict  # path of a picture or clip: path of its result
    failures: dict  # path: why it cannot be derained
    targets: dict  # path: path of the clean picture
    folder: Path  # of results
    names_file: bool  # whether --output_dir names a file in it
    test_sets: bool  # whether all pictures are of data sets' test folders
    notes: list  # sentences on what is left out


def make_plan(args):
    """Raises UserError if nothing of it can be done as it was meant."""
    clips, sources = split_clips(args.input_dir)
    sources = list(map(rainy_folder, sources))
    folder = args.output_dir or default_output_dir([*sources, *clips][0])
    names_file = folder.suffix.lower() in pictures.ENDINGS and not folder.is_dir()
    if folder.is_file() and not names_file:
        raise UserError(f"{folder} is a file: choose another --output_dir.")
    if realpath(folder) in [realpath(source) for source in sources if isdir(source)]:
        raise UserError(f"{folder} is the input folder: choose another --output_dir.")

    found, wanted = [find_pictures(source, [folder]) for source in sources], []
    for path, root in [(path, root) for paths, root in found for path in paths]:
        keeps = args.keep_format and path.suffix.lower() in pictures.KEEPABLE
        wanted.append((path, (folder / path.relative_to(root)).with_suffix(path.suffix if keeps else ".png")))
    wanted += [(clip, result_path(clip, folder)) for clip in clips]
    inputs = list(dict(wanted))
    if names_file:
        if len(inputs) > 1 or clips:
            raise UserError(f"{folder} is one picture's name, not a folder for {described(inputs)}: give a folder.")
        wanted, folder = [(inputs[0], folder)], folder.parent

    targets, clean = find_targets(found, args.target_dir) if args.target_dir else ({}, [])
    outputs, failures = without_clashes(wanted, [*inputs, *clean])
    if args.panel and realpath(args.panel) in map(realpath, [*inputs, *clean, *outputs.values()]):
        raise UserError(f"--panel would overwrite {args.panel}: choose another name.")
    notes = list(filter(None, (pictures.skipped(source, [folder]) for source in sources)))
    test_sets = bool(found) and all(is_test_set(root) for _, root in found)
    return Plan(outputs, failures, targets, folder, names_file, test_sets, notes)


def derain_files(derainer, outputs, args, quiet):
    """Derains the files of a dict of input path: result path -> dict of input path: why it failed. Raises UserError if
    the disk is full."""

    def finish(path, _, result):
        pictures.write_picture(outputs[path], result, args.quality)

    def outcomes():
        paths = [path for path in outputs if not is_clip(path)]
        with tqdm(total=len(paths), bar_format=BAR, disable=quiet or not paths or None) as bar:
            yield from derainer.files(paths, finish, bar.update)  # which calls it after each batch of windows
        for path in filter(is_clip, outputs):
            try:
                with Clip(path) as clip, tqdm(desc=path.name, total=clip.length, disable=quiet or None) as bar:
                    yield path, derain_clip(path, outputs[path], derainer, args.steady, bar.update)
            except UserError as error:
                yield path, error

    failures = {}
    with logging_redirect_tqdm():
        for path, error in outcomes():
            if error and disk_failed(error):
                raise error
            if error:
                failures[path] = sentence(error)
    return failures


def measure(outputs, targets, protocol):
    """Measures rainy and derained pictures -> list of (path, scores before and after), dict of path: why it cannot be
    measured."""

    def scores(path):
        rainy, clean = Pair(path, targets[path]).read()
        derained, _ = Pair(outputs[path], targets[path]).read()
        return psnr_ssim(rainy, clean, protocol) + psnr_ssim(derained, clean, protocol)

    with ThreadPoolExecutor() as pool:
        futures = {path: pool.submit(scores, path) for path in outputs if path in targets}
    measured, failures = [], {path: f"{path} has no clean picture." for path in outputs if path not in targets}
    for path, future in futures.items():
        try:
            measured.append((path, future.result()))
        except UserError as error:
            failures[path] = sentence(error)
    return measured, failures


def report(rows, protocol, path):
    """Prints PSNR and SSIM of pictures and their means, and writes them as CSV."""
    width = max(12, *(len(row[0]) for row in rows))
    print(f"{'':{width}}  rainy PSNR   SSIM    derained PSNR   SSIM")
    for name, *values in [*rows, ("mean", *np.mean([row[1:] for row in rows], axis=0))]:
        print("{:{}}  {:10.2f} {:.4f}  {:14.2f} {:.4f}".format(name, width, *values))
    print(f"{counted(len(rows), 'picture')}; Y channel, protocol {protocol}")
    write_csv(path, COLUMNS, rows)


def stop(number, _):
    """Ends the process after Ctrl-C, or after SIGTERM, which torchrun also sends if another process was lost."""
    print("stopped: what was finished is kept. With --skip_existing the same command does the rest.", file=sys.stderr)
    sys.exit(128 + number)


def wait_for_others(world):
    """Returns when all processes have called this: torchrun ends the others as soon as one has failed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, _, _ = next(rendezvous("env://"))
        store.add("finished", 1)
        while store.add("finished", 0) < world:
            time.sleep(0.5)


@reports_errors
def main(argv=None):
    args, start = parse_args(argv), time.monotonic()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.target_dir and world > 1:
        raise UserError("several processes do not measure: omit --target_dir, and run python -m evaluations.evaluate.")
    plan = make_plan(args)
    device = choose_device(args.gpus)
    net = load_network(args.weights).to(device)
    mode = args.mode or ("window" if args.target_dir or plan.test_sets else "tile")
    notes = plan.notes + (cpu_warnings() if device.type == "cpu" else [])
    if args.ensemble and args.weights == OWN_WEIGHTS:
        notes.append(ENSEMBLE_NOTE)
    if rank == 0:
        weights = "our own weights" if args.weights == OWN_WEIGHTS else args.weights
        print(f"{network_name(net)} from {weights} on {device}, --mode {mode}", *notes, sep="\n")
    derainer = Derainer(net, mode, args.win_size, args.bf16, args.ensemble, args.compile)

    settings = results_settings(args.weights, derainer) | ({"steady": True} if args.steady else {})
    outputs = dict(list(plan.outputs.items())[rank::world])
    kept = [path for path in outputs if args.skip_existing and is_current(outputs[path], settings, plan.folder)]
    new = {path: output for path, output in outputs.items() if path not in kept}
    if new and (not plan.names_file or remembered_settings(plan.folder)):
        remember_settings(plan.folder, settings)
    failures = {**({} if rank else plan.failures), **derain_files(derainer, new, args, quiet=rank > 0)}
    done, seconds = [path for path in new if path not in failures], round(time.monotonic() - start)
    where = next(iter(outputs.values())) if len(outputs) == 1 else plan.folder
    kept_too = f", {described(kept)} kept" if kept else ""
    print(f"{described(done)} derained in {counted(seconds, 'second')}{kept_too} -> {where}")

    if args.target_dir:
        dataset = known_dataset(args.target_dir)
        protocol = args.protocol or (DATASETS[dataset].protocol if dataset else "rain200")
        results = {path: outputs[path] for path in [*kept, *done] if not is_clip(path)}
        measured, unmeasured = measure(results, plan.targets, protocol)
        failures |= unmeasured
        if measured:
            rows = [(str(outputs[path].relative_to(plan.folder)), *scores) for path, scores in measured]
            report(sorted(rows), protocol, plan.folder / "psnr_ssim.csv")
        if args.panel and measured:
            shown = [(path, outputs[path], plan.targets[path]) for path, _ in measured[:PANEL_ROWS]]
            pictures.write_png(args.panel, pictures.contact_sheet([list(map(read_image, row)) for row in shown]))
    wait_for_others(world)
    if failures:
        total = len({**outputs, **failures})
        raise UserError(f"{len(failures)} of {total} files failed:{listed(list(failures.values()), len(failures))}")


if __name__ == "__main__":
    main()
