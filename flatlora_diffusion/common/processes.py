"""Several processes of one command, started by `accelerate launch` or `torchrun`, that share its work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from flatlora_diffusion.common.errors import ToldElsewhereError, UserError

Produced = TypeVar("Produced")
Unit = TypeVar("Unit")

# Some wait while another draws or measures, which takes longer than the libraries' ten minutes. A process
# that has died is noticed by the launcher.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work. They meet in `gather`, and so must all call it as often.

    Attributes:
        rank: Its number, 0 for the main process.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one takes locks, tells how it goes, and writes what there is one of."""
        return self.rank == 0

    def gather(self, value: Produced) -> list[Produced]:
        """What each process gives, by rank, when all have come so far.

        Raises:
            ToldElsewhereError: One of them has failed, and tells of it (see `together`).
        """
        everybody = self._meet(value, failed=False)
        for rank, (_, failed) in enumerate(everybody):
            if failed:
                raise ToldElsewhereError(f"process {rank} has failed")
        return [given for given, _ in everybody]

    def from_main(self, produce: Callable[[], Produced]) -> Produced:
        """What the main process makes, on every process.

        Raises:
            ToldElsewhereError: As `gather`.
        """
        return cast("Produced", self.gather(produce() if self.is_main else None)[0])

    def turns(self, units: Sequence[Unit]) -> Iterator[Unit | None]:
        """Round by round the unit of work that is this process's; None where the last round has none for it.

        Args:
            units: The same in all processes. After each the caller gathers, so that all stay together.
        """
        for start in range(0, len(units), self.count):
            own = start + self.rank
            yield units[own] if own < len(units) else None

    @contextlib.contextmanager
    def together(self) -> Generator[Processes]:
        """After the block all go on, when all have come to its end, or none does.

        What one raises in the block, it raises. The others raise `ToldElsewhereError` when they next meet it,
        so that an error ends all processes, and is told once.
        """
        try:
            yield self
            self.gather(None)
        except ToldElsewhereError:
            raise
        except Exception as error:
            first = next(rank for rank, (_, failed) in enumerate(self._meet(None, failed=True)) if failed)
            if first != self.rank:
                raise ToldElsewhereError(str(error)) from error
            raise

    def _meet(self, value: Any, *, failed: bool) -> list[tuple[Any, bool]]:
        if self.count == 1:
            return [(value, failed)]
        from torch import distributed

        everybody: list[Any] = [None] * self.count
        try:
            cast("Any", distributed).all_gather_object(everybody, (value, failed))  # it has no types
        except RuntimeError as error:  # the launcher says which, and why
            raise ToldElsewhereError("another process has ended") from error
        return everybody


ALONE = Processes()


def met() -> Processes:
    """The processes of this command that have met already; `ALONE` where there are no others."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return Processes(distributed.get_rank(), distributed.get_world_size())
    return ALONE


@contextlib.contextmanager
def joined() -> Generator[Processes]:
    """Within the block the processes of a launcher know each other, and end `together`; often there is one.

    Each has the GPU of its own that `cuda` means then.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    # Inside: command lines that run alone are parsed before torch is imported.
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed = torch.distributed
    begun = not distributed.is_initialized()
    if begun:  # by way of the CPU: they send each other words, not tensors
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        with met().together() as processes:
            yield processes
    finally:
        if begun:
            distributed.destroy_process_group()


def require_shared(what: str, where: str, missing: int) -> None:
    """Refuse to go on where work of other processes cannot be seen by the main one.

    Args:
        what: They have made.
        where: The flag and the folder.
        missing: How many aren't there.

    Raises:
        UserError: There are such.
    """
    if missing:
        raise UserError(
            f"{where}: {missing} {what} of other processes aren't there; all machines must share this folder "
            "and have the same base and adapters"
        )
