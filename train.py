"""Trains NeRD-Rain by the published recipe.

    python train.py --dataset Rain200L
    torchrun --standalone --nproc_per_node 4 train.py --dataset Rain200L --batch_size 4

The same command continues an interrupted run. Everything of a run lies in <model_save_dir>/<mode>/models/<session>/:
model_latest.pth and the one before it, model_previous.pth; model_best.pth; log.jsonl (a line per epoch); runs.jsonl
(what was started); TensorBoard files.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from warmup_scheduler import GradualWarmupScheduler

import model
from dataset_RGB import (
    DATASETS,
    EpochSampler,
    Photo,
    TrainingPatches,
    ValidationPatches,
    find_pairs,
    hold_out,
    how_to_get,
    quiet_worker,
)
from evaluations.metrics import psnr
from losses import DerainLoss
from utils.checkpoint import build_network, load_network, load_newest, network_name, save_checkpoint
from utils.devices import (
    end_processes,
    equal_over_processes,
    largest_over_processes,
    reports_lost_processes,
    start_processes,
    sum_over_processes,
    usable_cores,
)
from utils.errors import UserError, counted, reports_errors
from utils.files import lock
from utils.images import find_pictures
from utils.run_log import RunLog, describe, whole_lines

WARMUP_EPOCHS = 3
MIN_LR = 1e-6
LOG_STEPS = 100  # steps between two TensorBoard points of the losses
HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
SAVE_STEPS = 1000  # optimizer steps between two checkpoints within an epoch, which can take days (SPA-Data)
OPTIONS = ("dim", "num_blocks", "passes", "inr", "feedback", "own_reduce", "antialias")  # of the network
TRAIN_DIR = "Datasets/Rain200L/train"
DATA = ("train_dir", "clean_dir", "clean_half", "hold_out")  # arguments that choose it, which a run keeps to
VALIDATION = ("val_dir", "patch_size")  # those that decide what it is validated on
ABLATIONS = {  # of the paper (its tables 4 to 6), and what lies beyond it -> arguments
    "published": {},
    **{f"passes_{'_'.join(map(str, passes))}": {"passes": passes} for passes in ((3, 2, 1), (2, 2, 2), (0, 2, 3))},
    **{f"inr_{kind}": {"inr": kind} for kind in model.INRS if kind != "published"},
    **{f"feedback_{kind}": {"feedback": kind} for kind in model.FEEDBACKS if kind != "bfpu"},
    "mprnet": {"model": "nerd_rain_mprnet"},
    **{name: {name: True} for name in ("own_reduce", "antialias", "no_zero_epoch")},
    "loss_guard": {"loss_guard": 2.0},
}
GUARD_MEMORY = 0.99  # of the running mean of the losses
PANELS = 4  # validation pictures shown in TensorBoard
warnings.filterwarnings("ignore", "To get the last learning rate")  # how warmup-scheduler asks for it


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, default=None, help="", **options):
        if default:
            help += " (default: %(default)s)"
            options["type"] = type(default)
        parser.add_argument(f"--{name}", default=default, help=help, **options)

    presets = [name for name, recipe in DATASETS.items() if recipe.num_epochs]
    add("dataset", choices=presets, help="preset of folders, session, network and recipe for one data set")
    add("train_dir", help=f"folder of input/ and target/, or see --clean_half (default: {TRAIN_DIR}, if no clean_dir)")
    add("val_dir", "Datasets/Rain200L/test", "the same for validation, which chooses model_best.pth")
    add("clean_dir", metavar="DIR", help="photographs to train on with synthetic rain, beside the pairs of train_dir")
    add("clean_repeats", 1, "how often each of them comes in an epoch, with another rain each time", metavar="N")
    add("hold_out", type=float, metavar="FRACTION", help="validate on this part of the training scenes, not on val_dir")
    add("clean_half", choices=("left", "right"), help="pictures hold rainy and clean side by side; this half is clean")
    add("model", choices=model.NETWORK_NAMES, help="default: that of the weights it starts from, or nerd_rain")
    names = ", ".join(ABLATIONS)
    add("ablation", choices=ABLATIONS, help=f"preset of session and of the options after it: {names}", metavar="NAME")
    add("dim", type=int, metavar="N", help="width of the network (default: 48; NeRD-Rain-S 32)")
    add("num_blocks", nargs=3, type=int, metavar="N", help="its blocks at level 1, 2 and the latent (default: 2 3 3)")
    add("passes", nargs=3, type=int, metavar="N", help="over the images at 1/4, 1/2 and full size (default: 1 2 3)")
    add("inr", choices=model.INRS, help="implicit neural representation (default: published)")
    add("feedback", choices=model.FEEDBACKS, help="from finer to coarser scales (default: bfpu)")
    add("own_reduce", False, "pass 3 has a layer of its own that is pass 2's as published", action="store_true")
    add("antialias", False, "reduces the input by means instead of leaving pixels out", action="store_true")
    add("no_zero_epoch", False, "leaves away the warm-up's first epoch, which has rate 0", action="store_true")
    add("loss_guard", type=float, metavar="N", help="weaken batches whose loss is above N times its running mean")
    add("pretrain_weights", help="checkpoint whose weights, averaged ones if it has them, training starts from")
    add("model_save_dir", "checkpoints", "where checkpoints go")
    add("mode", "Deraininig", "part of the checkpoints' path, spelt as in the published code")
    add("session", "Multiscale", "name of this run, part of the checkpoints' path")
    add("num_epochs", 3000, "epochs of the whole run")
    add("batch_size", 1, "pictures per batch, over all processes together")
    add("patch_size", 256, "side of the square training patches, a multiple of 16")
    add("val_epochs", 1, "epochs between two validations")
    add("lr", 1e-4, "learning rate after the warm-up")
    add("seed", 1234, "of the initial weights, the order and the augmentation")
    add("num_workers", min(4, usable_cores()), "data-loading processes, each for training and for validation")
    add("bf16", False, "bfloat16 autocast", action="store_true")
    add("compile", False, "torch.compile", action="store_true")
    add("save_memory", False, "compute activations again instead of keeping them: slower", action="store_true")
    add("accumulate", 1, "batches per optimizer step", metavar="N")
    add("clip_grad", type=float, metavar="NORM", help="largest norm of the gradient")
    add("ema", type=float, metavar="DECAY", help="also average the weights, e.g. 0.999; validated and tested instead")
    known = parser.parse_known_args(argv)[0]
    preset = known.dataset
    if preset:
        recipe, folder = DATASETS[preset], Path("Datasets", preset)
        parser.set_defaults(train_dir=str(folder / "train"), val_dir=str(folder / "test"), session=preset)
        for name in ("num_epochs", "patch_size", "batch_size", "lr", "clip_grad", "ema"):
            parser.set_defaults(**{name: getattr(recipe, name)})
    if known.ablation:
        parser.set_defaults(session=f"ablation/{known.ablation}/{known.seed}", **ABLATIONS[known.ablation])
    args = parser.parse_args(argv)
    if not args.train_dir and not args.clean_dir:
        args.train_dir = TRAIN_DIR
    for name in ("num_epochs", "batch_size", "patch_size", "val_epochs", "accumulate", "clean_repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.patch_size % model.MULTIPLE:
        parser.error(f"--patch_size must be a multiple of {model.MULTIPLE}")
    for name in ("hold_out", "ema"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} must lie between 0 and 1")
    for name in ("lr", "clip_grad", "loss_guard"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be above 0")
    if args.dim is not None and (args.dim < 2 or args.dim % 2):
        parser.error("--dim must be a multiple of 2")
    if args.num_blocks and min(args.num_blocks) < 1:
        parser.error("--num_blocks must be at least 1 each")
    if args.passes and (args.passes[0] < 0 or min(args.passes[1:]) < 1):
        parser.error("--passes must be at least 1 each, but for the first, which may be 0")
    for name in ("seed", "num_workers"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be at least 0")
    return args


def find_data(args):
    """-> what to train on, pairs and photographs; validation pairs."""
    preset = args.dataset and Path("Datasets", args.dataset, "train")
    if preset and Path(args.train_dir) == preset and not preset.is_dir():
        raise UserError(
            f"{args.train_dir} does not exist: {how_to_get(args.dataset)} To try training without a download: "
            "bash train.sh demo"
        )
    pairs = find_pairs(args.train_dir, args.clean_half) if args.train_dir else []
    photos = [Photo(path) for path in find_pictures(args.clean_dir)[0]] if args.clean_dir else []
    if args.hold_out:
        pairs, validation = hold_out(pairs, args.hold_out, args.seed)
    else:
        validation = find_pairs(args.val_dir, args.clean_half)
    return pairs + args.clean_repeats * photos, validation


def changed_arguments(arguments, record):
    """-> dict of arguments that differ from those of the last start in runs.jsonl -> what they were. Raises UserError
    if that is the data."""
    last = whole_lines(record)[-1:]
    before = last[0].get("arguments", {}) if last else {}
    changed = {name: before[name] for name, value in arguments.items() if name in before and before[name] != value}
    for name in (*DATA, "seed") if arguments.get("hold_out") else DATA:  # the seed chooses what is held out
        if name in changed and not same_path(arguments[name], changed[name]):
            raise UserError(
                f"{record.parent} was trained with --{name} {changed[name]}, not {arguments[name]}: choose another "
                f"--session. If that is the same data in another place, remove {record}."
            )
    return changed


def same_path(first, second):
    return isinstance(first, str) and isinstance(second, str) and os.path.abspath(first) == os.path.abspath(second)


def make_network(args, path, checkpoint):
    """The network with the weights it starts from: those of an interrupted run, given ones, or random ones."""
    source = path if checkpoint else args.pretrain_weights
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name)}
    build = getattr(model, args.model or (DATASETS[args.dataset].model if args.dataset else "nerd_rain"))
    if not source:
        return build(**options)
    net = build_network({**checkpoint, "ema": None}, source) if checkpoint else load_network(source)
    with torch.device("meta"):
        wanted = build(**options) if args.model else model.MultiscaleNet(**{**net.options, **options})
    if net.options != wanted.options:
        raise UserError(
            f"{source} holds {network_name(net)}, but {network_name(wanted)} was asked for: change that or --session."
        )
    return net


def make_schedule(optimizer, num_epochs, epochs_done, no_zero_epoch=False):
    """Linear warm-up, then a cosine down to MIN_LR, stepped once after each epoch. As published, the first epoch runs
    at rate 0, and the cosine is divided by its second value: the rate is --lr in epochs 4 and 6, above it in epoch 5.
    `no_zero_epoch` leaves the epoch at rate 0 away.

    The published code gets this from CosineAnnealingLR, whose rates differ between PyTorch releases.
    """
    half_period, low = max(2, num_epochs + no_zero_epoch - WARMUP_EPOCHS), MIN_LR / optimizer.defaults["lr"]

    def cosine(epoch):
        return low + (1 - low) * (1 + math.cos(math.pi * epoch / half_period)) / (1 + math.cos(math.pi / half_period))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps without an optimizer step in between: those were taken before
        after = LambdaLR(optimizer, cosine)
        schedule = GradualWarmupScheduler(optimizer, multiplier=1, total_epoch=WARMUP_EPOCHS, after_scheduler=after)
        for _ in range(epochs_done + no_zero_epoch):
            schedule.step()
    return schedule


class Interruption:
    """Ctrl-C, SIGTERM and a terminal that is closed ask the run to save and end; one more, seconds later, ends it at
    once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, HANGUP):
            if number and (number != HANGUP or signal.getsignal(number) != signal.SIG_IGN):  # as nohup wants it
                signal.signal(number, self.ask)

    def ask(self, number, _):
        if number == HANGUP:  # there is nothing left to print to: errors would keep it from saving
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
            print("stopping after this step …", file=sys.stderr)
        elif time.monotonic() - self.time > 2:  # torchrun may pass one signal on twice
            raise KeyboardInterrupt


