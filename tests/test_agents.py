"""Agents, the episode loop, tickets, and going on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from curation_env import actions
from curation_env.agents.base import Agent, AgentDiverged, Saves, Step, from_plain, has_ended, run_episode
from curation_env.agents.baseline import BaselineAgent
from curation_env.agents.policies import PolicyFileError
from curation_env.agents.random import RandomAgent
from curation_env.agents.replay import ReplayAgent, ReplayDiffers
from curation_env.agents.search import SearchAgent
from curation_env.errors import InvalidSetting, RuleBreach
from curation_env.journal import plain
from curation_env.ledger import Ledger, read_events
from curation_env.policy import parse_front_matter
from curation_env.runs import read_run

TASK = {"sources": {"a": 40, "b": 20, "c": 40}, "rows": 10, "iterations": 6, "tokens": None}


def scored(number, action, score):
    return Step(number, action, {}, 0.0, False, False, {"status": "scored", "score": score, "iteration": number})


# ---------------------------------------------------------------------- without an environment


@pytest.mark.parametrize("agent", [RandomAgent(), BaselineAgent(), SearchAgent()], ids=lambda agent: agent.name)
def test_agents_keep_the_protocol_and_their_policies_carry_front_matter(agent):
    assert isinstance(agent, Agent)
    assert not isinstance(agent, Saves)
    agent.reset(TASK, 0)
    for number in range(6):
        action = agent.act({}, {"iteration": number})
        parsed = actions.parse(action)
        if parsed.tool == actions.POLICY:
            assert parse_front_matter(parsed.text).family
            agent.observe(scored(number + 1, action, 40.0 + number))
    assert agent.act({}, {"iteration": TASK["iterations"]}) == actions.stop()


def test_search_begins_with_random_and_moves_to_what_scores():
    def play(seed):
        agent, played = SearchAgent(startup=4), []
        agent.reset(TASK, seed)
        for number in range(40):
            action = agent.act({}, {"iteration": 0})
            played.append(action["text"])
            # The more of source b, the better.
            share = float(action["text"].partition('"b": ')[2].partition(",")[0]) if number else 0.2
            agent.observe(scored(number + 1, action, 40 + 20 * share))
        return played, agent

    played, agent = play(seed=1)
    assert "family: random" in played[0]
    assert all("family: mixture" in source for source in played[1:])
    assert played == play(seed=1)[0]
    assert played != play(seed=2)[0]
    assert agent._study.best_trial.params["b"] > 0.7
    assert "best mixture: b" in agent.summary()


def test_search_forgets_what_failed_and_asks_again_for_random_until_it_is_scored():
    agent = SearchAgent()
    agent.reset(TASK, 0)
    first = agent.act({}, {"iteration": 0})
    agent.observe(Step(1, first, {}, 0.0, False, False, {"status": "invalid", "score": None}))
    assert agent.act({}, {"iteration": 0}) == first
    agent.observe(scored(2, first, 40.0))
    second = agent.act({}, {"iteration": 1})
    agent.observe(Step(3, second, {}, 0.0, False, False, {"status": "rejected", "score": None}))
    assert agent.act({}, {"iteration": 1}) != second
    assert [trial.state.name for trial in agent._study.trials] == ["COMPLETE", "FAIL", "RUNNING"]


def test_a_policy_file_of_ones_own_and_a_missing_one(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import curation\n")
    agent = BaselineAgent([str(path), "random"])
    agent.reset(TASK, 0)
    assert agent.act({}, {"iteration": 2})["text"] == "import curation\n"
    assert "Rows at random" in agent.act({}, {"iteration": 1})["text"]
    with pytest.raises(PolicyFileError, match="loss_window, random, source_balanced"):
        BaselineAgent(["randon"])
    path.write_bytes(b"import curation  # \xff")
    with pytest.raises(PolicyFileError, match=r"mine\.py is not UTF-8 \(byte 19\)"):
        BaselineAgent([str(path)])


def test_what_an_agent_loaded_is_part_of_what_it_is(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import curation\n")
    before = BaselineAgent([str(path)]).identity()
    assert before == BaselineAgent([str(path)]).identity() != BaselineAgent(["random"]).identity()
    path.write_text("import curation  # other\n")
    assert BaselineAgent([str(path)]).identity() != before


def test_observations_survive_the_journal():
    space = gym.spaces.Dict(
        {
            "scores": gym.spaces.Box(0, 100, (2, 3), np.float32),
            "mask": gym.spaces.MultiBinary(3),
            "count": gym.spaces.Discrete(4),
            "text": gym.spaces.Text(10),
        }
    )
    space.seed(0)
    sample = space.sample()
    again = from_plain(space, json.loads(json.dumps(plain(sample))))
    np.testing.assert_equal(again, sample)
    assert again["scores"].dtype == np.float32
    assert plain({"x": math.nan, "y": (np.int64(3), np.float32(0.5))}) == {"x": None, "y": [3, 0.5]}


# ---------------------------------------------------------------------- on the nano task


def play(env, agent, seed=0, **options):
    """One episode; the environment is closed, so that the run folder is free."""
    try:
        return run_episode(env, agent, seed=seed, **options)
    finally:
        env.close()


def trajectory(folder):
    """What a run is: commits, steps without times, state."""
    run = read_run(folder)
    with Ledger(run.folder) as ledger:
        commits = ledger.commits()
    steps = [(event["action"], event["observation"], event["info"]) for event in run.events if event["kind"] == "step"]
    return commits, steps, run.state.history


def test_an_episode_is_played_to_its_end(nano):
    env, told = nano(iterations=2), []
    result = run_episode(env, BaselineAgent(["random", "source_balanced"]), seed=0, on_step=told.append)
    assert (result.reason, result.iterations, result.steps) == ("terminated", 2, 2)
    assert [step.info["status"] for step in told] == ["scored"] * 2
    history = read_run(result.folder).state.history
    assert result.reward == pytest.approx(max(entry.average for entry in history) - history[0].average)
    assert result.score == history[result.best].average
    assert len({entry.submission for entry in history[1:]}) == 2
    assert has_ended(read_events(result.folder))
    # Asked again, the finished run is read, not played.
    again = run_episode(env, BaselineAgent(["random", "source_balanced"]), seed=0, resume=True, on_step=told.append)
    assert again == result
    assert len(told) == 2


def test_the_page_on_agents_runs_as_it_is(nano, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "agents.md").read_text()
    use, write = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(use.replace('"mini", iterations=5', '"nano", iterations=1'), scope)
    assert scope["result"].folder == Path("my-run/episode-0000")
    exec(write, scope)
    result = play(nano(iterations=1), scope["LookThenBalance"]())
    assert (result.steps, result.iterations) == (2, 1)


def test_the_final_choice_is_made(nano):
    result = play(nano(iterations=1, final_choice=True), BaselineAgent(["random"]))
    assert (result.steps, result.iterations, result.reason) == (2, 1, "terminated")


class Counting(gym.Wrapper):
    """A wrapper that sees every action: the outermost one."""

    def __init__(self, env):
        super().__init__(env)
        self.seen = []

    def step(self, action):
        self.seen.append(action)
        return self.env.step(action)


class Submitter(Agent):
    """Submits two policies from a shell, as a command-line agent would, and then stops."""

    name = "submitter"
    deterministic = True

    def reset(self, task, seed):
        self.told = []

    def act(self, observation, info):
        if self.told:
            return actions.stop()
        files = " ".join(f"policy-{k}.py" for k in (1, 2))
        source = "import curation; i = list(curation.pool()['id']); curation.select(i[:20])"
        return actions.shell(f'for f in {files}; do echo "{source}  # $f" > $f; curation submit $f; done')

    def observe(self, step):
        self.told.append((step.ticket, step.info["status"], step.info["score"]))


def test_tickets_are_played_on_the_outermost_wrapper_before_the_agent_is_asked_again(nano):
    env = Counting(nano())
    agent = Submitter()
    result = run_episode(env, agent, seed=0)
    assert [action["tool"] for action in env.seen] == [actions.SHELL, actions.POLICY, actions.POLICY, actions.STOP]
    assert env.seen[1] == actions.policy()
    tickets = [ticket for ticket, status, _ in agent.told if status == "scored"]
    assert len(set(tickets)) == 2
    assert all(ticket.startswith("t-") for ticket in tickets)
    assert [ticket for ticket, *_ in agent.told if ticket not in tickets] == ["", ""]
    assert result.iterations == 2
    waited = env.unwrapped.session.wait(tickets[0])
    assert waited["result"]["status"] == "scored"


class RefusesPolicies(gym.Wrapper):
    """A scaffold's rule that no policy passes."""

    def step(self, action):
        if action["tool"] == actions.POLICY:
            return self.env.unwrapped.refuse(action, RuleBreach("no policies today"))
        return self.env.step(action)


