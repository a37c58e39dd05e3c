import os
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from utils import devices
from utils.devices import choose_device, cpu_warnings
from utils.files import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are two GPUs -> the list of those made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return current


@pytest.mark.parametrize("choice, number", [(None, 1), (0, 0), ("1", 1), ("1,0", 1)])
def test_the_chosen_gpu_becomes_the_current_one(gpus, choice, number):
    device = choose_device(choice)
    assert device == torch.device("cuda", number) and gpus == [device]


def test_cpu_is_taken_on_request_and_without_a_gpu(gpus, monkeypatch):
    assert choose_device("cpu") == torch.device("cpu") and gpus == []
    with pytest.raises(UserError, match=r"--gpus 2: PyTorch .* sees 2 GPUs here; omit --gpus"):
        choose_device(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as with a driver that is too old
    assert choose_device() == torch.device("cpu")
    with pytest.raises(UserError, match="sees 0 GPUs here"):
        choose_device(0)


@pytest.mark.parametrize("choice", ["all", "-1", "", "²", "cuda:0"])
def test_what_is_no_gpu_is_refused(gpus, choice):
    with pytest.raises(UserError, match=f"--gpus {choice}: give a GPU's number, such as 0, or cpu"):
        choose_device(choice)


def test_under_torchrun_each_process_takes_the_gpu_of_its_rank(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_device() == choose_device(1) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"this machine has 1 GPU: use --nproc_per_node 1\."):
        choose_device()


def set_load(monkeypatch, load, threads, cores=8):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


def test_a_gpu_that_pytorch_cannot_use_is_announced(tmp_path, monkeypatch):
    set_load(monkeypatch, 0, 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    assert cpu_warnings() == []
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (warning,) = cpu_warnings()
    assert "CUDA 13.0" in warning and "driver 470.82.01" in warning and "THE CPU COMPUTES" in warning
    assert cpu_warnings("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert cpu_warnings() == []


@pytest.mark.parametrize(
    "load, threads, cores, advice",
    [
        *((0.2, 8, 8, None), (0.6, 8, 8, " 1 of 8 cores"), (3.9, 8, 8, "=4."), (20, 8, 8, " 8 of 8 cores")),
        *((20, 1, 8, None), (3, 4, 8, None), (100, 8, 128, None), (124, 8, 128, " 4 of 8 cores")),
    ],
)
def test_busy_cores_are_announced(monkeypatch, load, threads, cores, advice):
    """This process may use 8 of the machine's."""
    set_load(monkeypatch, load, threads, cores)
    warnings = cpu_warnings("cpu")
    assert warnings == [] if advice is None else len(warnings) == 1 and advice in warnings[0]


@pytest.mark.parametrize("own", [True, False])
def test_devices_that_emulate_bfloat16_are_announced(monkeypatch, capsys, own):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or own)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: own, raising=False)
    for device, kind in (("cuda", "GPU"), ("cpu", "processor")):
        devices.print_warnings(torch.device(device), "cpu", bf16=True)
        assert (f"this {kind} only emulates bfloat16" in capsys.readouterr().out) != own


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_is_strict_within_and_as_before_afterwards(allowed, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(KeyError), devices.strict_float32():
            assert torch.backends.cudnn.allow_tf32 is False  # which libraries read, too
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.backends.cudnn.allow_tf32 is allowed and torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_program_that_has_set_the_precision_of_float32_keeps_it(monkeypatch):
    class Cudnn:
        benchmark = False
        allow_tf32 = property(Mock(side_effect=RuntimeError("mixed")))  # as after cudnn.conv.fp32_precision = "ieee"

    monkeypatch.setattr(torch.backends, "cudnn", Cudnn())
    with devices.strict_float32(benchmark=True):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("gloo: Connection closed\nby peer"),
        dist.DistBackendError("setting up NCCL communicator, but got error: Connection closed by peer"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error, Connection closed"),
    ],
)
def test_a_lost_process_is_reported(error, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    lost = r"another process .* is out of reach \(.*Connection closed.*\); .* same command"
    with pytest.raises(UserError, match=lost), devices.reports_lost_processes():
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), dist.DistBackendError("NCCL error\nLast error: /dev/shm is too small")]
)
def test_other_errors_of_several_processes_stay_as_they_are(error, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(type(error), match=str(error)), devices.reports_lost_processes():
        raise error
