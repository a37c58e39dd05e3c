"""The device that computes, and this process among those of torchrun."""

import contextlib
import ctypes
import os
import re
from collections import deque
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from utils.files import UserError, counted

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LAST_REDUCED = deque(maxlen=16)  # see all_reduce


def keep_freed_memory():
    """Makes glibc keep freed memory. By default it returns each large tensor to the kernel, which zeroes every page of
    the next one: a quarter of the network's time on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def usable_cores():
    """-> the number of cores this process may use, fewer than the machine's in a scheduler's job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_warnings(gpus=None):
    """-> sentences to print before the CPU computes: on a GPU that PyTorch cannot use, unless `gpus` is "cpu", and on
    cores that are busy."""
    warnings = []
    if gpus != "cpu" and NVIDIA_DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        driver = re.search(r"\d+\.\d[.\d]*", NVIDIA_DRIVER.read_text())
        warnings.append(
            f"WARNING: PyTorch {torch.__version__}, built for {built_for}, "
            f"cannot use this machine's NVIDIA GPU (driver {driver[0] if driver else 'unknown'}): THE CPU COMPUTES. "
            "Update the driver or install a PyTorch for it (https://pytorch.org/get-started/locally/), or use "
            "--gpus cpu if this is intended."
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0  # of the whole machine; not on Windows
    threads, cores = torch.get_num_threads(), usable_cores()
    free = max(0, min(cores, (os.cpu_count() or cores) - load))
    if threads > 1 and threads > free + 0.5:
        warnings.append(
            f"note: other programs keep about {cores - free:.0f} of {cores} cores busy. With more threads than free "
            f"cores this one takes several times as long: set OMP_NUM_THREADS={max(1, round(free))}."
        )
    return warnings


def has_bfloat16(device):
    """-> whether the device itself computes in bfloat16. Others emulate it: a processor with AVX2 only took 30 times as
    long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def print_warnings(device, gpus, bf16=False):
    """Prints what makes this run slow: see cpu_warnings and has_bfloat16."""
    warnings = cpu_warnings(gpus) if device.type == "cpu" else []
    if bf16 and not has_bfloat16(device):
        kind = "GPU" if device.type == "cuda" else "processor"
        warnings.append(f"note: this {kind} only emulates bfloat16, which is slow: omit --bf16.")
    for warning in warnings:
        print(warning)


def add_gpus(parser):
    """Adds the option that choose_device takes."""
    parser.add_argument("--gpus", help="number of the GPU, or cpu (default: a GPU if there is one)")


def choose_device(gpus=None):
    """-> torch.device, which also becomes PyTorch's current one.

    Args:
        gpus: a GPU's number, 0 or "0" (of "0,1" the first counts), or "cpu"; None takes PyTorch's current GPU if there
            is one. Under torchrun each process takes the GPU of its local rank.

    Raises UserError if there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == "cpu" or (gpus is None and not count):
        keep_freed_memory()
        return torch.device("cpu")
    number = str(torch.cuda.current_device() if gpus is None else gpus).split(",")[0]
    if not number.isdecimal():
        raise UserError(f"--gpus {gpus}: give a GPU's number, such as 0, or cpu.")
    number = int(os.environ.get("LOCAL_RANK", number))
    if "LOCAL_RANK" in os.environ and 0 < count <= number:
        raise UserError(f"this machine has {counted(count, 'GPU')}: use --nproc_per_node {count}.")
    if number >= count:
        raise UserError(
            f"--gpus {gpus}: PyTorch {torch.__version__} sees {counted(count, 'GPU')} here; omit --gpus to run on what "
            "there is, or check the driver with nvidia-smi."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def strict_float32(benchmark=False):
    """Makes GPUs compute float32 in float32. PyTorch rounds the inputs of convolutions to TF32, of 10 bits, by default,
    and those of matrix products where a program or the environment allows it; pictures then differ from a CPU's by a
    level here and there. `benchmark` lets cuDNN try its algorithms once for each size of input: worth it for sizes that
    come again."""
    cudnn = torch.backends.cudnn
    settings = [  # not matmul.allow_tf32, which cannot restore the precision "medium"
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), False),
        (partial(getattr, cudnn, "benchmark"), partial(setattr, cudnn, "benchmark"), benchmark),
    ]
    with contextlib.ExitStack() as restored:
        for read, write, value in settings:
            with contextlib.suppress(RuntimeError):  # of a program that has set fp32_precision: it keeps that
                before = read()
                if before != value:
                    write(value)
                    restored.callback(write, before)
        yield


def start_processes(gpus=None):
    """Joins the processes that torchrun started, if it did -> (device, this process's rank, number of processes)."""
    device = choose_device(gpus)
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def end_processes():
    """Leaves the processes that start_processes joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def reports_lost_processes():
    """Turns what is raised when another process has vanished into a UserError. NCCL's own errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        own = "NCCL error" in message and "remote process exited" not in message  # such as a full /dev/shm
        lost = (isinstance(error, dist.DistError) or "gloo" in message) and not own
        if not dist.is_initialized() or not lost:
            raise
        raise UserError(
            f"another process of this run has ended or is out of reach ({message.splitlines()[0]}); its message, or "
            "what torchrun prints below, says why. The same command resumes from the last checkpoint."
        ) from error


def all_reduce(tensor, operation):
    """Combines a tensor with those of the other processes, in place -> the tensor.

    The last ones are kept alive: gloo's threads would need Python's lock to free them, and PyTorch before 2.8 holds it
    while it waits for these threads to end (pytorch/pytorch#154976).
    """
    LAST_REDUCED.append(tensor)
    dist.all_reduce(tensor, operation)
    return tensor


def sum_over_processes(tensor):
    """-> the sum of a tensor over all processes, on each of them."""
    return all_reduce(tensor.clone(), dist.ReduceOp.SUM) if dist.is_initialized() else tensor


def largest_over_processes(number, device):
    """-> the largest of a number over all processes, on each of them. On a GPU this waits for its queue."""
    if not dist.is_initialized():
        return number
    return all_reduce(torch.tensor(float(number), device=device), dist.ReduceOp.MAX).item()


def equal_over_processes(number, device):
    """-> whether all processes have the same number."""
    return largest_over_processes(number, device) == -largest_over_processes(-number, device)
