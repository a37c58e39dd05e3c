"""Derains pictures: a file, a folder, a folder tree or a pattern; and clips: a file or a pattern.

python test.py --input_dir photo.jpg
python test.py --input_dir Datasets/Rain200L/test/input --weights model_best.pth
torchrun --standalone --nproc_per_node 4 test.py --input_dir album/ --skip_existing
"""

import argparse
import signal
import sys
from datetime import timedelta
from itertools import chain
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dataset_RGB import match_by_name
from evaluations.metrics import psnr_ssim
from model import MULTIPLE
from utils.checkpoint import OWN_WEIGHTS, load_network, network_name
from utils.devices import (
    add_gpus,
    end_processes,
    from_all_processes,
    from_first_process,
    reports_lost_processes,
    start_processes,
)
from utils.errors import UserError, counted, listed, reports_errors, sentence
from utils.files import disk_failed, write_csv
from utils.formats import KEEPABLE, QUALITY, in_png, write_picture
from utils.huge import derain_huge, is_huge
from utils.images import contact_sheet, eight_bits, find_pictures, read_image, write_png
from utils.inference import MODES, WINDOW, Derainer
from utils.video import derain_clips, result_path, split_clips

PROTOCOL = "rain200"
PANEL_ROWS = 6
COLUMNS = ("picture", "psnr_rainy", "ssim_rainy", "psnr_derained", "ssim_derained")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input_dir", nargs="+", required=True, help="rainy pictures: files, folders, 'patterns'; clips"
    )
    parser.add_argument("--output_dir", type=Path, help="where results go (default: results/<name of the input>)")
    parser.add_argument(
        "--keep_format", action="store_true", help="write JPEG, WebP, TIFF, … where the input is such, instead of PNG"
    )
    parser.add_argument(
        "--skip_existing", action="store_true", help="keep results that are there: finish an earlier run"
    )
    parser.add_argument("--quality", type=int, default=QUALITY, help="of JPEG, WebP and AVIF (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=OWN_WEIGHTS,
        help="a checkpoint; which network it holds is read from it (default: this repository's own weights)",
    )
    add_gpus(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="windows as published, overlapping tiles blended without seams, or each picture whole (default: window up "
        "to a megapixel, tile above)",
    )
    parser.add_argument("--win_size", type=int, default=WINDOW, help="side of windows and tiles (default: %(default)s)")
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="mean of the eight turned and mirrored pictures; not for this repository's own weights",
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16: faster, and nearly the same pictures")
    parser.add_argument("--fused", action="store_true", help="fused kernels and CUDA graphs, on NVIDIA GPUs")
    parser.add_argument("--steady", action="store_true", help="clips: damps flicker where nothing moves")
    parser.add_argument(
        "--target_dir", help="clean pictures: prints PSNR and SSIM before and after, and writes them as CSV"
    )
    parser.add_argument("--panel", type=Path, help="with --target_dir: a PNG of rainy, derained and clean side by side")
    args = parser.parse_args(argv)
    if args.panel and not args.target_dir:
        parser.error("--panel shows clean pictures: give their folder with --target_dir")
    if args.win_size < MULTIPLE or args.win_size % MULTIPLE:
        parser.error(f"--win_size must be a multiple of {MULTIPLE}")
    if not 1 <= args.quality <= 100:
        parser.error("--quality must lie between 1 and 100")
    return args


def default_output_dir(source):
    """results/<name of the data set or folder>: Datasets/Rain200L/test/input goes to results/Rain200L; a single picture
    goes to results/."""
    if Path(source).is_file():
        return Path("results")
    parts = find_pictures(source)[1].resolve().parts[1:]
    return Path("results", *[part for part in parts if part not in ("test", "train", "input")][-1:])


def find_inputs(source, output_dir):
    """find_pictures without the results of an earlier run. Raises UserError where output and input folder are one."""
    if Path(source).is_dir() and realpath(source) == realpath(output_dir):
        raise UserError(
            f"{output_dir} is the input folder, where results would be taken for inputs: choose another --output_dir."
        )
    return find_pictures(source, [output_dir])


def results_of(found, output_dir, keep_format):
    """For pictures found as (paths, root), yields (input path, result path): PNG, or what the input is."""
    for paths, root in found:
        for path in paths:
            keeps = keep_format and path.suffix.lower() in KEEPABLE
            yield path, (output_dir / path.relative_to(root)).with_suffix(path.suffix if keeps else ".png")


def forms(output):
    """-> what a result may become: the file of its name, and the PNG beside it where its format cannot hold it."""
    return (output,) if output.suffix.lower() == ".png" else (output, in_png(output))


