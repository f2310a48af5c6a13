"""The statuses of a step, in the order of their numbers in an observation."""

STATUSES = (
    "ready",
    "shell_ok",
    "shell_failed",
    "scored",
    "invalid",
    "rejected",
    "breach",
    "limit",
    "finished",
)
