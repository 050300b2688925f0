"""Figures of a training as TensorBoard reads them."""

import contextlib
import secrets
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from pyrogen.inference.checkpoints import WriteError
from pyrogen.inference.fabric import Logger

__all__ = ["Events"]


class Events(Logger):
    """A file of events in a folder, written at once; where that fails, a warning says so and no more is written.

    TensorBoard's own writers leave that to a thread; where it dies of a full disk, the training waits for it forever.
    And they name files by the second, so that another of the same second is replaced.

    Args:
        folder: Where to; it is made when there is something to be written.
    """

    name, version = "logs", ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: RecordWriter | None = None
        self.failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write figures of a step."""
        if self.failed:
            return
        try:
            if self.file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"events.out.tfevents.{time.time():.0f}.{secrets.token_hex(8)}"
                self.file = RecordWriter(str(path))
                self.file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for name, value in metrics.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self.file.write(event.SerializeToString())
            self.file.flush()
        except OSError as error:
            self.failed = True
            why = WriteError.of(self.folder, error)
            warnings.warn(f"{why}. Training goes on without logs; history.csv has the same figures", stacklevel=2)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: they stand in ``run.yaml``."""

    def finalize(self, status: str) -> None:
        """Close the file, of which all is written, or nothing more can be."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
