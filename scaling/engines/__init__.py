"""Engines: how a global batch becomes one optimiser step, on one process or on many.

A global batch is V micro-batches, of which a rank computes its share one after another. What
the engines have in common is what a step means: the mean over the V losses, its gradient, one
step of the optimiser, and running norm statistics that took in every norm batch in the order
of the micro-batches. How the ranks add up differs:

    DataParallel   one process, or DistributedDataParallel through Accelerate: fast, and equal over world
                   sizes up to the rounding of sums
    FixedOrder     gradients, losses and statistics of every micro-batch gathered and added in one order
                   (execution.audit): bit for bit the same on any world size, for checking the others
    ZeRO           DeepSpeed's stages 0 to 3 through Accelerate (execution.zero_stage): optimiser state,
                   gradients and parameters cut into parts, one a rank
"""

from __future__ import annotations

import torch

from scaling.config import RunConfig
from scaling.device import require_bf16, shun_broken_links, uses_gpu
from scaling.engines.base import Engine
from scaling.engines.data_parallel import DataParallel
from scaling.engines.fixed_order import FixedOrder
from scaling.engines.zero import ZeRO
from scaling.errors import UserError
from scaling.processes import Processes


def make_engine(config: RunConfig, processes: Processes) -> Engine:
    """The engine that the execution settings ask for; UserError for what they cannot have here."""
    execution = config.execution
    on_gpu = uses_gpu(execution.device)
    if execution.device == "cuda" and not on_gpu:
        raise UserError("execution.device = cuda: torch finds no GPU here; take execution.device=auto")
    if execution.audit and on_gpu:
        raise UserError(
            "execution.audit: sums on a GPU have no order that is always the same; take execution.device=cpu"
        )
    if execution.zero_stage is not None and not on_gpu and torch.cuda.is_available():
        raise UserError(
            f"deepspeed takes the GPU of a machine that has one, whatever execution.device = {execution.device} says; "
            "hide it with CUDA_VISIBLE_DEVICES="
        )
    if config.train.precision == "fp16" and not on_gpu:
        raise UserError("train.precision = fp16 needs a GPU and torch finds none: take bf16 or fp32")
    if on_gpu:
        if config.train.precision == "bf16":
            require_bf16()
        shun_broken_links()
    if execution.zero_stage is not None:
        return ZeRO(config, processes)
    return FixedOrder(config, processes) if execution.audit else DataParallel(config, processes)
