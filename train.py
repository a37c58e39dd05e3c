"""Trains NeRD-Rain by the published recipe. The same command resumes an interrupted run.

    python train.py --dataset Rain200L
    torchrun --standalone --nproc_per_node 4 train.py --dataset Rain200L --batch_size 4

Everything of a run lies in <model_save_dir>/<mode>/models/<session>/: model_latest.pth and the one before it,
model_previous.pth; model_best.pth; log.jsonl (a line per epoch); runs.jsonl (a line per start); TensorBoard files.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm
from warmup_scheduler import GradualWarmupScheduler

import ablations
from dataset_RGB import EpochSampler, Photo, TrainingPatches, ValidationPatches, ignore_signals
from evaluations.metrics import psnr
from losses import DerainLoss
from model import MULTIPLE
from utils import devices, files
from utils.checkpoint import build_network, load_network, load_newest, save_checkpoint
from utils.files import UserError, counted
from utils.pairs import DATASETS, Recipe, find_pairs, hold_out
from utils.pictures import find_pictures

PUBLISHED = Recipe(0, 0, num_epochs=3000)  # defaults of the options without --dataset
WARMUP_EPOCHS, MIN_LR = 3, 1e-6
CHECK_STEPS = 50  # steps on a GPU after which the losses are checked, for which the host waits
SAVE_STEPS = 1000  # optimizer steps between two checkpoints within an epoch, which can take days (SPA-Data)
PROGRESS_SECONDS = 60  # between two lines of progress where no terminal shows a bar
PANELS = 4  # validation pictures in TensorBoard


def checked(kind, condition, description):
    """-> a type for argparse: numbers that meet a condition."""

    def parse(string):
        value = kind(string)
        if not condition(value):
            raise argparse.ArgumentTypeError(f"must be {description}, not {string}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where a string is no number
    return parse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = checked(int, lambda n: n >= 1, "at least 1")
    natural = checked(int, lambda n: n >= 0, "at least 0")
    positive = checked(float, lambda n: 0 < n < math.inf, "above 0")
    fraction = checked(float, lambda n: 0 < n < 1, "between 0 and 1")
    even = checked(int, lambda n: n > 0 and n % 2 == 0, "a multiple of 2")
    patch = checked(int, lambda n: n > 0 and n % MULTIPLE == 0, f"a multiple of {MULTIPLE}")
    presets = [name for name, recipe in DATASETS.items() if recipe.num_epochs]
    changes = [*ablations.ABLATIONS, "mprnet", "no_zero_epoch"]

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=presets, help="preset of folders, session, network and recipe for one data set")
    add("--train_dir", metavar="DIR", help="folder with input/ and target/ (default: Datasets/<dataset>/train)")
    add("--val_dir", metavar="DIR", help="the same for validation, which chooses model_best.pth (default: …/test)")
    add("--hold_out", type=fraction, metavar="FRACTION", help="validate on this part of the training scenes instead")
    add("--clean_half", choices=("left", "right"), help="in folders of side-by-side pictures, the half that is clean")
    add("--clean_dir", metavar="DIR", help="photographs to train on with synthetic rain, along with pairs or alone")
    add("--clean_repeats", type=count, default=1, metavar="N", help="how often each comes in an epoch (default: 1)")
    add("--num_workers", type=natural, metavar="N", help="data-loading processes of each GPU (default: up to 4)")

    add = parser.add_argument_group("network").add_argument
    add("--model", choices=ablations.NETWORKS, help="default: the preset's, or that of the weights it starts from")
    add("--ablation", choices=changes, metavar="NAME", help=f"a change of network or recipe: {', '.join(changes)}")
    add("--dim", type=even, metavar="N", help="width of the network (default: 48; NeRD-Rain-S 32)")
    add("--num_blocks", type=count, nargs=3, metavar="N", help="blocks at level 1, 2 and the latent (default: 2 3 3)")
    add("--pretrain_weights", metavar="FILE", help="checkpoint to start from, with its averaged weights if it has them")

    add = parser.add_argument_group("recipe (defaults: the preset's, or the published ones)").add_argument
    add("--num_epochs", type=count, metavar="N", help="epochs of the whole run (published: 3000)")
    add("--batch_size", type=count, metavar="N", help="pictures per batch, over all processes together (1)")
    add("--patch_size", type=patch, metavar="N", help="side of the square training patches (256)")
    add("--lr", type=positive, help="learning rate after the warm-up (1e-4)")
    add("--no_zero_epoch", action="store_true", help="leave out the warm-up's first epoch, which has rate 0")
    add("--accumulate", type=count, default=1, metavar="N", help="batches per optimizer step (1)")
    add("--clip_grad", type=positive, metavar="NORM", help="largest norm of the gradient")
    add("--ema", type=fraction, metavar="DECAY", help="average the weights, too, e.g. 0.999; the average is validated")
    add("--seed", type=natural, default=1234, help="of initial weights, order and augmentation (default: 1234)")

    add = parser.add_argument_group("run").add_argument
    add("--model_save_dir", default="checkpoints", metavar="DIR", help="where runs are kept (default: checkpoints)")
    add("--mode", default="Deraininig", help="part of the path, spelt as published (default: Deraininig)")
    add("--session", help="name of the run (default: the data set's, ablation/NAME/SEED, or Multiscale)")
    add("--val_epochs", type=count, default=1, metavar="N", help="epochs between two validations (default: 1)")
    add("--save_epochs", type=count, metavar="N", help="keep model_epoch_<number>.pth every N epochs")

    group = parser.add_argument_group("speed and memory")
    add = group.add_argument
    devices.add_gpus(group)
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps")
    add("--save_memory", action="store_true", help="recompute activations in the backward pass: slower")
    args = parser.parse_args(argv)

    own_data = args.train_dir or (args.clean_dir and not args.dataset)
    if own_data and not args.val_dir and not args.hold_out:
        other_way = ", or --hold_out 0.05 to validate on a part of --train_dir" if args.train_dir else ""
        parser.error(f"give --val_dir DIR, pairs to validate on{other_way}")
    folder, recipe = Path("Datasets", args.dataset or "Rain200L"), DATASETS.get(args.dataset, PUBLISHED)
    if not own_data:
        args.train_dir = str(folder / "train")
    if args.ablation == "mprnet":
        if args.model:
            parser.error("--ablation mprnet is a network of its own: omit --model")
        args.model = "NeRD-Rain-MPRNet"
    args.no_zero_epoch |= args.ablation == "no_zero_epoch"
    session = f"ablation/{args.ablation}/{args.seed}" if args.ablation else args.dataset or "Multiscale"
    defaults = {"val_dir": str(folder / "test"), "session": session, "num_workers": min(4, devices.usable_cores())}
    for name in ("num_epochs", "batch_size", "patch_size", "lr", "clip_grad", "ema"):
        defaults[name] = getattr(recipe, name)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def find_data(args):
    """-> list of pairs and photographs to train on, list of validation pairs."""
    pairs = find_pairs(args.train_dir, args.clean_half) if args.train_dir else []
    photos = [Photo(path) for path in find_pictures(args.clean_dir)[0]] if args.clean_dir else []
    if args.hold_out:
        pairs, validation = hold_out(pairs, args.hold_out, args.seed)
    else:
        validation = find_pairs(args.val_dir, args.clean_half)
    return pairs + args.clean_repeats * photos, validation


def digest_data(pairs, folder, clean_dir=None):
    """-> a digest of the names of pairs below `folder` and of photographs below `clean_dir`, and of the sizes of up to
    a thousand of these files: Rain200L and Rain200H have equal names, and network disks are slow to tell all sizes."""
    hashed = hashlib.sha256()
    for pair in pairs:
        root = clean_dir if isinstance(pair, Photo) else folder
        hashed.update(os.fsencode(os.path.relpath(pair.input, root)) + b"\n")
    sizes = [os.path.getsize(pair.input) for pair in pairs[:: 1 + len(pairs) // 1000]]
    hashed.update(repr(sizes).encode())
    return hashed.hexdigest()


def make_network(args, path, checkpoint):
    """The network with the weights it starts from: an interrupted run's, --pretrain_weights, or random ones."""
    source = path if checkpoint else args.pretrain_weights
    changes = {"dim": args.dim, "num_blocks": args.num_blocks, **ablations.ABLATIONS.get(args.ablation, {})}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not source:
        preset = DATASETS[args.dataset].model if args.dataset else "NeRD-Rain"
        return ablations.build(**{**ablations.NETWORKS[args.model or preset], **changes})
    net = build_network({**checkpoint, "ema": None}, source) if checkpoint else load_network(source)
    with torch.device("meta"):
        wanted = ablations.build(**{**(ablations.NETWORKS[args.model] if args.model else net.options), **changes})
    if net.options != wanted.options:
        found, asked = ablations.network_name(net), ablations.network_name(wanted)
        raise UserError(f"{source} holds {found}, but {asked} was asked for: change that or --session.")
    return net


