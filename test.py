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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.distributed import rendezvous
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ablations import network_name
from evaluations.metrics import PROTOCOLS, psnr_ssim
from utils import pictures
from utils.checkpoint import OWN_WEIGHTS, load_network
from utils.derain import MODES, WINDOW, Derainer, derain_files, is_current, remember_settings, results_settings
from utils.devices import add_gpus, choose_device, print_warnings
from utils.files import UserError, counted, disk_failed, listed, reports_errors, write_csv
from utils.pairs import DATASETS, Pair, clean_folder, known_dataset, match_by_name, rainy_folder
from utils.pictures import find_pictures, read_image
from utils.video import count_frames, is_clip, result_path

BAR = "{l_bar}{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"
COLUMNS = ("picture", "psnr_rainy", "ssim_rainy", "psnr_derained", "ssim_derained")
PANEL_ROWS = 6


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_dir", nargs="+", required=True, help="rainy pictures: files, folders, 'patterns'; clips")
    add("--output_dir", type=Path, help="folder of results (default: results/<input's name>)")
    add("--keep_format", action="store_true", help="write JPEG, WebP, TIFF, … for such inputs, instead of PNG")
    add("--skip_existing", action="store_true", help="keep earlier results of the same weights, settings and folders")
    add("--quality", type=int, default=pictures.QUALITY, help="1 to 100, of JPEG, WebP and AVIF (default: %(default)s)")
    add("--weights", type=Path, default=OWN_WEIGHTS, help="a checkpoint of any network (default: our own weights)")
    add_gpus(parser)
    add("--mode", choices=MODES, help="default: window for test sets and with --target_dir, tile for other pictures")
    add("--win_size", type=int, default=WINDOW, help="side of windows and tiles (default: %(default)s)")
    add("--ensemble", action="store_true", help="mean of the results of the picture and its three mirror images")
    add("--bf16", action="store_true", help="bfloat16: nearly the same pictures, faster where the hardware has it")
    add("--compile", action="store_true", help="compile the network, which takes minutes: then faster on GPUs")
    add("--steady", action="store_true", help="clips: damp flicker where nothing moves")
    add("--target_dir", type=Path, help="clean pictures, or a test set's folder: measure PSNR and SSIM")
    add("--protocol", choices=PROTOCOLS, help="for PSNR and SSIM (default: the paper's for the test set, or rain200)")
    add("--panel", type=Path, help="with --target_dir: a PNG of rainy, derained and clean side by side")
    args = parser.parse_args(argv)
    if (args.panel or args.protocol) and not args.target_dir:
        parser.error("--panel and --protocol need clean pictures: give their folder with --target_dir")
    return args


def split_clips(sources, results):
    """-> the clips that are named or match a pattern, but do not lie in the folders `results`, and the sources of
    pictures. Clips within folders are skipped: phones store them beside photographs."""
    clips, others = [], []
    for source in sources:
        paths = [Path(source)]
        if not os.path.exists(source):
            found = sorted(map(Path, glob.glob(source, recursive=True)))
            paths = pictures.without_results(found, pictures.root_of(source), results)
        matching = [path for path in paths if is_clip(path) and path.is_file()]
        clips += matching
        if not matching or any(map(pictures.is_picture, paths)):
            others.append(source)
    return clips, others


def is_test_set(folder):
    return known_dataset(folder) is not None and "test" in os.path.abspath(folder).lower().split(os.sep)[-2:]


def default_output_dir(source, root):
    """-> results/<name of the data set or folder>, results/Rain200L for Datasets/Rain200L/test/input; results/ for a
    single file."""
    names = [part for part in Path(os.path.abspath(root)).parts[1:] if part not in ("test", "train", "input")]
    return Path("results") if os.path.isfile(source) else Path("results", *names[-1:])


def find_targets(found, target_dir):
    """-> dict of rainy picture: clean picture, and all clean pictures. Raises UserError if none belong together."""
    clean, clean_root = find_pictures(clean_folder(target_dir))
    names = Counter(path.with_suffix("") for path in clean)
    if doubled := [path for path in clean if names[path.with_suffix("")] > 1]:
        raise UserError(f"clean pictures have the same name: keep one of each.{listed(doubled)}")
    matches = [match_by_name(paths, clean, root, clean_root)[0] for paths, root in found]
    targets = {pair.input: pair.target for pairs in matches for pair in pairs}
    if not targets:
        raise UserError(f"no picture has a clean one of the same name in {target_dir}: choose another --target_dir.")
    return targets, clean


class Plan(NamedTuple):
    input_folders: set  # that pictures and clips lie in or below
    folder: Path  # of results
    outputs: dict  # path of a picture or clip: path of its result
    targets: dict  # path of a picture: path of the clean one
    failures: list  # sentences on results that would overwrite an input, a clean picture or another result
    notes: list  # sentences on what is left out
    test_sets: bool  # whether all pictures are of data sets' test folders


