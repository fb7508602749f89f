"""Report expected errors in one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from ..errors import CycleAlignError

# Errors that wrong arguments raise before the first step. Later on, any other error than ours is a bug: its traceback
# helps.
USAGE_ERRORS = (ValueError, RuntimeError, OSError, ImportError, yaml.YAMLError, CycleAlignError)


@contextmanager
def one_line_errors(prog: str, errors: tuple[type[Exception], ...] = USAGE_ERRORS) -> Iterator[None]:
    """Exit with status 1 and the error message in one line if one of `errors` is raised."""
    try:
        yield
    except errors as error:
        sys.exit(f"{prog}: error: {' '.join(str(error).split())}")
