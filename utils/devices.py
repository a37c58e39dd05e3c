"""Where to run: the device, and which process of how many this one is."""

import contextlib
import ctypes
import os

import torch
import torch.distributed as dist

from utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory():
    """Lets the process keep memory that it frees. By default glibc gives each large tensor back to the kernel, which
    has to zero every page of the next one: a quarter of the network's time on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def usable_cores():
    """-> how many of the machine's cores this process may use: fewer in a job of a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def add_gpus(parser):
    """Adds the option that choose_device takes."""
    parser.add_argument("--gpus", help="number of the GPU, or cpu (default: a GPU if there is one)")


def choose_device(gpus=None):
    """-> torch.device. `gpus` is a GPU's number, 0 or "0" (of "0,1" the first counts), or "cpu"; None takes a GPU if
    there is one. Raises UserError if the GPU asked for is not there."""
    if gpus == "cpu" or (gpus is None and not torch.cuda.is_available()):
        keep_freed_memory()
        return torch.device("cpu")
    if gpus is None:
        return torch.device("cuda")
    number = str(gpus).split(",")[0]
    if not (number.isascii() and number.isdecimal()):
        raise UserError(f"--gpus {gpus}: give a GPU's number, such as 0, or cpu.")
    if int(number) >= torch.cuda.device_count():
        raise UserError(
            f"--gpus {gpus}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; leave --gpus away "
            "to run on what there is, or check the driver with nvidia-smi."
        )
    return torch.device("cuda", int(number))


@contextlib.contextmanager
def strict_float32():
    """Lets GPUs compute float32 convolutions in float32. PyTorch's default rounds their inputs to TF32, of 10 bits, and
    pictures then differ from a CPU's by a level here and there."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        flags, name, strict = cudnn.conv, "fp32_precision", "ieee"
    else:  # before PyTorch 2.9
        flags, name, strict = cudnn, "allow_tf32", False
    before = getattr(flags, name)
    setattr(flags, name, strict)
    try:
        yield
    finally:
        setattr(flags, name, before)


def start_processes(gpus=None, patience=None):
    """Joins the processes that torchrun started, if it did -> (device, this process's rank, number of processes).
    `gpus` is as in choose_device; under torchrun each process takes a GPU of its own, or "cpu". `patience` (timedelta)
    is how long a process waits for another one that lives; PyTorch's default is minutes."""
    if "LOCAL_RANK" not in os.environ:
        return choose_device(gpus), 0, 1
    device = choose_device(gpus if gpus == "cpu" else None)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs here: give torchrun that --nproc_per_node.")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device, dist.get_rank(), dist.get_world_size()


def end_processes():
    """Leaves the processes that start_processes joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def reports_lost_processes():
    """Turns what the backends raise where another of the processes has vanished into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"another process of this run has ended or is out of reach ({str(error).splitlines()[0]}); its message, or "
            "what torchrun prints below, says why. What was finished is whole, and the same command goes on from it."
        ) from error


def sum_over_processes(tensor):
    """-> the sum of a tensor over all processes, on each of them."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def largest_over_processes(number, device):
    """-> the largest of a number over all processes, on each of them."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(float(number), device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def equal_over_processes(number, device):
    """-> whether all processes have the same number."""
    return largest_over_processes(number, device) == -largest_over_processes(-number, device)


def from_first_process(value):
    """-> what the first process has, on each of them; anything that can be pickled."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all_processes(value):
    """-> list of what each process has, on each of them; anything that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
