"""Log warnings once."""

from __future__ import annotations

import logging


class OnceLogger:
    """Log each kind of warning once per instance of this class.

    `warning_once` of transformers compares whole messages, so it would repeat a warning whose numbers have changed.

    Args:
        logger: Logger of the module that warns.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged: set[str] = set()

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Log a warning unless one of the same kind has been logged.

        Args:
            kind: A word that identifies the warning.
            message: The message, with `%` placeholders.
            args: Values of the placeholders.
        """
        if kind not in self._logged:
            self._logged.add(kind)
            self._logger.warning(message, *args)
