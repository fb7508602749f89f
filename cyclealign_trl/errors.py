"""The errors that the package raises, all of them below one root:

```
CycleAlignError
├── BudgetExhaustedError   the ranker's budget is used up; a checkpoint was saved
├── CheckpointError        a checkpoint cannot be resumed from
├── PromptError            an upstream cannot answer a prompt as it is: it is too long, or says what is not taken
├── RankerError            the ranker cannot answer at all: a wrong key, an unknown model, a refused request
├── TooManyFailuresError   more rankings failed than `max_ranking_failures` allows; a checkpoint was saved
└── UpstreamError          an upstream cannot answer at all
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


class PromptError(CycleAlignError, ValueError):
    """An upstream cannot answer a prompt as it is."""


class RankerError(CycleAlignError):
    """The ranker cannot answer, and asking again will not help."""


class TooManyFailuresError(CycleAlignError):
    """The share of failed rankings passed `max_ranking_failures`."""


class UpstreamError(CycleAlignError):
    """An upstream, whose answers an aligner was to correct, did not answer."""
