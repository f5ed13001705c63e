"""Where a run computes, and how exactly: `execution.device` and what torch leaves to a GPU's libraries."""

from __future__ import annotations

import logging
import os
import socket

import torch

from scaling.errors import UnreachableError, UserError
from scaling.gpus import has_driver, visible_gpus

log = logging.getLogger(__name__)


def uses_gpu(device: str) -> bool:
    """Whether execution.device = `device` (auto, cpu, cuda) means a GPU in this process."""
    return device != "cpu" and torch.cuda.is_available()


def torch_device(device: str) -> torch.device:
    """The CPU, or the GPU that is this process's."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu(device) else torch.device("cpu")


def set_arithmetic(precision: str) -> None:
    """Let what is computed in 32 bits on a GPU be so, in this process.

    By default cuDNN rounds the factors of an LSTM's and a convolution's products to 10 bits (TF32), which is left to it
    beside 16-bit products alone. So do other products where a container's environment asks for it.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


def name_of(device: str) -> str:
    """What this process computes on, the same for no two GPUs; "" for the CPU."""
    if not uses_gpu(device):
        return ""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{gpu.name} {gpu.uuid} of {socket.gethostname()}"


def require_gpu(device: str, gpus_per_node: int) -> None:
    """UnreachableError where a job has GPUs that torch does not see: it would train on the CPU all the while."""
    if gpus_per_node and device != "cpu" and not torch.cuda.is_available():
        raise UnreachableError(
            f"torch sees no GPU on {socket.gethostname()}, where the job has {gpus_per_node} a node: it is built "
            f"{_built_for()}, CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}; check the driver "
            "and the container (--nv), install a torch build for that driver, or take execution.device=cpu"
        )


def warn_of_idle_gpu(device: str) -> None:
    """Say in a line that a run takes the CPU beside a GPU that torch cannot use, where nobody has asked for that."""
    is_hidden = "CUDA_VISIBLE_DEVICES" in os.environ and not visible_gpus()
    if device == "auto" and not is_hidden and has_driver() and not torch.cuda.is_available():
        log.warning(
            "this machine has an NVIDIA GPU that torch, built %s, cannot use: training on the CPU; install a torch "
            "build for your driver, or say execution.device=cpu",
            _built_for(),
        )


def require_bf16() -> None:
    """UserError where this process's GPU has no bf16 of its own: torch would compute it in 32 bits, slowly."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"train.precision = bf16: expected a GPU that has it (compute capability 8.0 or later), and this is a "
            f"{torch.cuda.get_device_name()}: take fp32 or fp16"
        )


def shun_broken_links() -> None:
    """Keep NCCL from links that these GPUs have with this driver in name alone; Accelerate refuses them otherwise.

    Of the RTX 40 series with drivers before 550.40: peer to peer and InfiniBand.
    """
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    if all(name in os.environ for name in names):
        return
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in names:
            os.environ.setdefault(name, "1")
        log.info("GPUs of the RTX 40 series with a driver before 550.40: %s are set to 1", " and ".join(names))


def _built_for() -> str:
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
