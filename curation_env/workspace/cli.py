"""The command `curation`: readable text on stdout, or one JSON object with --json; errors go to stderr.

Exit status: 0 done; 1 it says no (a check that fails, a policy that was not scored); 2 it could not be done (wrong
usage, no host); 3 the ticket is not done yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import api
from .client import CHECK_BYTES, POLICY_BYTES, CurationError, request
from .render import history_table, outline, row_text, signal_summary

DONE, NO, FAILED, NOT_YET = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, say) has enough; keep the interpreter from complaining at exit
        return DONE
    except KeyboardInterrupt:
        return 130
    except KeyError as error:
        print(f"curation: {error.args[0]}", file=sys.stderr)
    except (CurationError, OSError, ValueError, TypeError) as error:
        print(f"curation: {error}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curation", description="Look at the task, its pool and the results so far; check and submit policies."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
        sub.set_defaults(run=run)
        return sub

    command("task", _task, "what is asked, and the budgets")
    command("history", _history, "the scores so far, the base model first")
    show = command("show", _show, "print rows of the pool; with -o also draw them")
    show.add_argument("rows", nargs="+", metavar="ROW", help="a row's id or its number from 0; - reads them from stdin")
    show.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="draw a contact sheet")
    signal = command("signal", _signal, "one number a row, computed on the host (charged); a summary of it")
    signal.add_argument("name", metavar="NAME", help='one of the task\'s signals, for example "loss"')
    signal.add_argument("-o", "--output", type=Path, metavar="FILE.npy", help="save the numbers, in the pool's order")
    check = command("check", _check, "what the gate says about a submission, before it is one; charges nothing")
    check.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="ids, one a line; what select() wrote if absent"
    )
    check.add_argument("--rewrites", type=Path, metavar="FILE", help='lines of {"id", "conversation"}')
    submit = command("submit", _submit, "submit a policy; prints its ticket at once")
    submit.add_argument("policy", type=Path, metavar="POLICY.py")
    submit.add_argument("--again", action="store_true", help="a new ticket where this very file has a result already")
    wait = command("wait", _wait, "wait for a ticket's result; may be stopped and started again")
    wait.add_argument("ticket", metavar="TICKET")
    wait.add_argument("--timeout", type=float, default=90.0, metavar="S", help="seconds to wait (default: 90)")
    card = command("card", _card, "read a method card, where the task has them")
    card.add_argument("name", metavar="NAME")
    return parser


def _emit(options: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value) if options.json else text)


def _task(options: argparse.Namespace) -> int:
    task = api.task()
    _emit(options, task, outline(task))
    return DONE


def _history(options: argparse.Namespace) -> int:
    history = api.history()
    _emit(options, {"history": history}, history_table(history))
    return DONE


def _show(options: argparse.Namespace) -> int:
    from .rows import find_rows

    names = [name for row in options.rows for name in (sys.stdin.read().split() if row == "-" else [row])]
    rows = find_rows(api.workspace() / "pool", names)
    if options.output:
        from .sheet import contact_sheet

        contact_sheet(rows, options.output)
    if options.json:
        for row in rows:
            row["image"] = row["image"] and {"path": row["image"]["path"], "bytes": len(row["image"]["bytes"])}
        print(json.dumps({"rows": rows, "sheet": str(options.output) if options.output else None}))
    else:
        print("\n\n".join(row_text(row) for row in rows))
        if options.output:
            print(f"\n{len(rows)} rows drawn to {options.output}")
    return DONE


def _signal(options: argparse.Namespace) -> int:
    values = api.signal(options.name)
    if options.output:
        import numpy as np

        with open(options.output, "wb") as stream:
            np.save(stream, values)
    summary = signal_summary(options.name, values)
    if options.output:
        summary["file"] = str(options.output)
    _emit(options, summary, outline(summary))
    return DONE


def _check(options: argparse.Namespace) -> int:
    folder = api.workspace() / api.SUBMISSION
    rewrites = options.rewrites
    if options.file is None and rewrites is None and (folder / "rewrites.jsonl").exists():
        rewrites = folder / "rewrites.jsonl"
    ids = options.file or folder / "ids.txt"
    if options.file is None and not ids.exists():
        raise ValueError("nothing is selected yet: name a file of ids, or call curation.select(ids) first")
    body = [_read(ids, CHECK_BYTES), _read(rewrites, CHECK_BYTES) if rewrites else b""]
    verdict: dict[str, Any] = request("check", body=body, timeout=None)[0]
    _emit(options, verdict, verdict.get("message") or outline(verdict))
    return DONE if verdict.get("passed") else NO


def _submit(options: argparse.Namespace) -> int:
    state: dict[str, Any] = request("submit", {"again": options.again}, [_read(options.policy, POLICY_BYTES)])[0]
    _emit(options, state, _ticket_text(state))
    return DONE


def _wait(options: argparse.Namespace) -> int:
    give_up = time.monotonic() + options.timeout
    while True:
        left = max(0.0, give_up - time.monotonic())
        state: dict[str, Any] = request("wait", {"ticket": options.ticket, "seconds": min(left, 10.0)})[0]
        if state["state"] == "done" or "note" in state or time.monotonic() >= give_up:
            break
    _emit(options, state, _ticket_text(state))
    if state["state"] != "done":
        return NOT_YET
    return DONE if state["result"].get("status") == "scored" else NO


def _card(options: argparse.Namespace) -> int:
    text: str = request("card", {"name": options.name})[0]
    _emit(options, {"name": options.name, "text": text}, text)
    return DONE


def _ticket_text(state: dict[str, Any]) -> str:
    """A ticket's result; before that, where it stands and the command to go on with."""
    head = f"{state['ticket']}: {state['state']}"
    if state["state"] == "done":
        result = state["result"]
        return f"{head} ({result.get('status', '?')})\n{result.get('message') or outline(result)}"
    if state["state"] == "waiting":
        head += f", number {state['position']} in the queue"
    progress = state.get("progress")
    if progress:
        head += "; " + ", ".join(f"{key} {value}" for key, value in progress.items())
    return f"{head}\n{state.get('note') or 'next: curation wait ' + state['ticket']}"


def _read(path: Path, limit: int) -> bytes:
    with open(path, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has over {limit:,} bytes")
    return data
