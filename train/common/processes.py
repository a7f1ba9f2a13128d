"""Training in several processes (`torchrun`, `accelerate launch`): their number, and the main one."""

import os
from typing import TypeVar

T = TypeVar("T")


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def from_main_process(value: T) -> T:
    """The main process's value, in every process. The others wait for it."""
    if process_count() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    on_cuda = torch.cuda.is_available()
    PartialState(cpu=not on_cuda, backend=None if on_cuda else "gloo")
    (received,) = broadcast_object_list([value])
    return received