class Trainer:
    """A training run: its network, its optimizer, its data and how far it has come."""

    def __init__(self, args):
        self.args = args
        self.device, self.rank, self.world = start_processes()
        if args.batch_size < self.world:
            raise UserError(
                f"--batch_size {args.batch_size} is too small for {self.world} processes: choose {self.world} or more."
            )
        self.folder = Path(args.model_save_dir, args.mode, "models", args.session)
        self.latest, self.previous, self.best = (
            self.folder / f"model_{which}.pth" for which in ("latest", "previous", "best")
        )
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True  # on a GPU: all patches have one size, whose fastest kernels it finds out

        train_pairs, val_pairs = find_data(args)
        self.train_set = TrainingPatches(train_pairs, args.patch_size, args.seed)
        self.val_set = ValidationPatches(val_pairs, args.patch_size)
        self.sampler = EpochSampler(len(self.train_set), args.batch_size, args.seed, self.rank, self.world)
        self.steps_per_epoch = len(self.sampler)
        self.train_loader = self.make_loader(self.train_set, batch_sampler=self.sampler)
        self.val_loader = self.make_loader(Subset(self.val_set, range(self.rank, len(self.val_set), self.world)))

        # A run that is just ending saves once more: what there is, is read under the lock.
        self.lock = self.lock_folder() if self.rank == 0 and self.folder.exists() else None
        source, checkpoint, problems = load_newest(self.latest, self.previous)
        self.net = make_network(args, source, checkpoint).to(self.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
        self.loss = DerainLoss().to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=args.lr, fused=True)
        self.epoch, self.step = 0, 0  # epochs done, and batches done of the next one
        self.sums = torch.zeros(len(self.loss.terms), dtype=torch.float64, device=self.device)  # of their losses
        self.usual_loss = None  # running mean, for --loss_guard
        self.best_psnr, self.best_epoch = -math.inf, 0
        self.schedule = make_schedule(self.optimizer, args.num_epochs, checkpoint.get("epoch", 0), args.no_zero_epoch)
        if checkpoint:
            self.restore(checkpoint, source)
        if not equal_over_processes(self.steps_done(), self.device):
            raise UserError(f"the processes found different checkpoints: all machines must share {self.folder}.")

        if args.save_memory:
            model.checkpoint_activations(self.net)
        parallel = DistributedDataParallel(self.net) if self.world > 1 else self.net
        self.without_sync = parallel.no_sync if self.world > 1 else contextlib.nullcontext
        self.forward = torch.compile(parallel) if args.compile else parallel
        self.log = self.take_folder(source, problems) if self.rank == 0 else None
        self.interruption = Interruption()  # before this there is nothing to save

    def make_loader(self, dataset, **options):
        workers = self.args.num_workers
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # or each start would move on the random state, which a resume restores
            **options,
        )

    def lock_folder(self):
        """Keeps other runs out of the folder as long as the file lives that this returns."""
        file = lock(self.folder / "lock")
        if not file:
            raise UserError(f"another run trains in {self.folder}: stop it, or choose another --session.")
        return file

    def take_folder(self, source, problems):
        """Keeps other runs out of the folder, makes the checkpoint that could be read its latest, and says what begins
        -> RunLog."""
        self.lock = self.lock or self.lock_folder()
        if source == self.previous:
            reasons = problems or [f"{self.latest} is not there."]
            print("warning:", *reasons, f"Going on from {self.previous}.")
            if self.latest.exists():  # perhaps it could not be read today only: it is kept
                os.replace(self.latest, self.folder / "model_damaged.pth")
            os.replace(self.previous, self.latest)  # before a broken file takes its place
        description = describe(vars(self.args), self.device, self.world)
        print(
            f"{network_name(self.net)} on {description['device']}, "
            f"{self.world} process{'es' * (self.world > 1)}: {len(self.train_set)} training and "
            f"{len(self.val_set)} validation pairs, {counted(self.args.num_epochs, 'epoch')} -> {self.folder}"
        )
        if source:
            print(f"continues after epoch {self.epoch} and {self.step} of {self.steps_per_epoch} steps")
            arguments = vars(self.args)
            if changes := changed_arguments(arguments, self.folder / "runs.jsonl"):
                described = (f"--{name} {arguments[name]} (was {value})" for name, value in changes.items())
                print(f"changed since the last start: {', '.join(described)}")
            if changes.keys() & VALIDATION:
                print(f"its PSNR is another one now: {self.best} is chosen anew, from epoch {self.epoch + 1} on")
                self.best_psnr, self.best_epoch = -math.inf, 0
        return RunLog(self.folder, description, self.epoch, self.steps_done())

    def steps_done(self):
        return self.epoch * self.steps_per_epoch + self.step

    def restore(self, checkpoint, source):
        """Takes up everything that a checkpoint holds; a published one lacks what is read with a default."""
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            raise UserError(f"{source} holds weights only: move it away and name it with --pretrain_weights.")
        self.epoch, self.step = checkpoint["epoch"], checkpoint.get("pictures", 0) // self.args.batch_size
        self.best_psnr, self.best_epoch = checkpoint.get("best_psnr", -math.inf), checkpoint.get("best_epoch", 0)
        self.usual_loss = checkpoint.get("usual_loss")
        if self.step:
            self.sums = checkpoint["sums"].to(self.device) / self.world
        rates = [group["lr"] for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{source} holds no optimizer state of this network ({error}): move it away.") from error
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate  # the schedule's, in case --num_epochs or --lr was changed
        if self.ema:
            self.ema.module.load_state_dict(checkpoint.get("ema", checkpoint["state_dict"]))
            self.ema.n_averaged.fill_(1)
        if "random_state" in checkpoint:
            torch.set_rng_state(checkpoint["random_state"])

    def save(self, *paths):
        self.stop_if_diverged(all(parameter.isfinite().all() for parameter in self.net.parameters()))
        sums = sum_over_processes(self.sums)
        for path in paths if self.rank == 0 else ():
            save_checkpoint(
                path,
                previous=self.previous if path == self.latest else None,
                epoch=self.epoch,
                pictures=self.step * self.args.batch_size,  # used of the next epoch; its last batch counts as full
                state_dict=self.net.state_dict(),
                options=self.net.options,
                optimizer=self.optimizer.state_dict(),
                best_psnr=self.best_psnr,
                best_epoch=self.best_epoch,
                sums=sums,
                usual_loss=self.usual_loss,
                random_state=torch.get_rng_state(),
                **({"ema": self.ema.module.state_dict()} if self.ema else {}),
            )

    def run(self):
        if self.epoch >= self.args.num_epochs and self.rank == 0:
            print(f"nothing is left to do of {counted(self.args.num_epochs, 'epoch')}: --num_epochs says how many.")
        while self.epoch < self.args.num_epochs:
            line = self.train_epoch()
            if line["epoch"] % self.args.val_epochs == 0 or line["epoch"] == self.args.num_epochs:
                try:
                    line["val_psnr"] = self.validate()
                except UserError:  # a broken picture, which must not cost the epoch
                    if self.world == 1:
                        self.save(self.latest)
                    raise
                self.stop_if_diverged(not math.isnan(line["val_psnr"]))
            self.finish_epoch(line)
        if self.rank == 0:
            print(f"done: best PSNR {self.best_psnr:.2f} dB in epoch {self.best_epoch}: {self.best}")

    def train_epoch(self):
        """Trains to the end of the epoch -> its line for the log."""
        args, start, total = self.args, time.time(), len(self.train_set)
        first, first_step = min(self.step * args.batch_size, total), self.step
        self.net.train()
        self.sampler.epoch, self.sampler.skip = self.epoch, self.step
        recent = torch.zeros_like(self.sums)
        bar = tqdm(
            desc=f"epoch {self.epoch + 1}/{args.num_epochs}",
            total=total,
            initial=first,
            unit="picture",
            disable=None if self.rank == 0 else True,
        )
        with bar:
            for batch in self.train_loader:
                own, together = self.sampler.share(self.step)
                self.step += 1
                values = self.train_step(batch, weight=own * self.world / together)
                self.sums += values * own
                recent += values
                bar.update(together)
                bar.set_postfix(loss=f"{values[-1]:.4f}", refresh=False)
                if self.log and self.step % LOG_STEPS == 0:
                    means = recent / min(LOG_STEPS, self.step - first_step)
                    self.log.losses(dict(zip(self.loss.terms, means.tolist())), self.steps_done())
                    recent.zero_()
                if self.step % args.accumulate == 0 or self.step == self.steps_per_epoch:
                    self.end_if_asked()
                    if self.step % (SAVE_STEPS * args.accumulate) == 0:
                        self.save(self.latest)
        seconds = time.time() - start
        means = sum_over_processes(self.sums) / total
        return {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            **dict(zip(self.loss.terms, means.tolist())),
            "pictures_per_second": round((total - first) / seconds, 2),
            "seconds": round(seconds, 1),
        }

    def train_step(self, batch, weight):
        """Adds a batch's gradients and, where a group of --accumulate batches is full, takes an optimizer step
        -> the loss terms, float64.

        The processes' gradients are averaged, so `weight` is 1 where all have equally many pictures.
        """
        args = self.args
        done = (self.step - 1) // args.accumulate * args.accumulate  # batches before this group
        group = min(args.accumulate, self.steps_per_epoch - done)
        update = self.step == done + group
        rainy = batch["input"].to(self.device, memory_format=torch.channels_last, non_blocking=True)
        clean = batch["target"].to(self.device, non_blocking=True)
        with contextlib.nullcontext() if update else self.without_sync():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                outputs = self.forward(rainy)
            losses = self.loss(outputs, clean)
            values = torch.stack([losses[name].detach() for name in self.loss.terms]).double()
            self.stop_if_not_finite(values, batch["name"])
            if args.loss_guard:
                weight = weight * self.guard(sum_over_processes(values[-1] * weight).item() / self.world)
            (losses["total"] * weight / group).backward()
        if update:
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), args.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update_parameters(self.net)
        return values

    def guard(self, loss):
        """-> the weight of a batch with this loss, below 1 where that is far above the usual."""
        limit = self.args.loss_guard * self.usual_loss if self.usual_loss else loss
        loss, weight = min(loss, limit), min(1, limit / loss)
        self.usual_loss = loss + GUARD_MEMORY * ((self.usual_loss or loss) - loss)
        return weight

    def stop_if_diverged(self, finite):
        if not finite:
            raise UserError(
                f"the weights or their results are no longer finite in epoch {self.epoch + 1}; {self.latest} was left "
                "as it was. Go on with --clip_grad 1 or a lower --lr."
            )

    def stop_if_not_finite(self, values, names):
        finite = bool(values.isfinite().all())
        if largest_over_processes(not finite, self.device):
            pictures = "".join(f"\n  {name}" for name in names) if not finite else " of another process"
            raise UserError(
                f"the loss is no longer finite in epoch {self.epoch + 1}, step {self.step}; {self.latest} was left as "
                f"it was. Look at the pictures of this batch, or go on with --clip_grad 1 or a lower --lr:{pictures}"
            )

    def end_if_asked(self):
        """Saves and ends the process after Ctrl-C or SIGTERM."""
        number = int(largest_over_processes(self.interruption.signal, self.device))
        if number:
            self.save(self.latest)
            end_processes()
            if self.rank == 0:
                print(f"\nstopped; all is saved in {self.latest}. The same command goes on from here.")
            sys.exit(128 + number)

    @torch.inference_mode()
    def validate(self):
        """-> mean RGB PSNR in dB of the full-size results, clamped to [0, 1], over all validation patches."""
        net = self.ema.module if self.ema else self.net
        net.eval()
        total, panels = 0.0, []
        for batch in self.val_loader:
            if self.interruption.signal:
                break
            rainy = batch["input"].to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                result = net(rainy)[0]
            result = result.float().clamp(0, 1).cpu()
            total += psnr(((result - batch["target"]) ** 2).mean().item(), peak=1)
            if len(panels) < PANELS:
                panels.append([batch["input"][0], result[0], batch["target"][0]])
        self.end_if_asked()
        if self.log:
            self.log.panels(panels, self.steps_done())
        total = torch.tensor(total, dtype=torch.float64, device=self.device)
        return sum_over_processes(total).item() / len(self.val_set)

    def finish_epoch(self, line):
        """Logs an epoch, saves, and ends if that was asked for."""
        self.schedule.step()
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        improved = line.get("val_psnr", -math.inf) > self.best_psnr
        if improved:
            self.best_psnr, self.best_epoch = line["val_psnr"], self.epoch
        if self.log:
            self.log.epoch(line, self.steps_done())
            print(", ".join(f"{name} {value:.6g}" for name, value in line.items()), flush=True)
        self.save(*([self.best, self.latest] if improved else [self.latest]))
        self.end_if_asked()


@reports_errors
def main(argv=None):
    with reports_lost_processes():
        Trainer(parse_args(argv)).run()
    end_processes()


if __name__ == "__main__":
    main()
