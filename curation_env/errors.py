"""One table of everything that can go wrong: what it is called, whether it is retried, and what it costs the agent.

| error | cause | retried | counts as an iteration | reward valid |
|---|---|---|---|---|
| InvalidAction | the action is not one: wrong type, too large, not UTF-8 | no | after three free ones | yes (0) |
| PolicyFailed | the policy crashed, hit a limit, or selected nothing | no | after three free ones | yes (0) |
| InvalidSubmission | unknown ids, repeats, over budget, malformed rewrites | no | after three free ones | yes (0) |
| RejectedSubmission | the audit found evaluation leakage | no | after three free ones | yes (0) |
| RuleBreach | a scaffold's rule was broken | no | after three free ones | yes (0) |
| LimitExceeded | a budget of the episode is used up | no | no | yes (0) |
| MissingAssets | pool, student or suite not prepared | no | no | no: raised |
| TaskMismatch | an asset is not the one that the task pins | no | no | no: raised |
| UnsupervisedRow | a row without one supervised token reached the trainer | no | no | no: raised |
| NonFiniteLoss | the loss became NaN or infinite | no: it is deterministic | no | no: raised |
| WorkerDied, OutOfMemory, StageTimeout, StageFailed | training or evaluation did not finish | once | no | no: raised |
| JudgeUnavailable | the judge endpoint is dead or answers nonsense | once | no | no: raised |
| SandboxError, SandboxUnavailable, SandboxDied | the sandbox engine failed | once | no | no: raised |
| RunLocked | another process holds the run folder | no | no | no: raised |
| RunDiffers | a run is to be resumed with another task or other settings | no | no | no: raised |
| UnknownTask, TaskFileError | no such task file, or a wrong field in it (`task.py`) | no | no | no: raised |
| InvalidSetting | an option of the user's has a value that it can't have | no | no | no: raised |
| ScaffoldError | no such scaffold, or its prompt can't be rendered (`wrappers/scaffold.py`) | no | no | no: raised |
| PolicyFileError | an agent's policy file is not there or not text (`agents/policies`) | no | no | no: raised |
| NoSuchRun | no run in that folder, or nothing scored in it (`runs.py`) | no | no | no: raised |
| AgentDiverged | a resumed agent does not repeat what it did (`agents/base.py`) | no | no | no: raised |
| ReplayDiffers | a replay got other scores than were recorded (`agents/replay.py`) | no | no | no: raised |
| LedgerError | the record is damaged or can't be written (`journal.py`) | no | no | no: raised |

An error of the agent's is answered in the observation (`status`, `message`, `info["error"]`) and the episode goes on;
the others raise, because a broken machine must never look like a bad policy.
"""

from __future__ import annotations

from typing import ClassVar


class CurationError(Exception):
    """Base of every documented error.

    Attributes:
        code: Short stable name, the value of `info["error"]` and of the journal's `error` field.
        retry: Whether the harness tries once more before it gives up.
        details: Longer text for a person (a log's tail); never shown to the agent unless the error is the agent's.
    """

    code: ClassVar[str] = "error"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class AgentError(CurationError):
    """An error of the agent's own making: answered in the observation, charged after the free ones."""

    code = "agent_error"


class InvalidAction(AgentError):
    code = "invalid_action"


class PolicyFailed(AgentError):
    code = "policy_failed"


class InvalidSubmission(AgentError):
    code = "invalid_submission"


class RejectedSubmission(AgentError):
    code = "rejected_submission"


class RuleBreach(AgentError):
    code = "rule_breach"


class LimitExceeded(CurationError):
    code = "limit_exceeded"


class InvalidSetting(CurationError):
    code = "invalid_setting"


class MissingAssets(CurationError):
    code = "missing_assets"


class TaskMismatch(CurationError):
    code = "task_mismatch"


class UnsupervisedRow(CurationError):
    code = "unsupervised_row"


class NonFiniteLoss(CurationError):
    code = "non_finite_loss"


class RunLocked(CurationError):
    code = "run_locked"


class RunDiffers(CurationError):
    """A run can't be resumed: its scores were got under another task, or under other settings."""

    code = "run_differs"


class InfrastructureError(CurationError):
    """The machine failed, not the agent: retried once, then raised; never a score, never charged."""

    code = "infrastructure"
    retry = True


class WorkerDied(InfrastructureError):
    code = "worker_died"


class OutOfMemory(InfrastructureError):
    code = "out_of_memory"


class StageTimeout(InfrastructureError):
    code = "stage_timeout"


class StageFailed(InfrastructureError):
    code = "stage_failed"


class JudgeUnavailable(InfrastructureError):
    code = "judge_unavailable"


class SandboxError(InfrastructureError):
    code = "sandbox"


def by_code() -> dict[str, type[CurationError]]:
    """Every error class under its code, for turning a worker's reply back into the exception."""
    found: dict[str, type[CurationError]] = {}
    todo: list[type[CurationError]] = [CurationError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)
        todo.extend(cls.__subclasses__())
    return found
