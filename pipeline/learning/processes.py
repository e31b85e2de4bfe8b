"""The processes that train one model together: which of them this one is, and what they tell each other.

All of it works in a process that trains alone, where it does nothing.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def launched() -> int:
    """How many processes were started together with this one, which may not have found them yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, which each of them asks for."""
    if count() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def any_of(flag: bool) -> bool:
    """Whether the flag is set in one of the processes, each of which asks."""
    if count() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(summed(torch.tensor(int(flag), device=device)))


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def leave() -> None:
    """End of the work together."""
    if dist.is_initialized():
        dist.destroy_process_group()