def test_refused_tickets_are_answered_and_the_episode_goes_on(nano):
    env, agent = RefusesPolicies(nano()), Submitter()
    result = run_episode(env, agent, seed=0)
    assert [(bool(ticket), status) for ticket, status, _ in agent.told] == [
        (False, "shell_ok"),
        (True, "breach"),
        (True, "breach"),
        (False, "finished"),
    ]
    assert (result.iterations, result.reason) == (0, "terminated")


class NeverStops(Submitter):
    """Goes on as if nothing had happened, whatever is left to do."""

    def act(self, observation, info):
        return actions.shell("ls") if self.told else super().act(observation, info)


def test_an_agent_that_makes_no_choice_ends_with_the_best(nano):
    agent = NeverStops()
    result = run_episode(nano(iterations=1, final_choice=True), agent, seed=0)
    # The second ticket waits when the iterations are used up: it is answered, not played.
    assert [status for _, status, _ in agent.told] == ["shell_ok", "scored", "invalid"]
    assert (result.reason, result.nominee) == ("terminated", result.best)


class Refused(Agent):
    """Sends what is refused, and what JSON has no word for."""

    name = "refused"

    def reset(self, task, seed):
        self.step = 0

    def act(self, observation, info):
        endless = []
        endless.append(endless)
        texts = ["\ud800", 10**6000, math.inf, endless, b"ls", "x" * 5_000_000]
        return {"tool": 0, "text": texts[self.step]} if self.step < len(texts) else actions.stop()

    def observe(self, step):
        self.step += 1


