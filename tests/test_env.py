"""The Gymnasium contract: spaces, seeding, bad actions, rendering, registration, vector environments."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

import curation_env
from curation_env import envs
from curation_env.actions import policy, shell, stop
from curation_env.envs.base import AUDIT_KINDS
from curation_env.registry import ENTRIES
from curation_env.statuses import STATUSES
from curation_env.task import Task, task_names

SELF_MADE = [entry for entry in ENTRIES if Task.load(entry.task).family == "mini"]  # their assets come with the package
INVALID = {
    "crash": ("raise SystemExit('no idea')", "policy_failed", "no idea"),
    "syntax": ("def broken(:", "policy_failed", "SyntaxError"),
    "selects nothing": ("print('hello')", "policy_failed", "select"),
    "empty": ("import curation; curation.select([])", "invalid_submission", "empty"),
    "unknown ids": ("import curation; curation.select(['nope'])", "invalid_submission", "not in the pool"),
    "repeats": (
        "import curation\ni = curation.pool()['id'][0]\ncuration.select([i, i])",
        "invalid_submission",
        "repeated",
    ),
    "too many": ("import curation; curation.select(curation.pool()['id'])", "invalid_submission", "allows"),
    "folder": (
        "import os; os.makedirs('/workspace/.submission/ids.txt')",
        "invalid_submission",
        "regular file",
    ),
    "link": (
        "import os; os.makedirs('/workspace/.submission'); os.symlink('/etc/passwd', '/workspace/.submission/ids.txt')",
        "invalid_submission",
        "regular file",
    ),
    "loud": ("print('x' * 100_000_000)", "policy_failed", "select"),
}


def test_every_task_file_has_its_id_and_nothing_else_does():
    listed = {entry.task: entry.id for entry in ENTRIES}
    filed = {name: Task.load(name).id for name in task_names()}
    assert {name: id_ for name, id_ in filed.items() if id_} == listed
    assert all(id_ in gym.registry for id_ in listed.values())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.task)
def test_specs_round_trip(entry):
    spec = gym.spec(entry.id)
    assert gym.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_import_is_cheap_and_loads_nothing_heavy():
    code = (
        "import sys, curation_env\n"
        "heavy = 'torch transformers docker faiss wandb hydra deepspeed datasets optuna matplotlib'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("entry", SELF_MADE, ids=lambda entry: entry.task)
def test_check_env(entry, tmp_path):
    """Gymnasium's own checker, warnings as errors, on every registered id whose assets make themselves."""
    env = gym.make(entry.id, run_dir=tmp_path, sandbox="bubblewrap", render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The checker takes raw environments; it asks that wrapped ones be named as such, which is all that is ignored.
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version")
        check_env(env if entry.task == "mini-mixture" else env.unwrapped, skip_render_check=True)
    env.close()


def test_two_seeded_copies_are_equal_step_by_step(nano, random_policy):
    one, two = nano(), nano()
    first, second = one.reset(seed=5), two.reset(seed=5)
    actions = [shell("echo $RANDOM > /dev/null; ls pool"), policy(random_policy), policy("import nothing"), stop()]
    for action in actions:
        assert_equal(first, second)
        first, second = one.step(action), two.step(action)
    assert_equal(first, second)
    assert first[1] == second[1]


def assert_equal(one, two):
    for left, right in zip(one, two, strict=True):
        np.testing.assert_equal(left, right)


def test_a_policy_is_scored_and_everything_is_told(nano, random_policy):
    env = nano(final_choice=True, iterations=1)
    obs, info = env.reset(seed=1)
    assert STATUSES[obs["status"]] == "ready"
    assert obs["history_mask"].tolist() == [1, 0]
    keys = set(info)
    hostile = "echo 'raise SystemExit(9)' >json.py"  # a file of the agent's does not stand in for the command's module
    look = f"{hostile}; curation task && ls pool student feedback; rm json.py"
    obs, reward, terminated, truncated, info = env.step(shell(look))
    assert STATUSES[obs["status"]] == "shell_ok", obs["message"]
    assert "MiniOCR" in obs["message"]
    obs, reward, terminated, truncated, info = env.step(policy(random_policy))
    assert STATUSES[obs["status"]] == "scored", obs["message"]
    assert (terminated, truncated) == (False, False)  # the final choice is left
    assert obs in env.observation_space
    assert obs["history_mask"].tolist() == [1, 1]
    assert reward == pytest.approx(max(0.0, info["score"] - float(obs["base"].mean())), abs=1e-4)
    assert info["n_rows"] == 96
    assert info["n_supervised_tokens"] > 96
    assert len(info["commit"]) == 40
    assert info["score"] == pytest.approx(np.mean([info[f"scores/{name}"] for name in env.unwrapped.task.benchmarks]))
    assert {f"audit/{kind}" for kind in AUDIT_KINDS} <= keys == set(info)
    assert not [key for key in info if "sealed" in key]
    obs, reward, terminated, truncated, info = env.step(stop(nominate=1))
    assert (terminated, info["status"]) == (True, "finished")
    assert env.unwrapped.episode.nominee == 1


def test_a_policy_from_a_file_and_from_a_ticket(nano, random_policy):
    env = nano()
    env.reset(seed=1)
    env.step(shell(f"cat > p.py <<'END'\n{random_policy}\nEND"))
    obs, *_ = env.step(policy(path="p.py"))
    assert STATUSES[obs["status"]] == "scored", obs["message"]
    obs, *_ = env.step(shell("echo '# again' >> p.py; curation submit p.py"))
    assert "t-" in obs["message"]
    obs, *_ = env.step(policy())
    assert STATUSES[obs["status"]] == "scored", obs["message"]
    obs, _, _, _, info = env.step(policy(path="missing.py"))
    assert info["error"] == "policy_failed"


@pytest.mark.parametrize("kind", INVALID)
def test_a_bad_policy_is_explained(nano, kind):
    source, code, words = INVALID[kind]
    env = nano()
    env.reset(seed=1)
    obs, reward, terminated, _, info = env.step(policy(source))
    assert (info["error"], reward, terminated) == (code, 0.0, False)
    assert words in obs["message"]
    assert obs in env.observation_space
    assert obs["iteration"] == 0


def test_limits_end_a_policy_that_never_stops(nano):
    env = nano()
    env.reset(seed=1)
    env.unwrapped.episode.task = env.unwrapped.task.model_copy(
        update={"limits": env.unwrapped.task.limits.model_copy(update={"policy_seconds": 2.0, "shell_seconds": 1.0})}
    )
    obs, _, _, _, info = env.step(policy("while True: pass"))
    assert info["error"] == "policy_failed"
    assert "2" in obs["message"]
    obs, _, _, _, info = env.step(shell("sleep 60"))
    assert info["status"] == "shell_failed"
    assert "stopped after 1 s" in obs["message"]


def test_errors_are_free_three_times_then_cost_an_iteration(nano):
    env = nano(iterations=2)
    env.reset(seed=1)
    charged = [env.step(policy("raise ValueError"))[4]["iteration"] for _ in range(4)]
    assert charged == [0, 0, 0, 1]
    obs, reward, terminated, _, info = env.step({"tool": 9, "text": ""})
    assert (info["iteration"], terminated, reward) == (2, True, 0.0)
    assert info["score"] is None
    assert obs["history_mask"].tolist() == [1, 0, 0]
    obs, _, terminated, _, info = env.step(shell("ls"))
    assert (info["status"], terminated) == ("finished", True)


def test_random_actions_are_legal(nano):
    env = nano()
    env.reset(seed=3)
    env.action_space.seed(3)
    for _ in range(12):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert obs in env.observation_space
        assert reward == 0.0
        if terminated or truncated:
            break


def test_output_is_made_readable_and_bounded(nano):
    env = nano()
    env.reset(seed=1)
    obs, *_ = env.step(shell("printf 'a\\033[31mred\\000 \\xff caf\\xc3\\xa9\\tb'"))
    assert obs["message"] == "a\\x1b[31mred\\x00 \\ufffd caf\\xe9    b"
    obs, *_ = env.step(shell("yes | head -c 50000000"))
    assert obs in env.observation_space
    assert "left out" in obs["message"]


def test_render_modes(tmp_path, random_policy, capsys):
    for mode in ("ansi", "rgb_array", "human"):
        env = envs.make("nano", render_mode=mode, sandbox="bubblewrap", run_dir=tmp_path / mode)
        env.reset(seed=1)
        env.step(policy(random_policy))
        drawn = env.render()
        if mode == "ansi":
            assert "MiniOCR" in drawn
        elif mode == "rgb_array":
            assert (drawn.shape, drawn.dtype) == ((400, 640, 3), np.uint8)
            assert drawn.std() > 10
        else:
            assert drawn is None
            assert "MiniOCR" in capsys.readouterr().out
        env.close()
    with pytest.raises(ValueError, match="render_mode"):
        envs.make("nano", render_mode="hologram")


def test_environments_pickle_and_close_twice(nano):
    env = nano(iterations=2)
    copy = pickle.loads(pickle.dumps(env.unwrapped))
    assert copy.task == env.unwrapped.task
    env.close()
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        copy.step(stop())


def test_overrides_that_move_scores_enter_hash_and_name():
    plain = Task.load("mini")
    assert Task.load("mini", iterations=9).hash == plain.hash
    assert Task.load("mini", rows=None).title == "mini"
    for overrides in ({"rows": 500}, {"tokens": 9000}, {"seeds": 2}, {"feedback": "all"}):
        changed = Task.load("mini", **overrides)
        assert changed.hash != plain.hash
        assert next(iter(overrides)) in changed.title


def test_unknown_tasks_and_overrides_name_the_nearest():
    with pytest.raises(curation_env.task.CurationError, match="'mini'"):
        Task.load("minni")
    with pytest.raises(curation_env.task.CurationError, match="rows"):
        Task.load("mini", rows=0)


VECTOR = dict(num_envs=2, sandbox="bubblewrap", iterations=1)


def play_vector(vector):
    """Everything that a vector environment answers to cheap actions: a shell command, or mixtures that are none."""
    try:
        if isinstance(vector.single_action_space, gym.spaces.Dict):
            given = {"tool": np.array([0, 0]), "text": ("echo one", "curation task | head -c 300")}
        else:
            given = np.full((2, 15), np.nan, np.float32)
        answers = [vector.reset(seed=[123, 123])]  # the world that Gymnasium's checker draws, too
        answers += [vector.step(given), vector.step(given)]
        return answers
    finally:
        vector.close()


@pytest.mark.parametrize("entry", SELF_MADE, ids=lambda entry: entry.task)
def test_standard_vector_environments_are_equal(entry, tmp_path):
    sync, async_ = (
        play_vector(gym.make_vec(entry.id, vectorization_mode=mode, run_dir=str(tmp_path / mode), **VECTOR))
        for mode in ("sync", "async")
    )
    np.testing.assert_equal(async_, sync)
    if not entry.numeric:
        messages = [answer[0]["message"] for answer in sync]
        assert all("base" in text for text in messages[0])
        assert messages[1][0] == "one"
        assert "MiniOCR" in messages[1][1] or "rows" in messages[1][1]
    assert all((tmp_path / mode / f"episode-000{k}").is_dir() for mode in ("sync", "async") for k in (0, 1))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_projects_own_vector_environments(mode, tmp_path):
    vector = gym.make_vec("CurationBench-Mini-v0", mode=mode, run_dir=str(tmp_path), **VECTOR)
    spec = EnvSpec.from_json(vector.spec.to_json())
    assert pickle.loads(pickle.dumps(vector.spec)) == vector.spec
    assert spec.kwargs == vector.spec.kwargs
    answers = play_vector(vector)
    assert [answer[0]["message"][0] for answer in answers[1:]] == ["one", "one"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["env-0", "env-1"]


def test_a_copy_whose_episode_is_over_starts_anew(tmp_path):
    vector = gym.make_vec("CurationBench-Mini-v0", vectorization_mode="async", run_dir=str(tmp_path), **VECTOR)
    try:
        vector.reset(seed=0)
        _, _, terminated, *_ = vector.step({"tool": np.array([2, 0]), "text": ("", "echo two")})
        assert terminated.tolist() == [True, False]
        observation, *_ = vector.step({"tool": np.array([0, 0]), "text": ("echo no", "echo two")})
        assert STATUSES[observation["status"][0]] == "ready"
        assert observation["message"][1] == "two"
    finally:
        vector.close()


def test_paths_in_a_spec_are_plain_text(tmp_path):
    env = gym.make("CurationBench-Mini-v0", run_dir=tmp_path)
    assert EnvSpec.from_json(env.spec.to_json()).kwargs["run_dir"] == str(tmp_path)
