"""The background thread that removes what an event log no longer keeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from springtide.errors import SpringtideError
from springtide.serving.store import HistoryStore
from springtide.serving.store_rows import Retention

log = logging.getLogger("springtide.serving")
EVERY_S = 600.0


def retain_in_background(store: HistoryStore, every_s: float = EVERY_S) -> Callable[[], None]:
    """Call `store.retain` again and again, first after `every_s`; returns what ends it.

    Every replica does so and the store lets one at a time: whichever comes first does the work. A store that keeps all
    gets no thread. A failure is logged and tried again.
    """
    stop = threading.Event()

    def retain() -> None:
        while not stop.wait(every_s):
            try:
                if removed := store.retain():
                    log.info("removed %d events that are no longer kept", removed)
            except SpringtideError as error:
                log.error("events that are no longer kept were not removed: %s", error)

    if store.retention != Retention():
        threading.Thread(target=retain, name="retention", daemon=True).start()
    return stop.set
