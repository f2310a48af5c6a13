"""What an episode remembers between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Invalid, rejected and breaching actions of an episode that cost nothing.
FREE_ERRORS = 3


@dataclass
class Iteration:
    """What one charged submission left behind; `scores` is None when it was charged without being scored."""

    number: int
    scores: dict[str, float] | None
    average: float | None
    stderr: float = 0.0
    commit: str = ""
    submission: str = ""
    n_rows: int = 0
    n_supervised_tokens: int = 0
    audit: dict[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass
class State:
    """Everything that an episode remembers; journaled after every step, so that a run can be continued.

    `tickets` are the names of those that wait; their policies are in the journal's `ticket` events.
    """

    seed: int
    iteration: int = 0
    free_errors: int = FREE_ERRORS
    history: list[Iteration] = field(default_factory=list)
    best: int = 0
    shell_commands: int = 0
    curation_seconds: float = 0.0
    priced_seconds: float = 0.0
    wall_seconds: float = 0.0
    cost: float = 0.0
    steps: int = 0
    awaiting_choice: bool = False
    finished: bool = False
    nominee: int | None = None
    tickets: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The state as `from_json` takes it. Its values are the state's own: for writing down, not for keeping."""
        return {**vars(self), "history": [vars(entry) for entry in self.history]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> State:
        history = [Iteration(**item) for item in record["history"]]
        return cls(**{**record, "history": history})
