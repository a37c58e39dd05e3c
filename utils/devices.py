"""Where to run: the device, and which process of how many this one is."""

import os

import torch
import torch.distributed as dist

from utils.errors import UserError


def choose_device(gpus=None):
    """-> torch.device. `gpus` is a GPU's number as in "0" (of "0,1" the first counts) or "cpu"; None takes a GPU if
    there is one. Raises UserError if the GPU asked for is not there."""
    if gpus is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if gpus == "cpu":
        return torch.device("cpu")
    number = gpus.split(",")[0]
    if not (number.isascii() and number.isdecimal()):
        raise UserError(f"--gpus {gpus}: give a GPU's number, such as 0, or cpu.")
    if int(number) >= torch.cuda.device_count():
        raise UserError(
            f"--gpus {gpus}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; leave --gpus away "
            "to run on what there is, or check the driver with nvidia-smi."
        )
    return torch.device("cuda", int(number))


def start_processes():
    """Joins the processes that torchrun started, if it did -> (device, this process's rank, number of processes)."""
    if "LOCAL_RANK" not in os.environ:
        return choose_device(), 0, 1
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs here: give torchrun that --nproc_per_node.")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def end_processes():
    """Leaves the processes that start_processes joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
