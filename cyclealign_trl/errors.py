"""Exceptions that the package raises.

```
CycleAlignError
├── BudgetExhaustedError   the ranker's budget is exhausted; the run saved a checkpoint first
├── CheckpointError        a run cannot resume from a checkpoint
├── PromptError            an upstream cannot answer this prompt: it is too long, or uses an unsupported option
├── RankerError            the ranker cannot answer any request: wrong key, unknown model, refused parameters;
│                          a run saved a checkpoint first, unless its first step failed
├── TooManyFailuresError   more rankings failed than `max_ranking_failures` allows; the run saved a checkpoint first
└── UpstreamError          an upstream cannot answer any prompt
```

Invalid arguments raise `ValueError` or `TypeError`, as in TRL. A single ranking that fails raises no exception: the
ranker returns a `RankingFailure`.
"""


class CycleAlignError(Exception):
    """Base class of the package's exceptions."""


class BudgetExhaustedError(CycleAlignError):
    """The ranker's budget is exhausted."""


class CheckpointError(CycleAlignError, ValueError):
    """A run cannot resume from a checkpoint, because it is incomplete or belongs to a run with other settings."""


class PromptError(CycleAlignError, ValueError):
    """An upstream cannot answer this prompt.

    Args:
        message: What is wrong.
        code: Machine-readable code, such as `"content_filter"`.
    """

    def __init__(self, message: str = "", code: str = "invalid_prompt") -> None:
        super().__init__(message)
        self.code = code


class RankerError(CycleAlignError):
    """The ranker cannot answer any request, and a retry would not help."""


class TooManyFailuresError(CycleAlignError):
    """The share of failed rankings exceeds `max_ranking_failures`."""


class UpstreamError(CycleAlignError):
    """An upstream cannot answer.

    Args:
        message: What is wrong.
        retry_after: Seconds to wait before another request, if the upstream has received too many. `None` for any
            other error.
    """

    def __init__(self, message: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
