"""Signals that ask a run to save and to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch

from fastdiff import distributed

AGREE_EVERY = 10  # updates after which several processes ask each other whether one was told to stop


class Interruption:
    """SIGINT and SIGTERM ask a run to save and to stop; a second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Interruption:
        self.came, self.agreed = False, False
        self.before: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = True
        print("\nstopping after this update; once more to stop at once", file=sys.stderr, flush=True)

    def asked(self, update: int) -> bool:
        """Whether to stop after this update; several processes agree on it every AGREE_EVERY updates, and at 0."""
        if distributed.world_size() == 1:
            return self.came
        if update % AGREE_EVERY == 0 and not self.agreed:
            self.agreed = bool(distributed.largest(torch.tensor(int(self.came))))
        return self.agreed
