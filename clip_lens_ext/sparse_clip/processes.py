"""One training in several processes, as `torchrun` starts them: each has its share of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from clip_lens_ext.errors import InputError

Said = TypeVar("Said")
_AT_ONCE: Final = 2**26  # bytes


@dataclass(frozen=True)
class Processes:
    """Which one of how many this process is.

    Attributes:
        rank: from 0; the process 0 writes and shows progress.
        n: processes.
    """

    rank: int
    n: int

    @classmethod
    def now(cls, device: torch.device | None = None) -> Processes:
        """Those of `torch.distributed`, or one alone where it was not begun.

        Args:
            device: of the model.

        Raises:
            InputError: NCCL, and a model that is not on this process' current device; it says what to call before.

        Example:
            >>> Processes.now()
            Processes(rank=0, n=1)
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1)
        if device is not None and dist.get_backend() == dist.Backend.NCCL:
            current = torch.device("cuda", torch.cuda.current_device())
            if torch.device(device.type, current.index if device.index is None else device.index) != current:
                raise InputError(
                    f"the model is on {device}, and NCCL uses {current}, the current device of process "
                    f"{dist.get_rank()}: call torch.cuda.set_device(rank) with the LOCAL_RANK of each process before "
                    "init_process_group, and load the model with device=f'cuda:{rank}'"
                )
        return cls(dist.get_rank(), dist.get_world_size())

    def loss(self) -> ClipLoss:
        """open_clip's loss, of the codes of all processes, with their gradients."""
        return ClipLoss(local_loss=False, gather_with_grad=True, rank=self.rank, world_size=self.n)

    def share(self, batch: Tensor, n_parts: int) -> Sequence[Tensor]:
        """This process' share of a batch, in equal parts.

        Raises:
            InputError: the batch does not divide into equal parts: each process has to wait for as many as the others.
        """
        if len(batch) % (self.n * n_parts):
            raise InputError(
                f"a batch of {len(batch)} does not divide into {self.n} processes times {n_parts} parts: pass a "
                "batch_size that does"
            )
        return batch.chunk(self.n)[self.rank].chunk(n_parts)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over the processes: the gradient of the batch, since each has computed the loss of all of it."""
        if self.n == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.n

    def mean(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The means over the processes of some numbers."""
        if self.n == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        return (found / self.n).tolist()

    def gathered(self, own: Said) -> list[Said]:
        """What each process says, in their order."""
        found: list[Said] = [own] * self.n
        if self.n > 1:
            dist.all_gather_object(found, own)
        return found

    def told(self, own: Any) -> Any:
        """What process 0 says, in all of them."""
        found = [own]
        if self.n > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def share_rows(self, rows: Tensor, device: torch.device) -> None:
        """Fill `rows` with those of process 0, over a device, some at a time."""
        if self.n == 1 or rows.numel() == 0:
            return
        at_once = max(1, _AT_ONCE // (rows[0].numel() * rows.element_size()))
        for part in rows.split(at_once):
            sent = part.to(device).contiguous()
            dist.broadcast(sent, src=0)
            if self.rank:
                part.copy_(sent)

    def wait(self) -> None:
        """Until all are here."""
        if self.n > 1:
            dist.barrier()