def without_clashes(wanted, kept):
    """What to derain of (input path, result path): no result may overwrite another or one of the files `kept` -> dicts
    of input path -> result path, and of input path -> why it cannot be done."""
    outputs, inputs, problems = {}, {}, {}  # inputs: what a result may become -> input path
    kept = set(map(realpath, kept))
    for path, output in wanted:
        for name in forms(output):
            if realpath(name) in kept:
                problems[path] = f"{path}: its result would overwrite {name}, choose another --output_dir."
            elif inputs.get(name, path) != path:
                problems[path] = f"{path} and {inputs[name]} could both become {name}: rename one of them."
        if path not in problems:
            outputs[path] = output
            inputs |= dict.fromkeys(forms(output), path)
    return outputs, problems


def results_there(outputs):
    """Of a dict of input path -> result path, those that an earlier run has written, by the names that they got."""
    there = {path: list(filter(Path.is_file, forms(output))) for path, output in outputs.items()}
    return {path: files[0] for path, files in there.items() if files}


def find_targets(found, targets, target_root):
    """-> dict of input path -> clean picture's path, and a list of what has no clean picture."""
    inputs = [path for paths, _ in found for path in paths]
    if len(inputs) == len(targets) == 1:
        return dict(zip(inputs, targets)), []  # two pictures belong together whatever their names
    results = [match_by_name(paths, targets, root, target_root) for paths, root in found]
    return {p.input: p.target for pairs, _ in results for p in pairs}, [line for _, lines in results for line in lines]


def write_table(rows, path):
    """Prints each picture's PSNR and SSIM and their means, and writes the pictures' as CSV."""
    name_width = max(12, *(len(row[0]) for row in rows))
    print(f"{'':{name_width}}  rainy PSNR   SSIM    derained PSNR   SSIM")
    for name, *values in [*rows, ("mean", *np.mean([row[1:] for row in rows], axis=0))]:
        print("{:{}}  {:10.2f} {:.4f}  {:14.2f} {:.4f}".format(name, name_width, *values))
    print(f"{counted(len(rows), 'picture')}; Y channel, protocol {PROTOCOL}")
    write_csv(path, COLUMNS, rows)


def compare(path, rainy, derained, target):
    """-> PSNR and SSIM before and after, and the three pictures."""
    clean = read_image(target)
    if not clean.shape == rainy.shape == derained.shape:
        raise UserError(f"{path} and {target} are not of one size: it was not measured.")
    return psnr_ssim(rainy, clean, PROTOCOL) + psnr_ssim(derained, clean, PROTOCOL), (rainy, derained, clean)


def derain_all(derainer, outputs, targets, quality):
    """Derains the files of a dict of input path -> result path -> (path, for one with a target the path that was
    written and what `compare` returned, or the UserError that stopped it)."""

    def finish(path, picture, result):
        written = write_picture(outputs[path], result, quality)
        if path in targets:
            return written, *compare(path, eight_bits(picture.pixels), eight_bits(result.pixels), targets[path])
        return None

    huge = list(filter(is_huge, outputs))
    yield from derainer.files([path for path in outputs if path not in huge], finish)
    for path in huge:
        try:
            derain_huge(derainer, path, outputs[path], quality)
            if path in targets:
                raise UserError(f"{path} was derained, but is too large to be measured.")
            yield path, None
        except UserError as error:
            yield path, error


def measure_done(outputs, targets):
    """The same for results of an earlier run."""
    for path, output in outputs.items():
        try:
            measured = compare(path, read_image(path), read_image(output), targets[path]) if path in targets else None
            yield path, measured and (output, *measured)
        except UserError as error:
            yield path, error


def share(outputs, rank, world):
    """-> the part of a dict of input path -> result path that one of several processes does: the next largest file goes
    to the one with the least to do."""
    sizes = {path: path.stat().st_size if path.exists() else 0 for path in outputs}
    loads, mine = [0] * world, set()
    for path in sorted(outputs, key=lambda path: (-sizes[path], path)):
        least = loads.index(min(loads))
        loads[least] += sizes[path]
        if least == rank:
            mine.add(path)
    return {path: output for path, output in outputs.items() if path in mine}


def stop(number, _):
    """Ends the process after SIGTERM, which torchrun also sends where another process was lost."""
    print("stopped: what was finished is kept. With --skip_existing the same command does the rest.", file=sys.stderr)
    sys.exit(128 + number)


