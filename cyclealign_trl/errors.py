"""The errors that the package raises, all of them below one root:

```
CycleAlignError
├── BudgetExhaustedError   the ranker's budget is used up; a checkpoint was saved
├── CheckpointError        a checkpoint cannot be resumed from
├── RankerError            the ranker cannot answer at all: a wrong key, an unknown model, a refused request
└── TooManyFailuresError   more rankings failed than `max_ranking_failures` allows; a checkpoint was saved
```

Wrong arguments raise `ValueError` or `TypeError` where they are given, as in TRL. A single ranking that fails raises
nothing: it is a `RankingFailure`.
"""


class CycleAlignError(Exception):
    """Root of the package's own errors."""


class BudgetExhaustedError(CycleAlignError):
    """The ranker may spend no more."""


class CheckpointError(CycleAlignError, ValueError):
    """A checkpoint cannot be resumed from: it is torn, or of a run with other settings."""


class RankerError(CycleAlignError):
    """The ranker cannot answer, and asking again will not help."""


class TooManyFailuresError(CycleAlignError):
    """The share of failed rankings passed `max_ranking_failures`."""