def test_an_agent_whose_actions_are_refused_resumes(nano, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(step):
        if step.number == 6:
            raise Interrupted

    folder = tmp_path / "run"
    env = nano(run_dir=folder, iterations=9)
    with pytest.raises(Interrupted):
        play(env, Refused(), on_step=interrupt)
    result = play(nano(run_dir=folder, iterations=9), Refused(), resume=True)
    assert (result.steps, result.iterations) == (7, 3)
    assert (result.folder / "journal.jsonl").stat().st_size < 1_000_000


PLAYER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from curation_env import envs
from curation_env.agents.base import run_episode
{agent}

def die(event):
    if event["stage"] == "{stage}" and len(told) == {steps}:
        os.kill(os.getpid(), signal.SIGKILL)

told = []
env = envs.make("nano", run_dir={folder!r}, iterations=2, sandbox="bubblewrap", on_progress=die)
try:
    run_episode(env, make(), seed=3, resume=True, on_step=told.append)
finally:
    env.close()
"""


def play_and_die(folder, agent, *, steps, stage="policy"):
    """Play in a process that kills itself (SIGKILL) in the step after `steps` steps."""
    tests = str(Path(__file__).parent)
    code = PLAYER.format(tests=tests, folder=str(folder), agent=textwrap.dedent(agent), steps=steps, stage=stage)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    "make",
    [
        "from curation_env.agents.search import SearchAgent\nmake = SearchAgent",
        "from curation_env.agents.random import RandomAgent\nmake = lambda: RandomAgent(look=0.5)",
        "from test_agents import Submitter\nmake = Submitter",
    ],
    ids=["search", "random", "tickets"],
)
def test_a_killed_run_goes_on_to_the_same_trajectory(nano, tmp_path, make):
    scope = {}
    exec(make, scope)
    whole = play(nano(run_dir=tmp_path / "whole", iterations=2), scope["make"](), seed=3)
    cut = tmp_path / "cut"
    play_and_die(cut, make, steps=1)
    assert not has_ended(read_events(cut / "episode-0000"))
    resumed = play(nano(run_dir=cut, iterations=2), scope["make"](), seed=3, resume=True)
    assert trajectory(cut) == trajectory(whole.folder)
    assert (resumed.steps, resumed.reward, resumed.nominee) == (whole.steps, whole.reward, whole.nominee)


class Diary(Agent):
    """Not deterministic as far as the loop knows: it lives on what it wrote down."""

    name = "diary"
    deterministic = False

    def reset(self, task, seed):
        self.lines = []

    def act(self, observation, info):
        return actions.shell(f"echo {len(self.lines)}") if len(self.lines) < 4 else actions.stop()

    def observe(self, step):
        self.lines.append(step.observation["message"])

    def save(self, path):
        (path / "lines.json").write_text(json.dumps(self.lines))

    def load(self, path):
        self.lines = json.loads((path / "lines.json").read_text())


def test_an_agent_that_is_not_deterministic_goes_on_from_what_it_saved(nano, tmp_path):
    env = nano()

    class Interrupted(Exception):
        pass

    def interrupt(step):
        if step.number == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_episode(env, Diary(), seed=0, on_step=interrupt)
    saved = list((env.unwrapped.episode.run_dir / "agent").iterdir())
    assert [folder.name for folder in saved] == ["000002"]
    # As if the kill had come between a step's record and the agent's own: the step is told once more.
    (saved[0] / "lines.json").write_text('["0"]')
    saved[0].rename(saved[0].with_name("000001"))
    agent = Diary()
    result = run_episode(env, agent, seed=0, resume=True)
    assert agent.lines[:4] == ["0", "1", "2", "3"]
    assert result.steps == 5


def test_an_agent_that_changed_does_not_resume(nano, tmp_path):
    cut = tmp_path / "cut"
    play_and_die(cut, "from curation_env.agents.baseline import BaselineAgent\nmake = BaselineAgent", steps=1)
    with pytest.raises(AgentDiverged, match="step 1: the agent did not repeat"):
        play(nano(run_dir=cut, iterations=2), BaselineAgent(["source_balanced"]), seed=3, resume=True)
    with pytest.raises(AgentDiverged, match="agent 'search', seed 3 can't resume a run of 'baseline'"):
        play(nano(run_dir=cut, iterations=2), SearchAgent(), seed=3, resume=True)
    with pytest.raises(AgentDiverged, match="seed 4"):
        play(nano(run_dir=cut, iterations=2), BaselineAgent(), seed=4, resume=True)


def test_replay_gets_the_recorded_scores(nano):
    recorded = play(nano(iterations=2), BaselineAgent(["random", "source_balanced"]))
    agent = ReplayAgent(recorded.folder)
    replayed = play(nano(iterations=2, cache=False), agent, seed=8)
    before, after = (read_run(result.folder).state.history for result in (recorded, replayed))
    assert [entry.scores for entry in after] == [entry.scores for entry in before]
    assert [entry.submission for entry in after] == [entry.submission for entry in before]
    assert agent.summary().count("same rows") == 2


def test_replay_of_policies_names_the_one_that_selects_other_rows(nano, random_policy):
    fickle = """
import os, curation
start = 1 if os.path.exists("moved") else 0
curation.select(list(curation.pool()["id"])[start : start + 30])
"""

    class Fickle(BaselineAgent):
        def __init__(self):
            self._sources = [random_policy, fickle]

        def act(self, observation, info):
            # What the policy finds in the workspace is no part of the record's policies.
            return super().act(observation, info) if self.looked else actions.shell("touch moved")

        def reset(self, task, seed):
            super().reset(task, seed)
            self.looked = False

        def observe(self, step):
            self.looked = True

    recorded = play(nano(iterations=2), Fickle(), seed=0)
    agent = ReplayAgent(recorded.folder, policies=True)
    play(nano(iterations=2), agent, seed=8)
    assert [(item.iteration, item.submission) for item in agent.comparisons] == [(1, True), (2, False)]
    assert "iteration 2: OTHER rows" in agent.summary()


def test_replay_notices_other_scores(nano):
    recorded = play(nano(iterations=1), BaselineAgent(["random"]), seed=0)
    journal = recorded.folder / "journal.jsonl"
    before = read_run(recorded.folder).state.history[1].average
    lines = []
    for text in journal.read_text().splitlines():
        event = json.loads(text)
        if event["kind"] == "step":
            entry = event["state"]["history"][1]
            entry["scores"] = {name: score + 1 for name, score in entry["scores"].items()}
            entry["average"] += 1
        lines.append(json.dumps(event))
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReplayDiffers, match=f"recorded {before + 1:.4f}, now {before:.4f}"):
        play(nano(iterations=1), ReplayAgent(recorded.folder), seed=0)


def test_a_replay_that_is_not_scored_says_so_and_leaves_the_recorded_run_alone(nano):
    recorded = play(nano(iterations=1), BaselineAgent(["random"]), seed=0)
    before = {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*") if path.is_file()}
    with Ledger(recorded.folder):  # as if its run were still going on
        agents = ReplayAgent(recorded.folder), ReplayAgent(recorded.folder, policies=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The same rows do not fit a smaller task.
    with pytest.raises(ReplayDiffers, match=r"now not scored \(invalid invalid_submission\)"):
        play(nano(iterations=1, rows=10), agents[0], seed=0)
    broken = {"status": "invalid", "score": None, "submission": "", "error": "policy_failed"}
    agents[1].reset({"iterations": 1}, 0)
    agents[1].observe(Step(1, agents[1].act({}, {}), {}, 0.0, False, False, broken))
    assert "OTHER rows" in agents[1].summary()
    assert "replayed not scored" in agents[1].summary()
    with pytest.raises(InvalidSetting, match="allow as many"):
        agents[0].reset({"iterations": 0}, 0)