def learning_rates(num_epochs, lr, no_zero_epoch=False):
    """-> list of the learning rates of all epochs: a linear warm-up, then a cosine down to MIN_LR.

    As published, the first epoch runs at rate 0, and the cosine is divided by its second value: the rate is `lr` in
    epochs 4 and 6, above it in epoch 5. `no_zero_epoch` leaves the first epoch out. The published code uses
    CosineAnnealingLR, whose rates differ between PyTorch releases.
    """
    half_period, low = max(2, num_epochs + no_zero_epoch - WARMUP_EPOCHS), MIN_LR / lr

    def cosine(epoch):
        return low + (1 - low) * (1 + math.cos(math.pi * epoch / half_period)) / (1 + math.cos(math.pi / half_period))

    rates, optimizer = [], torch.optim.SGD([torch.zeros(1)], lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package asks for rates between steps
        after = LambdaLR(optimizer, cosine)
        schedule = GradualWarmupScheduler(optimizer, multiplier=1, total_epoch=WARMUP_EPOCHS, after_scheduler=after)
        for _ in range(num_epochs + no_zero_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    return rates[int(no_zero_epoch) :]


class Output(io.FileIO):
    """A terminal or pipe that may be closed at any moment: what is printed then is lost, and the run is not."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


class Interruption:
    """Ctrl-C, SIGTERM and a closed terminal ask a run to save and end after its step."""

    def __init__(self):
        self.signal = 0  # number of the last one
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # Windows; nohup
                signal.signal(number, self.ask)

    def ask(self, number, _):
        self.signal = number
        if number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(OSError):
                os.write(2, "stopping after this step …\n".encode())  # print fails where it interrupts another one


class Trainer:
    """A training run: its network, its optimizer, its data and how far it has come."""

    def __init__(self, args):
        self.args = args
        self.device, self.rank, self.world = devices.start_processes(args.gpus)
        if args.batch_size < self.world:
            raise UserError(
                f"--batch_size {args.batch_size} is too small for {self.world} processes: choose {self.world} or more."
            )
        if self.rank == 0:
            devices.print_warnings(self.device, args.gpus, args.bf16)
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True  # all patches have one size

        pairs, val_pairs = find_data(args)
        self.train_data = digest_data(pairs, args.train_dir, args.clean_dir)
        val_digest = digest_data(val_pairs, args.train_dir if args.hold_out else args.val_dir)
        self.val_data = f"{val_digest} {args.clean_half} {args.patch_size}"
        self.train_set = TrainingPatches(pairs, args.patch_size, args.seed)
        self.val_set = ValidationPatches(val_pairs, args.patch_size)
        self.sampler = EpochSampler(len(pairs), args.batch_size, args.seed, self.rank, self.world)
        self.steps_per_epoch = len(self.sampler)
        self.train_loader = self.make_loader(self.train_set, batch_sampler=self.sampler)
        self.val_loader = self.make_loader(Subset(self.val_set, range(self.rank, len(val_pairs), self.world)))

        self.folder = Path(args.model_save_dir, args.mode, "models", args.session)
        names = [self.folder / f"model_{which}.pth" for which in ("latest", "previous", "best")]
        self.latest, self.previous, self.best = names
        self.lock = files.lock(self.folder / "lock") if self.rank == 0 else None  # held as long as the file is open
        if self.rank == 0 and not self.lock:
            raise UserError(f"another run trains in {self.folder}: stop it, or choose another --session.")
        source, checkpoint, problems = load_newest(self.latest, self.previous)
        self.net = make_network(args, source, checkpoint).to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).requires_grad_(False) if args.ema else None
        self.loss = DerainLoss().to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=args.lr, fused=True)
        self.epoch, self.step = 0, 0  # epochs done, and batches done of the next one
        self.sums = torch.zeros(len(self.loss.terms), dtype=torch.float64, device=self.device)  # of the epoch's losses
        self.best_psnr, self.best_epoch = -math.inf, 0
        if checkpoint:
            self.restore(checkpoint, source)
        if not devices.equal_over_processes(self.pictures_done(), self.device):
            raise UserError(f"the processes found different checkpoints: all machines must share {self.folder}.")
        for _ in self.val_loader:  # reports broken pictures now, not after an epoch
            pass

        if args.save_memory:
            ablations.checkpoint_activations(self.net)
        self.parallel = DistributedDataParallel(self.net) if self.world > 1 else self.net
        self.without_sync = self.parallel.no_sync if self.world > 1 else contextlib.nullcontext
        self.forward = self.parallel
        if args.compile:
            self.compile()

        self.check_steps = 1
        if self.device.type == "cuda":  # several processes see signals at these checks, which torchrun awaits for 30 s
            self.check_steps = CHECK_STEPS if self.world == 1 else CHECK_STEPS // 5
        self.unchecked, self.loss_text = [], ""  # steps whose losses were not checked yet; the last loss that was
        self.next_line = time.monotonic() + PROGRESS_SECONDS
        self.board = None
        if self.rank == 0:
            self.begin(source, problems)
        self.interruption = Interruption()  # before this there is nothing to save

    def make_loader(self, dataset, **options):
        options |= {"num_workers": self.args.num_workers, "persistent_workers": self.args.num_workers > 0}
        options |= {"pin_memory": self.device.type == "cuda", "worker_init_fn": ignore_signals}
        # With the default generator each start would advance the random state, which a resumed run restores.
        return DataLoader(dataset, generator=torch.Generator(), **options)

    def restore(self, checkpoint, source):
        """Restores what a checkpoint holds; a published one has only epoch, weights and optimizer."""
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            raise UserError(f"{source} holds weights only: move it elsewhere and pass it to --pretrain_weights.")
        if checkpoint.get("train_data", self.train_data) != self.train_data:
            raise UserError(
                f"{self.folder} was trained on other pictures than there are now in --train_dir and --clean_dir: "
                "restore them, or choose another --session."
            )
        self.epoch = checkpoint["epoch"]
        self.step = min(checkpoint.get("pictures", 0) // self.args.batch_size, self.steps_per_epoch)
        self.best_psnr, self.best_epoch = checkpoint.get("best_psnr", -math.inf), checkpoint.get("best_epoch", 0)
        if checkpoint.get("val_data", self.val_data) != self.val_data:
            if self.rank == 0 and "best_psnr" in checkpoint:
                print(f"validation has changed: {self.best} is chosen anew, from epoch {self.epoch + 1} on")
            self.best_psnr, self.best_epoch = -math.inf, 0
        if self.step:
            self.sums = checkpoint["sums"].to(self.device) / self.world
        state = self.optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]}  # with this run's settings
        self.optimizer.load_state_dict(state)
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # published ones are contiguous; fused Adam needs equal strides
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        if self.ema:
            self.ema.load_state_dict(checkpoint.get("ema", checkpoint["state_dict"]))
        if "random_state" in checkpoint:
            torch.set_rng_state(checkpoint["random_state"])

    def compile(self):
        """Compiles the network for this run's batches, or says why that fails, which a trial step finds out."""
        side, count = self.args.patch_size, self.sampler.counts(0)[0]
        patches = torch.zeros(count, 3, side, side, device=self.device).to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.parallel, dynamic=False)
        try:
            with torch.random.fork_rng(devices=[]), self.without_sync():
                self.compute_losses(patches, patches)["total"].backward()
        except Exception as error:  # compilers raise all kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"--compile does not work here ({reason}): training continues without it")
            self.forward = self.parallel
        self.optimizer.zero_grad()

    def begin(self, source, problems):
        """Prints and records what begins, and drops what was logged after the checkpoint."""
        if source == self.previous:
            print("warning:", *(problems or [f"{self.latest} does not exist."]), f"Resuming from {source}.")
            if self.latest.exists():  # another day it may be readable; the next save would make it the previous
                os.replace(self.latest, self.folder / "model_damaged.pth")
        args, records, log = vars(self.args), self.folder / "runs.jsonl", self.folder / "log.jsonl"
        device = f"CPU with {counted(torch.get_num_threads(), 'thread')}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        print(
            f"{ablations.network_name(self.net)} on {device}, {self.world} process{'es' * (self.world > 1)}: "
            f"{counted(len(self.train_set), 'training pair')}, {counted(len(self.val_set), 'validation pair')}, "
            f"{counted(self.args.num_epochs, 'epoch')} -> {self.folder}"
        )
        runs = files.read_json_lines(records)
        if source:
            print(f"resumes after epoch {self.epoch} and {self.step} of {counted(self.steps_per_epoch, 'step')}")
            last = runs[-1]["arguments"] if runs else {}
            changes = [name for name in args if name in last and args[name] != last[name]]
            for name in changes:
                print(f"changed since the last start: --{name} {args[name]} (was {last[name]})")
        run = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv, "arguments": args, **files.software()}
        run |= {"cuda": torch.version.cuda, "device": device, "processes": self.world}
        files.write_json_lines(records, [*runs, run])
        files.write_json_lines(log, [line for line in files.read_json_lines(log) if line["epoch"] <= self.epoch])
        self.board = SummaryWriter(self.folder, purge_step=self.pictures_done())

    def end_if_asked(self):
        """Saves and ends the process if any process of the run was asked to."""
        number = int(devices.largest_over_processes(self.interruption.signal, self.device))
        if number:
            self.save(self.latest)
            devices.end_processes()
            if self.rank == 0:
                print(f"\nstopped; all is saved in {self.latest}. The same command resumes.")
            sys.exit(128 + number)

    def pictures_done(self):
        total = len(self.train_set)
        return self.epoch * total + min(self.step * self.args.batch_size, total)

    def run(self):
        args = self.args
        if self.epoch >= args.num_epochs and self.rank == 0:
            print(f"all {args.num_epochs} epochs are done; raise --num_epochs to continue.")
        while self.epoch < args.num_epochs:
            line = self.train_epoch()
            if line["epoch"] % args.val_epochs == 0 or line["epoch"] == args.num_epochs:
                try:
                    line["val_psnr"] = self.validate()
                except UserError:  # a picture that broke meanwhile, which must not cost the epoch
                    if self.world == 1:
                        self.save(self.latest)
                    raise
            self.finish_epoch(line)
        if self.rank == 0 and self.best_epoch:
            print(f"done: best PSNR {self.best_psnr:.2f} dB in epoch {self.best_epoch}: {self.best}")

    def train_epoch(self):
        """Trains to the end of the epoch -> its line for the log."""
        args, total, start = self.args, len(self.train_set), time.monotonic()
        first = min(self.step * args.batch_size, total)  # pictures used before an interruption
        rate = learning_rates(args.num_epochs, args.lr, args.no_zero_epoch)[self.epoch]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.net.train()
        self.sampler.epoch, self.sampler.skip = self.epoch, self.step
        name = f"epoch {self.epoch + 1}/{args.num_epochs}"
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        hidden = self.rank > 0 or not sys.stderr.isatty()
        with tqdm(None, name, self.steps_per_epoch, initial=self.step, bar_format=layout, disable=hidden) as bar:
            for batch in self.train_loader:
                updated = self.train_step(batch)
                self.show_progress(bar, name, first, start)
                stopping = self.world == 1 and self.interruption.signal
                if updated and (stopping or len(self.unchecked) >= self.check_steps):
                    self.check_losses()
                    self.end_if_asked()
                if updated and self.step % (SAVE_STEPS * args.accumulate) == 0:
                    self.save(self.latest)
        self.check_weights()
        means, seconds = devices.sum_over_processes(self.sums) / total, time.monotonic() - start
        line = {"epoch": self.epoch + 1, "lr": rate, **dict(zip(self.loss.terms, means.tolist()))}
        if first < total:
            line |= {"pictures_per_second": round((total - first) / seconds, 2), "seconds": round(seconds, 1)}
        return line

    def train_step(self, batch):
        """Adds a batch's gradients and, after a group of --accumulate batches, takes an optimizer step -> whether it
        did. The host does not wait for the device here: `check_losses` does."""
        args = self.args
        begin = self.step // args.accumulate * args.accumulate
        group = min(args.accumulate, self.steps_per_epoch - begin)
        own_count, batch_count = self.sampler.counts(self.step)
        self.step += 1
        update = self.step == begin + group
        rainy, clean = (self.to_device(batch[name]) for name in ("input", "target"))
        with contextlib.nullcontext() if update else self.without_sync():
            losses = self.compute_losses(rainy, clean)
            weight = own_count * self.world / batch_count  # DDP averages over processes, which may have fewer pictures
            (losses["total"] * weight / group).backward()
        values = torch.stack([losses[name].detach() for name in self.loss.terms]).double()
        self.sums += values * own_count
        norm = values.new_zeros(())  # of the gradient
        if update:
            norm = clip_grad_norm_(self.net.parameters(), args.clip_grad or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                average = get_ema_multi_avg_fn(args.ema)
                average(list(self.ema.parameters()), list(self.net.parameters()), None)
        self.unchecked.append((self.step, batch["name"], torch.cat([values, norm.double()[None]])))
        return update

    def to_device(self, patches):
        """B×3×P×P uint8 -> float32 in [0, 1] on the device."""
        patches = patches.to(self.device, non_blocking=True)
        return patches.to(torch.float32, memory_format=torch.channels_last) / 255

    def compute_losses(self, rainy, clean):
        # An epoch's last batch may be smaller: the compiled network would be compiled anew for it.
        forward = self.forward if len(rainy) == self.sampler.counts(0)[0] else self.parallel
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            outputs = forward(rainy)
        return self.loss(outputs, clean)

    def check_losses(self):
        """Raises UserError if a loss or gradient since the last check is not finite. This and saving are the only
        places in training where the host waits for the device."""
        if not self.unchecked:
            return
        rows = torch.stack([row for _, _, row in self.unchecked]).cpu()
        finite = rows.isfinite().all(dim=1).tolist()
        bad = [(step, names) for (step, names, _), good in zip(self.unchecked, finite) if not good]
        if devices.largest_over_processes(bool(bad), self.device):
            raise self.diverged(*(bad[0] if bad else (self.step, [])))
        means = dict(zip(self.loss.terms, rows.mean(dim=0).tolist()))
        self.unchecked, self.loss_text = [], f", loss {means['total']:.4f}"
        self.to_board("loss", means)

    @torch.no_grad()
    def check_weights(self):
        """Checks the losses, and raises UserError if a weight is not finite."""
        self.check_losses()
        if not get_total_norm(list(self.net.parameters())).isfinite():
            raise self.diverged(self.step, [])

    def diverged(self, step, names):
        look = f", or look at the pictures of that step:{files.listed(names)}" if names else "."
        return UserError(
            f"the loss, its gradient or the weights are no longer finite in epoch {self.epoch + 1}, step {step}; "
            f"{self.latest} was left as it was. Resume with --clip_grad 1 or a lower --lr{look}"
        )

    def to_board(self, group, values):
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, self.pictures_done())

    def show_progress(self, bar, name, first, start):
        """Moves the bar on a terminal; elsewhere prints a line every minute. The loss is that of the last check."""
        done, total = min(self.step * self.args.batch_size, len(self.train_set)), len(self.train_set)
        speed = (done - first) / (time.monotonic() - start)
        epoch_left = tqdm.format_interval((total - done) / speed)
        run_left = tqdm.format_interval(((self.args.num_epochs - self.epoch) * total - done) / speed)
        status = f"{speed:.{2 if speed < 10 else 0}f} pictures/s, run {run_left} left{self.loss_text}"
        bar.set_postfix_str(status, refresh=False)
        bar.update()
        if bar.disable and self.rank == 0 and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PROGRESS_SECONDS
            step = f"step {self.step}/{self.steps_per_epoch}, lr {self.optimizer.param_groups[0]['lr']:.3g}"
            print(f"{name}, {step}: epoch {epoch_left} left, {status}")

    @torch.inference_mode()
    def validate(self):
        """-> mean RGB PSNR in dB of the full-size results, clamped to [0, 1], over all validation patches."""
        net = (self.ema or self.net).eval()
        errors, panels = [], []
        for batch in self.val_loader:
            if self.interruption.signal:
                break
            rainy, clean = (self.to_device(batch[name]) for name in ("input", "target"))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                result = net(rainy)[0].float().clamp(0, 1)
            errors.append((result - clean).square().mean())
            if len(errors) <= PANELS:
                panels += [rainy[0], result[0], clean[0]]
        self.end_if_asked()
        if self.board:
            self.board.add_image("rainy, derained, clean", make_grid(panels, nrow=3), self.pictures_done())
        values = [psnr(error.item(), peak=1) for error in errors]
        total = torch.tensor(sum(values), dtype=torch.float64, device=self.device)
        return devices.sum_over_processes(total).item() / len(self.val_set)

    def finish_epoch(self, line):
        """Logs an epoch, saves, and ends if that was asked for."""
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        paths = [self.latest]
        if line.get("val_psnr", -math.inf) > self.best_psnr:
            self.best_psnr, self.best_epoch = line["val_psnr"], self.epoch
            paths.insert(0, self.best)
        if self.args.save_epochs and self.epoch % self.args.save_epochs == 0:
            paths.insert(0, self.folder / f"model_epoch_{self.epoch}.pth")
        if self.rank == 0:
            files.append_json(self.folder / "log.jsonl", line)
        self.to_board("epoch", line)
        self.save(*paths)
        if self.rank == 0:
            text = ", ".join(f"{name} {value:.6g}" for name, value in line.items())
            best = f", best {self.best_psnr:.2f} dB in epoch {self.best_epoch}" if self.best_epoch else ""
            print(text + best)
        self.end_if_asked()

    def save(self, *paths):
        self.check_weights()
        content = {
            "epoch": self.epoch,
            "pictures": self.step * self.args.batch_size,  # used of the next epoch; its last batch counts as full
            "train_data": self.train_data,
            "val_data": self.val_data,
            "state_dict": self.net.state_dict(),
            "options": self.net.options,
            "optimizer": self.optimizer.state_dict(),
            "best_psnr": self.best_psnr,
            "best_epoch": self.best_epoch,
            "sums": devices.sum_over_processes(self.sums),
            "random_state": torch.get_rng_state(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
        }
        if self.rank == 0:
            for path in paths:
                save_checkpoint(path, previous=self.previous if path == self.latest else None, **content)


@files.reports_errors
def main(argv=None):
    args = parse_args(argv)
    threading.excepthook = lambda _: None  # TensorBoard's thread would print what the main one raises
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not replaced by the program that calls this function
            buffer = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))
    try:
        with devices.reports_lost_processes():
            Trainer(args).run()
    except OSError as error:
        if error.filename or error.errno not in files.DISK_ERRORS:
            raise
        raise UserError(f"{args.model_save_dir} cannot be written ({error.strerror}): free some space.") from error
    devices.end_processes()


if __name__ == "__main__":
    main()
