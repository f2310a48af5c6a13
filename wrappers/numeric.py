"""Numbers in place of text: actions and observations for reinforcement learning and for search."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from curation_env import actions
from curation_env.errors import InvalidAction
from curation_env.mixture import mixture_policy

if TYPE_CHECKING:
    from curation_env.envs.base import CurationEnv

Array = np.ndarray[Any, np.dtype[np.float32]]


class MixtureAction(gym.ActionWrapper[Any, np.ndarray, Any], RecordConstructorArgs):
    """An action is a mixture over the pool's sources: a few numbers that become a real policy script.

    The action is a `Box(-1, 1, (sources + 1,))`. Each of its first values weighs a source, the largest source first
    (names break ties): -1 leaves it out, 1 is the most, equal values are equal shares. The last value cuts noise:
    above 0 it leaves out that much of `max_cut` of each source's rows, those with the highest loss under the init;
    at 0 and below nothing is cut and no signal is read or charged. All zeros is the balanced mixture.

    The script is what an agent could have written itself: readable Python over `curation`, run in the sandbox, audited,
    charged and recorded as any other policy.

    Args:
        env: The environment, a task of any family.
        sources: Sources of the task's pools; 14 in every world of the miniature.
        max_cut: Largest share of a source's rows that is cut, from 0 to below 1.

    Raises:
        ValueError: `sources` or `max_cut` is out of range.

    Example:
        >>> from curation_env import envs
        >>> env = MixtureAction(envs.make("nano"))
        >>> env.action_space
        Box(-1.0, 1.0, (15,), float32)
    """

    def __init__(self, env: gym.Env[Any, Any], sources: int = 14, max_cut: float = 0.5) -> None:
        if sources < 1 or not 0 <= max_cut < 1:
            raise ValueError(f"sources must be at least 1 and max_cut in [0, 1), not {sources} and {max_cut}")
        RecordConstructorArgs.__init__(self, sources=sources, max_cut=max_cut)
        gym.ActionWrapper.__init__(self, env)
        self.action_space = spaces.Box(-1.0, 1.0, (sources + 1,), np.float32)
        self.max_cut = max_cut

    @property
    def sources(self) -> list[str]:
        """Names of the episode's sources in the order of the action's values.

        Raises:
            ValueError: The pool has another number of sources than the action space.
        """
        counts = Counter(cast("CurationEnv", self.unwrapped).episode.pipeline.view.sources)
        expected = cast(spaces.Box, self.action_space).shape[0] - 1
        if len(counts) != expected:
            raise ValueError(f"the pool has {len(counts)} sources: pass sources={len(counts)}, not {expected}")
        return sorted(counts, key=lambda name: (-counts[name], name))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Play the mixture; what is none (a diverged agent's NaN, a text action) is answered as an invalid action."""
        try:
            inner: Any = self.action(action)
        except InvalidAction as error:
            inner = error  # the environment answers it, and every wrapper on the way counts a step
        return self.env.step(inner)

    def action(self, action: Any) -> actions.Action:
        """Write the policy.

        Raises:
            InvalidAction: The action is no array of numbers, has another shape, or a value that is not finite.
        """
        count = cast(spaces.Box, self.action_space).shape[0]
        try:
            values = np.asarray(action, np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.empty(0)
        if values.shape != (count,) or not np.isfinite(values).all():
            given = repr(action)[:100]
            if isinstance(action, np.ndarray):
                given = f"an array of shape {action.shape}" + ("" if values.shape != (count,) else " with NaN or inf")
            raise InvalidAction(f"a mixture is {count} finite numbers, one a source and the cut, not {given}")
        *weights, cut = np.clip(values, -1.0, 1.0).tolist()
        shares = {name: (weight + 1) / 2 for name, weight in zip(self.sources, weights, strict=True)}
        rows = cast("CurationEnv", self.unwrapped).episode.task.rows
        return actions.policy(mixture_policy(shares, max(0.0, cut) * self.max_cut, rows))


class NumericObservation(gym.ObservationWrapper[Array, Any, dict[str, Any]], RecordConstructorArgs):
    """An observation is one vector of numbers in [0, 1]: the dict without its texts, scaled and flattened.

    A `Box` is divided by its range, a `Discrete` is one-hot, a `MultiBinary` stays; `layout` says where each key lies.

    Args:
        env: An environment whose observations are a `Dict` of bounded spaces and texts.

    Example:
        >>> from curation_env import envs
        >>> env = NumericObservation(envs.make("nano", iterations=2))
        >>> env.observation_space
        Box(0.0, 1.0, (69,), float32)
        >>> env.layout["remaining"]
        slice(47, 52, None)
    """

    def __init__(self, env: gym.Env[dict[str, Any], Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        parts = cast(spaces.Dict, env.observation_space).spaces
        self._numeric = spaces.Dict({key: part for key, part in parts.items() if not isinstance(part, spaces.Text)})
        flat = cast(spaces.Box, spaces.flatten_space(self._numeric))
        self._low, self._range = flat.low, flat.high - flat.low
        self.observation_space = spaces.Box(0.0, 1.0, flat.shape, np.float32)

    @property
    def layout(self) -> dict[str, slice]:
        """Where each key of the dict lies in the vector."""
        ends = np.cumsum([spaces.flatdim(part) for part in self._numeric.spaces.values()]).tolist()
        return {key: slice(start, end) for key, start, end in zip(self._numeric, [0, *ends], ends, strict=False)}

    def observation(self, observation: dict[str, Any]) -> Array:
        flat = cast(np.ndarray, spaces.flatten(self._numeric, {key: observation[key] for key in self._numeric}))
        return ((flat - self._low) / self._range).astype(np.float32)
