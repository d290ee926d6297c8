"""The one error that users see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import traceback
from pathlib import Path


class SpringtideError(Exception):
    """A fault in the user's input, settings or environment, told in one sentence.

    Jobs print the sentence and exit with status 1; HTTP answers it as a 4xx error body.
    """


def without_data(error: BaseException) -> str:
    """An error by its kind and the way to it: its text may repeat what a caller sent."""
    if isinstance(error, SpringtideError):
        return str(error)
    way = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}" + (f" at {' > '.join(way[-8:])}" if way else "")
