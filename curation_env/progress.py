"""Live progress of whatever runs at the moment: a bar on a terminal, a plain line now and then elsewhere.

Everything that takes time reports dicts `{"stage", "done", "total", "unit"}` with, where known, `seconds_left`,
`rows` and `loss`. They come from several threads.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

#: Seconds between two plain lines of one stage.
PLAIN_SECONDS = 5.0


class Progress:
    """Shows progress while it is entered; call it with a progress dict.

    Args:
        quiet: Show nothing at all.
        stream: Where to show it; default: stderr, so that stdout holds results alone.

    Example:
        >>> with Progress(quiet=True) as progress:
        ...     progress({"stage": "train", "done": 3, "total": 10, "unit": "steps", "loss": 1.2})
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._stage = ""
        self._started = self._printed = 0.0
        self._finished = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies (of an environment's spec, in another process) show progress of their own."""
        return _copy, (self._quiet,)

    def __enter__(self) -> Progress:
        stream = self._stream or sys.stderr
        if not self._quiet and stream.isatty():
            self._bars = _bars(stream)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event; a new `stage` ends the one before."""
        if self._quiet:
            return
        with self._lock:
            started = event["stage"] != self._stage or self._finished
            if started:
                self._stage, self._started = event["stage"], time.monotonic()
                self._printed = self._started
            self._finished = bool(event.get("total")) and event["done"] >= event["total"]
            if self._bars is not None:
                self._draw(event, started)
            elif self._finished or not event["done"] or time.monotonic() - self._printed >= PLAIN_SECONDS:
                self._printed = time.monotonic()
                seconds = self._printed - self._started
                took = f", {seconds:.1f} s" if self._finished and not started else ""
                print(line(event) + took, file=self._stream or sys.stderr, flush=True)

    def _draw(self, event: dict[str, Any], started: bool) -> None:
        assert self._bars is not None
        if started:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(self._stage, figures="")
        total = event.get("total")
        self._bars.update(
            self._bars.task_ids[-1], completed=event["done"], total=total, figures=figures(event), refresh=started
        )


def line(event: dict[str, Any]) -> str:
    """An event as one plain line.

    Example:
        >>> line({"stage": "train", "done": 12, "total": 188, "unit": "steps", "loss": 1.234, "seconds_left": 4.1})
        'train: 12/188 steps, loss 1.234, 4 s left'
    """
    return f"{event['stage']}: {figures(event)}"


def figures(event: dict[str, Any]) -> str:
    """What an event counts: done of total, rows, loss, seconds left."""
    total = f"/{event['total']:,}" if event.get("total") else ""
    parts = [f"{event['done']:,}{total} {event.get('unit', '')}".rstrip()]
    if event.get("rows") is not None:
        parts.append(f"{event['rows']:,} rows")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("seconds_left"):
        parts.append(f"{event['seconds_left']:.0f} s left")
    return ", ".join(parts)


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
        # Results printed meanwhile go above the bar, unless they go to a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )


def _copy(quiet: bool) -> Progress:
    return Progress(quiet=quiet)
