"""The progress display: plain lines off a terminal, a bar on one, nothing when quiet."""

from __future__ import annotations

import copy
import io
import os
import pickle
import pty
import subprocess
import sys

from curation_env.progress import Progress, line


def event(done, stage="train", **more):
    return {"stage": stage, "done": done, "total": 200, "unit": "steps", **more}


def test_plain_lines_at_the_start_and_the_end_of_a_stage():
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for done in range(0, 201, 10):
            progress(event(done, rows=3200, loss=1.23456, seconds_left=(200 - done) / 10))
        progress({"stage": "policy", "done": 0, "total": 1, "unit": "runs"})
        progress(event(0))
        progress(event(200))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 0/200 steps, 3,200 rows, loss 1.235, 20 s left"
    assert lines[1].startswith("train: 200/200 steps, 3,200 rows, loss 1.235, 0.")
    assert lines[2] == "policy: 0/1 runs"
    assert lines[3] == "train: 0/200 steps"
    assert len(lines) == 5
    assert "\x1b" not in stream.getvalue()


def test_quiet_and_odd_events():
    stream = io.StringIO()
    with Progress(quiet=True, stream=stream) as progress:
        progress(event(1))
    assert stream.getvalue() == ""
    assert line({"stage": "audit", "done": 1200, "total": None, "unit": "rows"}) == "audit: 1,200 rows"


def test_copies_are_fresh():
    progress = Progress(quiet=True)
    for other in (copy.deepcopy(progress), pickle.loads(pickle.dumps(progress))):
        assert other is not progress
        other(event(1))


def test_a_bar_on_a_terminal():
    code = (
        "import time\nfrom curation_env.progress import Progress\n"
        "with Progress() as progress:\n"
        "    for done in range(5):\n"
        "        progress({'stage': 'train', 'done': done, 'total': 5, 'unit': 'steps', 'loss': 0.5})\n"
        "        time.sleep(0.1)\n"
        "    progress({'stage': 'evaluate', 'done': 1, 'total': 8, 'unit': 'items'})\n"
        "    print('a result')\n"
    )
    host, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(host, 65536)
        except OSError:  # the terminal's other side is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(host)
    assert process.wait() == 0
    text = shown.decode()
    assert "train" in text
    assert "/5 steps, loss 0.500" in text
    assert "evaluate" in text
    assert "a result" in text
    assert "\x1b[" in text
