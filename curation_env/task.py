"""A task: pool x student x recipe x suite x budgets, read from one YAML file, hashed over what changes scores."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curation_env.errors import CurationError, InvalidSetting
from curation_env.pool import canonical_json
from curation_env.students import student_hash
from curation_env.submission import Budget


class UnknownTask(CurationError):
    code = "unknown_task"


class TaskFileError(CurationError):
    code = "task_file"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MiniPool(_Strict):
    """A generated pool of the miniature."""

    kind: Literal["mini"]
    world: int | Literal["by seed"] = Field(
        0, description="world of the miniature; 'by seed' draws one at every reset(seed=)"
    )
    scale: str = Field("mini", description="size of the miniature's pool and suite")
    hash: str | None = Field(None, description="the pool's hash, where it is frozen")
    generator: str | None = Field(None, description="hash of the world generator, where it is frozen")

    @property
    def label(self) -> str:
        """What a table shows."""
        return f"{self.kind}, world {self.world}, {self.scale}"


PublicKind = Literal["llava", "visionflan"]


class PublicPool(_Strict):
    """A pool made of public files, described in `conf/pool/<kind>.yaml`."""

    kind: PublicKind
    text: bool = Field(True, description="whether the rows without an image belong to it")

    @property
    def world(self) -> int:
        """There is one of each."""
        return 0

    @property
    def label(self) -> str:
        """What a table shows."""
        return self.kind if self.text else f"{self.kind}, rows with images"


#: Which pool: `kind` names what makes it, the other fields are its own.
PoolRef = Annotated[MiniPool | PublicPool, Field(discriminator="kind")]


class Limits(_Strict):
    """What one sandbox may use; going past it ends the command or the policy with a clear message."""

    shell_seconds: float = 120.0
    policy_seconds: float = 600.0
    memory_mb: int = 2048
    cpus: float = 1.0
    pids: int = 128
    disk_mb: int = 1024
    output_bytes: int = 1_000_000


class Budgets(_Strict):
    """What one episode may use; null means without limit. The environment truncates an episode that has used it up."""

    shell_commands: int | None = None
    curation_seconds: float | None = None
    wall_seconds: float | None = None
    cost: float | None = None


class Task(_Strict):
    """One task file under `conf/task/`, with the overrides of `gym.make`.

    Attributes:
        rows: Most rows of a submission. tokens: most supervised tokens, or None.
        suite: Name of a suite, or the path of a suite file of your own: it ends in `.yaml`.
        seeds: Training runs per iteration, with the first seeds of the recipe's list; scores are their mean.
        feedback: "split" shows scores on feedback items; "all" on all items (the published protocol).
        detail: What the agent sees of an iteration: scores, scores by category, or its own outputs by item.
        show_student: Whether the sandbox shows the init, read-only.
        max_episode_steps: Actions of an episode, of any kind; more than enough for a submission and its look-arounds.
        overrides: The overrides that move scores, for the displayed name.
    """

    name: str
    id: str | None = None
    family: Literal["mini", "llava"]
    pool: PoolRef
    student: str
    recipe: str
    suite: str
    suite_hash: str | None = None
    pinned_with: dict[str, str] = Field({}, description="libraries that the pinned hashes were made with")
    audit: str
    iterations: int = Field(ge=1)
    rows: int = Field(ge=1)
    tokens: int | None = Field(None, ge=1)
    repeats: bool = False
    rewrite: bool = False
    seeds: int = Field(1, ge=1)
    feedback: Literal["split", "all"] = "split"
    detail: Literal["scores", "categories", "items"] = "scores"
    show_student: bool = True
    signals: tuple[str, ...] = ("loss",)
    max_episode_steps: int = Field(200, ge=1)
    reference: str | None = None
    limits: Limits = Limits()
    budgets: Budgets = Budgets()
    overrides: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, **overrides: Any) -> Task:
        """Load `conf/task/<name>.yaml`; overrides that are None are left as the file has them.

        Args:
            name: A task's name, or the path of a task file of your own: it ends in `.yaml`.

        Raises:
            UnknownTask: No such file; the message names the nearest.
            TaskFileError: A field is unknown or has a wrong value.
        """
        if name.endswith(".yaml"):
            fields = _own_file(Path(name), "task")
        elif name in task_names():
            fields = _yaml("task", name)
        else:
            near = difflib.get_close_matches(name, task_names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownTask(f"no task {name!r}{hint} Tasks: {', '.join(task_names())}")
        given = {key: value for key, value in overrides.items() if value is not None}
        moved = tuple(f"{k}={given[k]}" for k in _MOVES_SCORES if k in given and given[k] != fields.get(k, _default(k)))
        try:
            task = cls.model_validate({**fields, **given, "overrides": moved})
            _ = task.training_seeds  # asks whether the recipe lists as many
            return task
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TaskFileError(f"task {name!r}: {where}: {first['msg']}") from error

    @property
    def title(self) -> str:
        """The displayed name: the task's, with every override that moves scores."""
        return f"{self.name}[{', '.join(self.overrides)}]" if self.overrides else self.name

    @functools.cached_property
    def hash(self) -> str:
        """sha256, in hex, over everything that changes a score of a given submission, and over its budget."""
        moving = {key: getattr(self, key) for key in ("rows", "tokens", "repeats", "rewrite", "seeds", "feedback")}
        parts = {
            **moving,
            "pool": self.pool.model_dump(),
            "student": self.student,
            "student_hash": student_hash(self.student),
            "recipe": self.recipe_config,
            "suite": self.suite_config,
            "suite_hash": self.suite_hash,
            "audit": self.audit_config,
        }
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    @property
    def recipe_config(self) -> dict[str, Any]:
        return _yaml("recipe", self.recipe)

    @property
    def suite_config(self) -> dict[str, Any]:
        from curation_env.evaluation.wording import resolved

        own = self.suite.endswith(".yaml")
        return resolved(_own_file(Path(self.suite), "suite") if own else _yaml("suite", self.suite))

    @property
    def suite_title(self) -> str:
        """The displayed version of the suite."""
        from curation_env.evaluation.wording import title

        return title(self.suite_config)

    @property
    def audit_config(self) -> dict[str, Any]:
        return _yaml("audit", self.audit)

    @functools.cached_property
    def benchmarks(self) -> list[str]:
        return list(self.suite_config["benchmarks"])

    @functools.cached_property
    def judge_free(self) -> list[str]:
        """The benchmarks that rules alone grade; a judge may drift, these can't."""
        return [name for name, benchmark in self.suite_config["benchmarks"].items() if not benchmark["judge"]]

    @property
    def training_seeds(self) -> list[int]:
        """The first `seeds` seeds of the recipe's list."""
        listed = self.recipe_config["seeds"]
        if self.seeds > len(listed):
            raise TaskFileError(f"seeds={self.seeds}, the recipe {self.recipe!r} lists {len(listed)}: ask for fewer")
        return list(listed[: self.seeds])

    @property
    def budget(self) -> Budget:
        return Budget(self.rows, self.tokens, self.repeats, self.rewrite)

    @property
    def reference_scores(self) -> dict[str, Any] | None:
        """Base, random and full on each part, from `curation-env calibrate`; None where nobody has measured them.

        They hold for the task as the file has it: an override that moves scores has no reference.
        """
        if self.reference is None or any(not text.startswith("feedback=") for text in self.overrides):
            return None
        return reference_scores(self.reference, self.pool.world)

    def drawn(self, world: int) -> Task:
        """The same task in one of the worlds that it draws.

        Raises:
            InvalidSetting: There is no such world, or the task has one world alone.
        """
        if self.pool.world != "by seed":
            raise InvalidSetting(f"task {self.name!r} has one world, so world={world} says nothing: try mini-worlds")
        return self.in_world(world)

    def in_world(self, world: int) -> Task:
        """The same task in one world of the miniature.

        Raises:
            InvalidSetting: There is no such world.
        """
        if world < 0:
            raise InvalidSetting(f"worlds are numbered from 0, not {world}")
        if not isinstance(self.pool, MiniPool):
            raise InvalidSetting(f"task {self.name!r} is not of the miniature, so world={world} says nothing")
        pinned = self.pool.hash if world == self.pool.world else None  # a task file pins its own world only
        pool = {**self.pool.model_dump(), "world": world, "hash": pinned}
        return Task.model_validate({**self.model_dump(), "pool": pool})  # a copy would keep the hash of this world


