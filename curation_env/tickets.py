"""Tickets: policies that wait to be played as POLICY actions, and what came of them.

Submitting and waiting are apart because an iteration outlives the shell tools of real clients: a ticket is named by the
policy's bytes, so submitting the same bytes again (after a killed command, say) finds the same ticket and charges
nothing, and any number of waiters may come and go.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from curation_env.errors import InvalidAction, LimitExceeded
from curation_env.workspace.client import POLICY_BYTES

MAX_WAITING = 16
MAX_DONE = 1_000

DEFERRED_NOTE = "it becomes the next POLICY action, once this shell command is over: an empty POLICY takes the oldest"


class Ticket(NamedTuple):
    """A ticket taken: its name and the policy's source."""

    name: str
    policy: str


@dataclass
class _Record:
    policy: str
    state: Literal["waiting", "running", "done"] = "waiting"
    progress: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None


def ticket_name(policy: bytes) -> str:
    """The ticket of these bytes, the same on every host."""
    return "t-" + hashlib.blake2b(policy, digest_size=8).hexdigest()


class Tickets:
    """A queue of submitted policies, safe to use from any thread.

    Attributes:
        deferred: True (the default) while tickets are played only between commands, so that waiting for one inside a
            command could never end: `wait` then answers at once. Whoever plays tickets while the agent's commands run
            sets it to False.
    """

    def __init__(self) -> None:
        self.deferred = True
        self._records: dict[str, _Record] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._over = ""

    def submit(self, policy: bytes, again: bool = False) -> dict[str, Any]:
        """Queue a policy and return its ticket's state; bytes that have a ticket keep it.

        Args:
            policy: The script, UTF-8, at most `POLICY_BYTES`.
            again: Where these bytes' ticket is done, open a new one (suffix -2, -3, ...): a policy that reads files of
                the workspace may select other rows now.

        Raises:
            InvalidAction: Empty, too large or not UTF-8.
            LimitExceeded: `MAX_WAITING` tickets wait already, or no more are played (`end`).
        """
        if not policy.strip() or len(policy) > POLICY_BYTES:
            raise InvalidAction(f"a policy is a script of 1 to {POLICY_BYTES:,} bytes, not {len(policy):,}")
        try:
            source = policy.decode()
        except UnicodeDecodeError as error:
            raise InvalidAction(f"the policy is not UTF-8 text (byte {error.start})") from error
        with self._changed:
            name = first = ticket_name(policy)
            count = 1
            while again and (known := self._records.get(name)) is not None and known.state == "done":
                count += 1
                name = f"{first}-{count}"
            if name not in self._records:
                if self._over:
                    raise LimitExceeded(self._over)
                if len(self._waiting()) >= MAX_WAITING:
                    raise LimitExceeded(f"{MAX_WAITING} submitted policies wait already: wait for one of them first")
                self._records[name] = _Record(source)
                self._changed.notify_all()
            return self._state(name)

    def next_ticket(self, timeout: float = 0.0) -> Ticket | None:
        """Take the oldest waiting ticket, which is then running; None if none came within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._waiting()), timeout)
            waiting = self._waiting()
            if not waiting:
                return None
            record = self._records[waiting[0]]
            record.state = "running"
            self._changed.notify_all()
            return Ticket(waiting[0], record.policy)

    def waiting(self) -> list[Ticket]:
        """The tickets that wait, the oldest first."""
        with self._changed:
            return [Ticket(name, self._records[name].policy) for name in self._waiting()]

    def put_back(self, ticket: Ticket) -> None:
        """Have a ticket that was taken wait again, before all others: it could not be played to its end."""
        with self._changed:
            self._records.pop(ticket.name, None)
            self._records = {ticket.name: _Record(ticket.policy), **self._records}
            self._changed.notify_all()

    def restore(self, ticket: Ticket) -> None:
        """Have a ticket of an episode's earlier life wait, after all others, under its old name."""
        with self._changed:
            self._records[ticket.name] = _Record(ticket.policy)
            self._changed.notify_all()

    def end(self, reason: str) -> None:
        """Answer every ticket that waits with an error and take no more: no policy is played from now on."""
        with self._changed:
            self._over = reason
            waiting = self._waiting()
        for name in waiting:
            self.resolve(name, {"status": "error", "error": LimitExceeded.code, "message": reason})

    def update(self, name: str, progress: Mapping[str, Any]) -> None:
        """Show waiters how far a running ticket is: plain JSON, such as a stage's progress line."""
        with self._changed:
            if name in self._records:
                self._records[name].progress = dict(progress)

    def resolve(self, name: str, result: Mapping[str, Any]) -> None:
        """Record what came of a ticket (plain JSON: status, message, scores, ...) and wake its waiters.

        A name that is not known is recorded too: so a resumed episode answers for the tickets of its earlier life.
        """
        with self._changed:
            self._records.pop(name, None)  # back in as the newest: the oldest results are forgotten first
            self._records[name] = _Record("", "done", result=dict(result))
            done = [known for known, record in self._records.items() if record.state == "done"]
            for forgotten in done[:-MAX_DONE]:
                del self._records[forgotten]
            self._changed.notify_all()

    def wait(self, name: str, seconds: float = 0.0) -> dict[str, Any]:
        """The state of a ticket, as soon as it is done or `seconds` are over.

        Raises:
            InvalidAction: There is no such ticket.
        """
        give_up = time.monotonic() + (0.0 if self.deferred else seconds)
        with self._changed:
            while True:
                state = self._state(name)
                left = give_up - time.monotonic()
                if state["state"] == "done" or left <= 0 or self._closed:
                    return state
                self._changed.wait(left)

    def close(self) -> None:
        """Wake everyone who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _waiting(self) -> list[str]:
        return [name for name, record in self._records.items() if record.state == "waiting"]

    def _state(self, name: str) -> dict[str, Any]:
        record = self._records.get(name)
        if record is None:
            raise InvalidAction(
                f"no ticket {name[:80]!r} here: submit the policy (the same file gives the same ticket)"
            )
        state: dict[str, Any] = {"ticket": name, "state": record.state}
        if record.state == "waiting":
            state["position"] = self._waiting().index(name) + 1
        if record.progress and record.state == "running":
            state["progress"] = dict(record.progress)
        if record.result is not None:
            state["result"] = dict(record.result)
        elif self.deferred:
            state["note"] = DEFERRED_NOTE
        return state
