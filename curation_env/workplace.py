"""Where an agent works: the workspace folder of a run, and the sandbox over it, which may die and is then made anew."""

from __future__ import annotations

from pathlib import Path

from curation_env.assets import Assets
from curation_env.errors import SandboxError
from curation_env.ledger import Ledger
from curation_env.sandbox import SandboxKind, choose_kind, make_sandbox
from curation_env.sandbox.base import Mount, Sandbox, SandboxConfig, SandboxLimits
from curation_env.task import Task


class Workplace:
    """The workspace of a run and its sandboxes: the agent's own, and the fresh ones that policies run in.

    Args:
        feedback: Folder of what the agent is told.
        hidden: Host folders that no sandbox may show.
        sandbox: "auto" is decided once, here.
    """

    def __init__(
        self,
        task: Task,
        assets: Assets,
        run_dir: Path,
        feedback: Path,
        *,
        hidden: tuple[Path, ...],
        sandbox: SandboxKind,
        ledger: Ledger,
    ) -> None:
        self.task = task
        self.assets = assets
        self.run_dir = run_dir
        self.feedback = feedback
        self.hidden = hidden
        self.kind: SandboxKind = choose_kind() if sandbox == "auto" else sandbox
        self.ledger = ledger
        self.sandbox: Sandbox | None = None
        self.folder = run_dir / "workspace"
        self.folder.mkdir(exist_ok=True)

    def config(self, label: str, socket: Path) -> SandboxConfig:
        """What a sandbox shows and allows; policies get the same over a copy of the workspace."""
        limits = self.task.limits
        mounts = [Mount(self.assets.view / "rows", "/workspace/pool")]
        if self.task.show_student:
            mounts.append(Mount(self.assets.student, "/workspace/student"))
        mounts.append(Mount(self.feedback, "/workspace/feedback"))
        return SandboxConfig(
            workspace=self.folder,
            mounts=tuple(mounts),
            socket=socket,
            limits=SandboxLimits(
                memory_mb=limits.memory_mb,
                cpus=limits.cpus,
                pids=limits.pids,
                disk_mb=limits.disk_mb,
                output_bytes=limits.output_bytes,
            ),
            label=label,
            hidden=self.hidden,
        )

    def make(self, config: SandboxConfig) -> Sandbox:
        """A sandbox of this run's kind, not started."""
        return make_sandbox(self.kind, config)

    def living(self, socket: Path) -> Sandbox:
        """The agent's sandbox, thawed; one that died is made anew over the workspace, which outlives it.

        Raises:
            SandboxError: It did not start, twice.
        """
        for attempt in (1, 2):
            try:
                if self.sandbox is None or not self.sandbox.alive():
                    if self.sandbox is not None:
                        self.sandbox.stop()
                    self.sandbox = self.make(self.config(self.run_dir.name, socket))
                    self.sandbox.start()
                self.sandbox.thaw()
                return self.sandbox
            except SandboxError as error:
                self.lose(error)
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def lose(self, error: SandboxError) -> None:
        """Give up a sandbox that failed; the next is made when it is needed."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is not None:
            sandbox.stop()
        self.ledger.event("sandbox_failed", error=str(error))

    def freeze(self) -> None:
        """Let nothing run in the sandbox; one that can't be frozen is given up."""
        if self.sandbox is not None and self.sandbox.alive():
            try:
                self.sandbox.freeze()
            except SandboxError as error:
                self.lose(error)

    def thaw(self) -> None:
        if self.sandbox is not None:
            try:
                self.sandbox.thaw()
            except SandboxError as error:
                self.lose(error)

    def close(self) -> None:
        """Stop the sandbox; may be called twice."""
        if self.sandbox is not None:
            self.sandbox.stop()
        self.sandbox = None
