"""Where a run computes, and how exactly: `execution.device` and what torch leaves to a GPU's libraries."""

from __future__ import annotations

import torch


def uses_gpu(device: str) -> bool:
    """Whether execution.device = `device` (auto, cpu, cuda) means a GPU in this process."""
    return device != "cpu" and torch.cuda.is_available()


def torch_device(device: str) -> torch.device:
    """The CPU, or the GPU that is this process's."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu(device) else torch.device("cpu")


def set_arithmetic(precision: str) -> None:
    """Let what is computed in 32 bits on a GPU be so, in this process.

    By default cuDNN rounds the factors of an LSTM's and a convolution's products to 10 bits (TF32), which is left to it
    beside 16-bit products alone.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