_MOVES_SCORES = ("rows", "tokens", "seeds", "feedback", "repeats")


def _default(field: str) -> Any:
    return Task.model_fields[field].default


def reference_scores(name: str, world: int | str) -> dict[str, Any] | None:
    """The shipped reference of one world, or None."""
    path = conf_dir() / "reference" / f"{name}.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text())["worlds"].get(str(world))


def put_reference(path: Path, world: int | str, reference: dict[str, Any]) -> None:
    """Put one world's reference into a file of the form that `conf/reference/` ships: {"worlds": {world: reference}}.

    Raises:
        InvalidSetting: The file is there and is of another form.
    """
    shipped: dict[str, Any] = {"worlds": {}}
    if path.exists():
        try:
            shipped = json.loads(path.read_text())
            shipped["worlds"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidSetting(f'{path} is not a file of references ({{"worlds": ...}}): name another') from error
    shipped["worlds"][str(world)] = reference
    path.write_text(json.dumps(shipped, indent=1) + "\n")


def conf_dir() -> Path:
    return Path(str(resources.files("curation_env.conf")))


@functools.cache
def task_names() -> list[str]:
    """Names of the task files, sorted."""
    return sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml"))


@functools.cache
def read_yaml(path: Path) -> dict[str, Any]:
    """A data file of the package, parsed once; what it holds is not to be changed."""
    return yaml.safe_load(path.read_text())


def _yaml(group: str, name: str) -> dict[str, Any]:
    path = conf_dir() / group / f"{name}.yaml"
    if not path.is_file():
        raise TaskFileError(f"no {group} {name!r}: expected {path.relative_to(conf_dir().parent)}")
    return copy.deepcopy(read_yaml(path))  # parsed once; what is handed out may be changed


def _own_file(path: Path, group: str) -> dict[str, Any]:
    """The fields of a task file or a suite file that does not ship with the package."""
    try:
        fields = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise (UnknownTask if group == "task" else TaskFileError)(f"no {group} file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskFileError(f"{group} file {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise TaskFileError(f"{group} file {path} holds no fields: it looks like those in conf/{group}/")
    return fields