class Plan(NamedTuple):
    """What there is to do, by input path."""

    new: dict  # pictures to derain -> result path
    done: dict  # pictures that an earlier run derained -> result path
    clips: dict  # clips to derain -> result path
    there: int  # how many pictures and clips an earlier run derained
    targets: dict  # pictures -> clean picture's path
    problems: dict  # what cannot be done -> why
    unpaired: list  # sentences on pictures without a clean one


def make_plan(args, sources, clips, output_dir):
    """Raises UserError where nothing of it could be done as it was meant."""
    if output_dir.is_file():
        raise UserError(f"{output_dir} is a file: choose another --output_dir.")
    found = [find_inputs(source, output_dir) for source in sources]
    clean_paths, clean_root = find_pictures(args.target_dir) if args.target_dir else ([], None)
    kept = [*clips, *clean_paths, *(path for paths, _ in found for path in paths)]
    outputs, problems = without_clashes(results_of(found, output_dir, args.keep_format), kept)
    clip_outputs, clip_problems = without_clashes([(clip, result_path(clip, output_dir)) for clip in clips], kept)
    if args.panel and realpath(args.panel) in map(realpath, [*kept, *outputs.values(), *clip_outputs.values()]):
        raise UserError(f"--panel would overwrite {args.panel}: choose another name.")
    targets, unpaired = find_targets(found, clean_paths, clean_root) if args.target_dir else ({}, [])
    if unpaired and not targets:
        raise UserError(f"none of the pictures has a clean one in {args.target_dir}:{listed(unpaired, 3)}")
    there = (results_there(outputs), results_there(clip_outputs)) if args.skip_existing else ({}, {})
    done, clips_done = from_first_process(there)  # others may start later, when there are more
    new = {path: output for path, output in outputs.items() if path not in done}
    clip_outputs = {clip: output for clip, output in clip_outputs.items() if clip not in clips_done}
    return Plan(new, done, clip_outputs, len(done) + len(clips_done), targets, problems | clip_problems, unpaired)


@reports_errors
def main(argv=None):
    signal.signal(signal.SIGTERM, stop)
    args = parse_args(argv)
    device, rank, world = start_processes(args.gpus, patience=timedelta(days=30))
    net = load_network(args.weights).to(device)
    clips, sources = split_clips(args.input_dir)
    output_dir = args.output_dir or default_output_dir([*sources, *clips][0])
    plan = make_plan(args, sources, clips, output_dir)
    if rank == 0:
        pictures, there = len(plan.new) + len(plan.done), f" ({plan.there} of them there already)" if plan.there else ""
        kinds = {"picture": pictures, "clip": len(clips)}
        what = " and ".join(counted(number, kind) for kind, number in kinds.items() if number) or "nothing"
        source = "this repository's own weights" if args.weights == OWN_WEIGHTS else args.weights
        print(f"{network_name(net)} from {source} on {device}: {what}{there} -> {output_dir}")
        if args.ensemble and args.weights == OWN_WEIGHTS:
            print("These weights know rain that falls: --ensemble, which also turns pictures on their side, does harm.")
        if clips and args.target_dir:
            print("Clips are derained, but not measured.")

    settings = (args.mode, args.win_size, args.bf16, args.ensemble, args.fused)
    derainer = Derainer(net, *settings)
    new, done = share(plan.new, rank, world), share(plan.done, rank, world)
    results = chain(measure_done(done, plan.targets), derain_all(derainer, new, plan.targets, args.quality))
    rows, panel, mine = [], [], {}  # mine: this process's problems
    with logging_redirect_tqdm():
        count = len(new) + len(done)
        for path, result in tqdm(results, total=count, unit="picture", disable=None if rank == 0 and count else True):
            if isinstance(result, UserError):
                if disk_failed(result):
                    raise result
                mine[path] = sentence(result)
            elif result:
                written, scores, pictures = result
                rows.append((str(written.relative_to(output_dir)), *scores))
                if args.panel and len(panel) < PANEL_ROWS:
                    panel.append(pictures)
        mine |= derain_clips(share(plan.clips, rank, world), derainer, args.weights, settings, args.steady)
    with reports_lost_processes():
        rows, mine = zip(*from_all_processes((rows, mine)))
    end_processes()
    if rank > 0:
        return
    rows = sorted(chain(*rows))
    problems = plan.problems
    for others in mine:
        problems |= others
    if rows:
        write_table(rows, output_dir / "psnr_ssim.csv")
    if panel:
        write_png(args.panel, contact_sheet(panel))
    if problems or plan.unpaired:
        lines = [*problems.values(), *plan.unpaired]
        sys.exit(f"error: all is done but for {counted(len(lines), 'file')}:{listed(lines, len(lines))}")


if __name__ == "__main__":
    main()
