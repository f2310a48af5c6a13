"""What an agent is told: `scaffold(env, name)` puts a named scaffold around an environment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import yaml
from gymnasium.utils import RecordConstructorArgs

from curation_env.errors import CurationError
from curation_env.host import HostBackend
from curation_env.task import conf_dir

if TYPE_CHECKING:
    from jinja2 import Template

    from curation_env.envs.base import CurationEnv


class ScaffoldError(CurationError):
    """There is no such scaffold, or its prompt can't be rendered."""

    code = "scaffold"


def scaffold(env: gym.Env[Any, Any], name: str, **overrides: Any) -> gym.Env[Any, Any]:
    """Put the scaffold `conf/scaffold/<name>.yaml` around an environment; what Hydra's `scaffold=` group calls, too.

    Args:
        env: The environment, with all wrappers that the scaffold should be outside of.
        name: Name of the scaffold's file, for example "open_prompt".
        **overrides: Other values for keys of that file.

    Raises:
        ScaffoldError: Unknown name or key, or the prompt uses a variable that nothing defines.

    Example:
        >>> import gymnasium as gym
        >>> import curation_env
        >>> env = scaffold(gym.make("CurationBench-Mini-v0"), "open_prompt", extra="Write short policies.")
        >>> env.spec.additional_wrappers[-1].name
        'Scaffold'
    """
    settings = scaffold_settings(name)
    for key in overrides:
        if key not in settings or key == "name":
            known = [known for known in settings if known != "name"]
            raise ScaffoldError(f"scaffold {name!r} has no setting {key!r}{_hint(key, known)}: {', '.join(known)}")
    settings.update(overrides)
    prompt = settings.pop("prompt")
    return Scaffold(env, name=settings.pop("name"), prompt=prompt, variables=settings)


def scaffold_names() -> list[str]:
    """Names of the scaffold files, sorted."""
    return sorted(path.stem for path in (conf_dir() / "scaffold").glob("*.yaml"))


def scaffold_settings(name: str) -> dict[str, Any]:
    """The settings of a scaffold's file: `name`, `prompt` (a template beside it) and the template's own variables.

    Raises:
        ScaffoldError: There is no such file.
    """
    if name not in scaffold_names():
        raise ScaffoldError(f"no scaffold {name!r}{_hint(name, scaffold_names())}: {', '.join(scaffold_names())}")
    settings: dict[str, Any] = yaml.safe_load((conf_dir() / "scaffold" / f"{name}.yaml").read_text())
    return settings


class Scaffold(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Renders what an agent is told at the beginning, from a template in a data file.

    Actions, observations and rewards are the environment's. The text is `env.get_wrapper_attr("prompt")`, from `reset`
    on; it is journaled, so that a run's record says what its agent was told.

    Args:
        env: The environment.
        name: The scaffold's name.
        prompt: File name of a Jinja template in `conf/scaffold/`. It sees `task` (what `curation.task()` says in the
            sandbox) and `variables`; a variable that neither defines is an error.
        variables: The template's own variables.

    Raises:
        ScaffoldError: There is no such template, it is malformed, or it uses a variable that nothing defines.

    Example:
        >>> import gymnasium as gym
        >>> import curation_env
        >>> env = gym.make("CurationBench-Mini-v0")
        >>> env = Scaffold(env, name="mine", prompt="open_prompt.j2", variables={"extra": "Be brief."})
        >>> env.spec.additional_wrappers[-1].kwargs["name"]
        'mine'
    """

    def __init__(
        self, env: gym.Env[Any, Any], *, name: str, prompt: str, variables: Mapping[str, Any] | None = None
    ) -> None:
        given = dict(variables or {})
        RecordConstructorArgs.__init__(self, name=name, prompt=prompt, variables=given)
        gym.Wrapper.__init__(self, env)
        self.name = name
        self._variables = given
        self._template = _template(prompt, {"task", *given})
        self._prompt: str | None = None

    @property
    def prompt(self) -> str:
        """What the agent is told.

        Raises:
            ResetNeeded: It says how large the pool is, so there is none before `reset`.
        """
        if self._prompt is None:
            raise gym.error.ResetNeeded("call reset() first: the prompt describes the episode's task")
        return self._prompt

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        from jinja2 import UndefinedError

        observation, info = self.env.reset(seed=seed, options=options)
        core = cast("CurationEnv", self.env.unwrapped)
        try:
            self._prompt = self._template.render(task=HostBackend(core.episode).task(), **self._variables)
        except UndefinedError as error:
            raise ScaffoldError(f"the prompt of scaffold {self.name!r}: {error}") from error
        core.ledger.event("scaffold", name=self.name, prompt=self._prompt)
        return observation, info


def _template(file: str, defined: set[str]) -> Template:
    """A template of `conf/scaffold/`, checked for variables that are not in `defined`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound, meta

    folder = conf_dir() / "scaffold"
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        source = (folder / file).read_text()
        missing = meta.find_undeclared_variables(environment.parse(source)) - defined
        if missing:
            raise ScaffoldError(f"the prompt {file} uses {', '.join(sorted(missing))}, which nothing defines")
        return environment.get_template(file)
    except (OSError, TemplateNotFound) as error:
        raise ScaffoldError(f"no prompt {file!r} in {folder.name}/") from error
    except TemplateError as error:
        raise ScaffoldError(f"the prompt {file} is not a Jinja template: {error}") from error


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
