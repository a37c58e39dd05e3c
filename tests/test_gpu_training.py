"""What training does on a GPU, as far as a CPU can tell: fake CUDA tensors and counted reads."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ablations
import train
from tests.conftest import make_pairs
from tests.test_train import arguments

# In older releases, the fake CUDA tensors of a CUDA build ask for a driver, too.
needs_fake_cuda = pytest.mark.skipif(not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="needs a newer PyTorch")
ON_CUDA = [pytest.param("cuda", name, marks=needs_fake_cuda) for name in (*ablations.NETWORKS, "inr_coordinate_random")]


class CountsReads(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor, for which it waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_longer_training_reads_no_more_numbers(narrow_weights, tmp_path, monkeypatch):
    check_losses, checks, counts = train.Trainer.check_losses, [], []

    def check(trainer):
        checks.append(len(trainer.unchecked))
        check_losses(trainer)

    monkeypatch.setattr(train.Trainer, "check_losses", check)
    for steps in (2, 4):
        pairs = make_pairs(tmp_path / str(steps), count=steps)
        options = [*arguments(pairs, narrow_weights, tmp_path), "--session", str(steps), "--batch_size", "1"]
        trainer = train.Trainer(train.parse_args([*options, "--ema", "0.9", "--clip_grad", "1"]))
        trainer.check_steps, checks[:] = train.CHECK_STEPS, []
        with CountsReads() as reads:
            trainer.train_epoch()
        assert checks == [steps]  # at the end of the epoch
        counts.append(reads.count)
    assert counts[0] == counts[1]


def moved_to_fake(module, device):
    """The same module with tensors of a device that have no data; to be called under FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in [entry for entry in tensors.items() if entry[1] is not None]:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                tensors[name] = torch.nn.Parameter(fake, tensor.requires_grad) if name in part._parameters else fake
    return module


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("device, network", [("cpu", "NeRD-Rain"), *ON_CUDA])
def test_a_training_step_never_waits_for_its_device(pairs_folder, tmp_path, monkeypatch, device, network, bf16):
    """A fake tensor cannot be read, nor copied or joined with one of another device. In PyTorch built for CUDA,
    autograd's engine asks for a driver when it meets a CUDA tensor: there the backward pass only fills in gradients."""
    options = [*arguments(pairs_folder, None, tmp_path), "--num_blocks", "1", "1", "1", "--ema", "0.9"]
    options += ["--clip_grad", "1", "--model" if network in ablations.NETWORKS else "--ablation", network]
    trainer = train.Trainer(train.parse_args([*options, *["--bf16"] * bf16]))
    batch, backward, dtypes = next(iter(trainer.train_loader)), torch.Tensor.backward, []

    def fake_backward(loss):
        assert loss.device.type == device and loss.dtype == torch.float32
        if device == "cpu":
            backward(loss)
        for parameter in trainer.net.parameters() if device == "cuda" else ():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", fake_backward)
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    monkeypatch.setattr(torch, "tensor", None)  # copies numbers to its device, for which the host waits
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # or autocast is off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode() as mode:
        trainer.device = torch.device(device)
        for name in ("net", "ema", "loss"):
            moved_to_fake(getattr(trainer, name), device)
        trainer.optimizer = torch.optim.Adam(trainer.net.parameters(), fused=True)
        trainer.sums = torch.zeros(5, dtype=torch.float64, device=device)
        trainer.net.output_max.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        batch = {name: mode.from_tensor(value) if torch.is_tensor(value) else value for name, value in batch.items()}
        assert trainer.train_step(batch)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]
    assert len(trainer.optimizer.state) == sum(parameter.requires_grad for parameter in trainer.net.parameters())
    assert trainer.unchecked[0][2].device.type == trainer.sums.device.type == device
