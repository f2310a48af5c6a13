"""An agent that searches over mixtures of sources with optuna's TPE."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import optuna

from curation_env import actions
from curation_env.agents.base import Agent, Step
from curation_env.agents.policies import policy_source
from curation_env.mixture import mixture_policy


class SearchAgent(Agent):
    """Tree-structured Parzen estimator over a weight for each source and a cut on loss.

    Iteration 1 is the untouched random policy, which is told to the sampler as what it is: every source weighted by
    its share of the pool, and no cut. Every later iteration submits a mixture as a readable policy.

    Args:
        startup: Trials drawn at random before the estimator proposes.
        max_cut: Largest share of a source's rows, those with the highest loss, that a trial leaves out.
    """

    name = "search"
    deterministic = True

    def __init__(self, startup: int = 8, max_cut: float = 0.5) -> None:
        if startup < 1 or not 0 < max_cut < 1:
            raise ValueError(f"startup must be at least 1 and max_cut between 0 and 1, not {startup} and {max_cut}")
        self._startup = startup
        self._max_cut = max_cut

    def identity(self) -> str:
        return hashlib.sha256(policy_source("random").encode()).hexdigest()

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sources: dict[str, int] = dict(task["sources"])
        self._rows = int(task["rows"])
        self._iterations = int(task["iterations"])
        sampler = optuna.samplers.TPESampler(n_startup_trials=self._startup, multivariate=True, seed=seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._trial: optuna.Trial | None = None
        self._random_is_scored = False

    def act(self, observation: Any, info: dict[str, Any]) -> actions.Action:
        if info["iteration"] >= self._iterations:
            return actions.stop()  # the final choice, where there is one: the best on feedback
        if not self._random_is_scored:
            return actions.policy(policy_source("random"))
        self._trial = self._study.ask()
        weights = {name: self._trial.suggest_float(name, 0.0, 1.0) for name in self._sources}
        cut = self._trial.suggest_float("cut", 0.0, self._max_cut)
        return actions.policy(mixture_policy(weights, cut, self._rows))

    def observe(self, step: Step) -> None:
        if step.ticket:
            return
        scored = step.info["status"] == "scored"
        if self._trial is not None:
            if scored:
                self._study.tell(self._trial, step.info["score"])
            else:
                self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
            self._trial = None
        elif scored:
            self._random_is_scored = True
            self._study.add_trial(self._random_trial(step.info["score"]))

    def _random_trial(self, score: float) -> optuna.trial.FrozenTrial:
        """The random policy as a point of the search space."""
        largest = max(self._sources.values())
        return optuna.trial.create_trial(
            params={name: count / largest for name, count in self._sources.items()} | {"cut": 0.0},
            distributions={
                **{name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in self._sources},
                "cut": optuna.distributions.FloatDistribution(0.0, self._max_cut),
            },
            value=score,
        )

    def summary(self) -> str:
        if not self._random_is_scored:
            return ""
        best = self._study.best_trial
        total = sum(best.params[name] for name in self._sources) or 1.0
        shares = sorted(((best.params[name] / total, name) for name in self._sources), reverse=True)
        mix = ", ".join(f"{name} {share:.0%}" for share, name in shares[:5])
        return f"best mixture: {mix}, ...; cut {best.params['cut']:.0%} (feedback average {best.value:.2f})"
