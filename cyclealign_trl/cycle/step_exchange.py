"""The exchange between processes at the end of a step: their records, their errors and their spending."""

from __future__ import annotations

from itertools import chain

from accelerate.utils import gather_object

from ..chat.budget import Amount, Budget
from ..errors import RankerError
from .step_metrics import InteractionRecord


def exchange(
    micro_batches: list[list[InteractionRecord]], error: Exception | None, budget: Budget | None
) -> list[InteractionRecord]:
    """Return the records of all processes in the order of the sampler, and share out the rest of the budget.

    Every process must call this at the same time.

    Args:
        micro_batches: Records of this process, by micro-batch.
        error: Error that ranking raised on this process.
        budget: Budget of the ranker, if it has one.

    Raises:
        Exception: `error`, or `RankerError` if ranking raised on another process.
    """
    message = None if error is None else f"{type(error).__name__}: {error}"
    committed = None if budget is None else budget.committed
    gathered: list[tuple[str | None, Amount | None, list[list[InteractionRecord]]]]
    gathered = gather_object([(message, committed, micro_batches)])
    if error is not None:
        raise error
    for process_index, (message, *_) in enumerate(gathered):
        if message is not None:
            raise RankerError(f"The ranker failed on process {process_index}. {message}")
    if budget is not None:
        budget.share_out([amount for _, amount, _ in gathered if amount is not None])
    by_process = [batches for *_, batches in gathered]
    return [record for at_once in zip(*by_process, strict=True) for record in chain.from_iterable(at_once)]
