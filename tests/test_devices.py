import contextlib
import os

import pytest
import torch
import torch.distributed as dist

from utils import devices
from utils.devices import (
    choose_device,
    cpu_warnings,
    end_processes,
    equal_over_processes,
    largest_over_processes,
    reports_lost_processes,
    start_processes,
    strict_float32,
    sum_over_processes,
    usable_cores,
)
from utils.files import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are two GPUs -> the list of those made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("choice, number", [(None, 0), (0, 0), (1, 1), ("1", 1), ("1,0", 1)])
def test_the_chosen_gpu_becomes_the_current_one(gpus, choice, number):
    device = choose_device(choice)
    assert device == torch.device("cuda", number) and gpus == [device]


def test_cpu_is_taken_on_request_and_without_a_gpu(gpus, monkeypatch):
    assert choose_device("cpu") == torch.device("cpu") and gpus == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as with a driver that is too old
    assert choose_device() == torch.device("cpu")
    with pytest.raises(UserError, match=r"--gpus 0: PyTorch .* sees 0 GPUs here; omit --gpus"):
        choose_device(0)


@pytest.mark.parametrize("choice", ["all", "-1", "", "²", "cuda:0"])
def test_what_is_no_gpu_is_refused(gpus, choice):
    with pytest.raises(UserError, match="give a GPU's number, such as 0, or cpu"):
        choose_device(choice)
    with pytest.raises(UserError, match=r"--gpus 2: .* sees 2 GPUs here"):
        choose_device("2")


def test_under_torchrun_each_process_takes_the_gpu_of_its_rank(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == choose_device(0) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"this machine has 1 GPU: use --nproc_per_node 1\."):
        choose_device()


@pytest.mark.parametrize("cuda, built", [("12.6", "for CUDA 12.6"), (None, "without CUDA")])
def test_a_gpu_that_pytorch_cannot_use_is_announced(tmp_path, monkeypatch, cuda, built):
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu_warnings() == []
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    (warning,) = cpu_warnings()
    assert "driver 470.82.01" in warning and built in warning and "THE CPU COMPUTES" in warning
    (tmp_path / "version").write_text("")
    assert "driver unknown" in cpu_warnings()[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert cpu_warnings() == []


@pytest.mark.parametrize(
    "load, threads, advice",
    [(0.2, 8, None), (0.6, 8, "about 1 of 8 cores busy"), (3.9, 8, "=4."), (20, 8, "=1."), (20, 1, None), (3, 4, None)],
)
def test_busy_cores_are_announced(tmp_path, monkeypatch, load, threads, advice):
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = cpu_warnings()
    assert found == [] if advice is None else len(found) == 1 and advice in found[0]


def test_usable_cores_are_those_of_the_job(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_strict_within_and_as_before_afterwards(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    with contextlib.suppress(KeyError), strict_float32():
        assert torch.backends.cudnn.allow_tf32 is False  # which libraries read, too
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is allowed


def test_a_process_alone_needs_no_others(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    device, rank, count = start_processes("cpu")
    assert (device.type, rank, count) == ("cpu", 0, 1) and not dist.is_initialized()
    x = torch.arange(3.0)
    assert sum_over_processes(x) is x and largest_over_processes(-2, device) == -2 and equal_over_processes(5, device)
    with pytest.raises(RuntimeError, match="gloo"), reports_lost_processes():
        raise RuntimeError("gloo is not in use, so this is a bug")


def test_a_process_of_torchrun_joins_the_others_and_reports_their_loss(monkeypatch):
    """With itself alone; tests of train.py run several."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    device, rank, count = start_processes("cpu")
    try:
        assert (device.type, rank, count, dist.get_backend()) == ("cpu", 0, 1, "gloo")
        x = torch.tensor([1.0, 2.0])
        assert sum_over_processes(x).tolist() == [1, 2] and sum_over_processes(x) is not x
        assert largest_over_processes(-2, device) == -2 and equal_over_processes(5, device)
        lost = r"another process .* is out of reach \(gloo: closed\); .* same command"
        with pytest.raises(UserError, match=lost), reports_lost_processes():
            raise RuntimeError("gloo: closed\nby peer")
        with pytest.raises(RuntimeError, match="a bug"), reports_lost_processes():
            raise RuntimeError("a bug")
    finally:
        end_processes()
    assert not dist.is_initialized()
    end_processes()
