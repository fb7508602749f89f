"""The exchange between processes after rankings: their records, their errors and their spending."""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeVar

from accelerate.utils import gather_object

from ..chat.budget import Budget
from ..chat.joint_budget import JointBudget
from ..errors import RankerError

Record = TypeVar("Record")


def exchange(
    micro_batches: list[list[Record]], error: Exception | None, budget: Budget | JointBudget | None
) -> tuple[list[Record], RankerError | None]:
    """Exchange the records of all processes, and share out the rest of the budget.

    Every process must call this at the same time.

    Args:
        micro_batches: Records of this process, by micro-batch. All processes have equally many micro-batches.
        error: Error that ranking raised on this process.
        budget: Budget of the ranker, if it has one.

    Returns:
        The records in the order of the sampler, and the `RankerError` of this process or of another one, if any.

    Raises:
        Exception: `error`, if it is not a `RankerError`; or `RankerError` if ranking raised such an error on another
            process.
    """
    message = None if error is None else f"{type(error).__name__}: {error}"
    fatal = error is not None and not isinstance(error, RankerError)
    committed = None if budget is None else budget.committed
    gathered: list[tuple[str | None, bool, Any, list[list[Record]]]]
    gathered = gather_object([(message, fatal, committed, micro_batches)])
    if error is not None and fatal:
        raise error
    ranker_error = error if isinstance(error, RankerError) else None
    for process_index, (message, fatal, *_) in enumerate(gathered):
        if message is not None and (fatal or ranker_error is None):
            ranker_error = RankerError(f"The ranker failed on process {process_index}. {message}")
        if fatal and ranker_error is not None:
            raise ranker_error
    if budget is not None:
        budget.share_out([amount for *_, amount, _ in gathered if amount is not None])
    by_process = [batches for *_, batches in gathered]
    records = [record for at_once in zip(*by_process, strict=True) for record in chain.from_iterable(at_once)]
    return records, ranker_error