def make_plan(args):
    """-> Plan. Raises UserError if there is nothing to derain, or the output folder or panel cannot be used."""
    results = [args.output_dir or "results"]
    clips, sources = split_clips(args.input_dir, results)
    sources = list(map(rainy_folder, sources))
    found = [find_pictures(source, results) for source in sources]
    folder = args.output_dir or default_output_dir([*sources, *clips][0], found[0][1] if found else "")
    if folder.is_file() or folder.suffix.lower() in pictures.ENDINGS | pictures.CLIP_ENDINGS:
        raise UserError(f"--output_dir {folder} names a file: give a folder.")
    input_folders = set(map(realpath, [*(root for _, root in found), *(clip.parent for clip in clips)]))
    if realpath(folder) in input_folders:
        raise UserError(f"{folder} holds the inputs: choose another --output_dir.")

    wanted = {clip: result_path(clip, folder) for clip in clips}
    for path, root in [(path, root) for paths, root in found for path in paths]:
        keeps = args.keep_format and path.suffix.lower() in pictures.KEEPABLE
        wanted[path] = (folder / path.relative_to(root)).with_suffix(path.suffix if keeps else ".png")
    targets, clean = find_targets(found, args.target_dir) if args.target_dir else ({}, [])
    outputs, failures, sources_of, protected = {}, [], {}, set(map(realpath, [*wanted, *clean]))
    for path, output in wanted.items():
        first = sources_of.setdefault(realpath(output), path)
        if realpath(output) in protected:
            failures.append(f"{path}: its result would overwrite {output}, choose another --output_dir.")
        elif first != path:
            failures.append(f"{path} and {first} would both become {output}: rename one of them.")
        else:
            outputs[path] = output

    if args.panel and realpath(args.panel) in {*protected, *map(realpath, outputs.values())}:
        raise UserError(f"--panel would overwrite {args.panel}: choose another name.")
    notes = [note for note in (pictures.skipped(source, results) for source in sources) if note]
    test_sets = bool(found) and all(is_test_set(root) for _, root in found)
    return Plan(input_folders, folder, outputs, targets, failures, notes, test_sets)


def measure(outputs, targets, protocol):
    """-> list of (path, PSNR and SSIM of the rainy picture, of the derained one), sentences on what has none."""

    def scores(path):
        if path not in targets:
            return f"{path} has no clean picture."
        try:
            rainy, clean = Pair(path, targets[path]).read()
            derained, _ = Pair(outputs[path], targets[path]).read()
        except UserError as error:
            return str(error)
        return path, *psnr_ssim(rainy, clean, protocol), *psnr_ssim(derained, clean, protocol)

    with ThreadPoolExecutor() as pool:  # decoding and filtering release the interpreter's lock
        rows = list(pool.map(scores, outputs))
    return [row for row in rows if not isinstance(row, str)], [row for row in rows if isinstance(row, str)]


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
    derainer = Derainer(net, mode, args.win_size, args.bf16, args.ensemble, args.compile)
    if rank == 0:
        weights = "our own weights" if args.weights == OWN_WEIGHTS else args.weights
        print(f"{network_name(net)} from {weights} on {device}, --mode {mode}", *plan.notes, sep="\n")
        print_warnings(device, args.gpus, args.bf16)

    settings = results_settings(args.weights, derainer, plan.input_folders)
    if args.steady:
        settings["steady"] = True
    outputs = dict(list(plan.outputs.items())[rank::world])
    kept, new = {}, outputs
    if args.skip_existing:
        kept = {path: output for path, output in outputs.items() if is_current(output, path, settings, plan.folder)}
        new = {path: output for path, output in outputs.items() if path not in kept}
    done, failures = [], [] if rank else list(plan.failures)
    total = len(outputs) + len(failures)
    if new:
        remember_settings(plan.folder, settings)
    bar = tqdm(total=sum(map(count_frames, new)), bar_format=BAR, disable=rank > 0 or not new or None)

    def progress(share):
        bar.update(min(share, bar.total - bar.n))  # sums of shares round

    with bar, logging_redirect_tqdm():
        for path, error in derain_files(derainer, new, args.quality, args.steady, progress):
            if not error:
                done.append(path)
            elif disk_failed(error):
                raise error
            else:
                failures.append(str(error))
    if done or kept:
        where = next(iter(outputs.values())) if len(outputs) == 1 else plan.folder
        kept_too = f", {len(kept):,} kept" if kept else ""
        print(f"{counted(len(done), 'file')} derained in {time.monotonic() - start:.0f} s{kept_too} -> {where}")

    if args.target_dir:
        dataset = known_dataset(args.target_dir)
        protocol = args.protocol or (DATASETS[dataset].protocol if dataset else "rain200")
        results = {path: outputs[path] for path in [*kept, *done] if not is_clip(path)}
        rows, unmeasured = measure(results, plan.targets, protocol)
        failures += unmeasured
        if rows:
            named = [(str(outputs[path].relative_to(plan.folder)), *scores) for path, *scores in rows]
            report(sorted(named), protocol, plan.folder / "psnr_ssim.csv")
        if args.panel and rows:
            shown = [(path, outputs[path], plan.targets[path]) for path, *_ in rows[:PANEL_ROWS]]
            pictures.write_png(args.panel, pictures.contact_sheet([list(map(read_image, row)) for row in shown]))
    wait_for_others(world)
    if failures:
        raise UserError(f"{len(failures)} of {total} files failed:{listed(failures, len(failures))}")


if __name__ == "__main__":
    main()
