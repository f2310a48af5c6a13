"""An episode under failures, after its end and when it goes on elsewhere: what is charged, kept, sealed and told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from sandbox_support import ENGINES, host_processes, new_nap, until

from curation_env.actions import policy, shell, stop
from curation_env.envs.mini import MiniWorldsEnv
from curation_env.errors import InvalidAction, RuleBreach, RunDiffers, StageFailed
from curation_env.feedback import FeedbackFolder, item_name
from curation_env.ledger import SEALED_DIGEST, LedgerError, read_events
from curation_env.runs import read_run
from curation_env.submission import Submission
from curation_env.tickets import ticket_name

# The same rows in every test: they are trained on once.
SELECT = "import curation\ncuration.select(list(curation.pool()['id'])[:20])\n"


def started(env, **task):
    """The environment, reset, with other limits."""
    limits = env.unwrapped.task.limits.model_copy(update=task)
    env.unwrapped.task = env.unwrapped.task.model_copy(update={"limits": limits})
    env.reset(seed=1)
    return env


def where(env):
    """How far an episode is, all that counts against its agent included."""
    state = env.unwrapped.episode.state
    return state.iteration, state.free_errors, state.steps, state.shell_commands, state.curation_seconds, state.history


def kinds(env):
    return [event["kind"] for event in env.unwrapped.ledger.events()]


def failing(monkeypatch, target, name, error, when=lambda *args: True):
    """Have a method fail where `when` says so."""
    real = getattr(target, name)

    def fail(*args, **kwargs):
        if when(*args):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, fail)


def kill_first_process(nap):
    """Kill process 1 of the sandbox that a command sleeps in, as the kernel does where memory is out."""
    pid = host_processes(nap)[0]
    while True:
        fields = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        if fields["NSpid"].split()[-1] == "1":
            os.kill(pid, signal.SIGKILL)
            return
        pid = int(fields["PPid"])


# ---------------------------------------------------------------------- the sandbox


@pytest.mark.parametrize("kind", ENGINES)
def test_a_command_that_uses_up_the_memory_is_answered_and_runs_once(nano, kind):
    env = started(nano(sandbox=kind), memory_mb=96)
    # Of memory that belongs to no process the kernel may free none but by killing the first process.
    hog = "import os\nmemory = os.memfd_create('m')\nwhile True: os.write(memory, bytes(1 << 20))"
    _, _, _, _, info = env.step(shell(f'echo ran >> count; python -c "{hog}"'))
    assert info["status"] == "shell_failed"
    obs, _, _, _, info = env.step(shell("cat count"))
    assert (info["status"], obs["message"]) == ("shell_ok", "ran")
    assert env.unwrapped.episode.state.shell_commands == 2


def test_a_sandbox_that_ends_under_a_command_is_answered(nano):
    env = started(nano())
    sandbox, nap = env.unwrapped.sandbox, new_nap()
    killer = threading.Thread(target=lambda: until(lambda: bool(host_processes(nap))) and kill_first_process(nap))
    killer.start()
    obs, _, _, _, info = env.step(shell(f"echo ran >> count; sleep {nap}"))
    killer.join()
    assert info["status"] == "shell_failed"
    assert "the sandbox ended under this command, which was not run again" in obs["message"]
    assert env.unwrapped.sandbox is not sandbox
    assert env.step(shell("cat count"))[0]["message"] == "ran"
    assert env.unwrapped.episode.state.curation_seconds > 0
    assert kinds(env)[-3:] == ["sandbox_failed", "step", "step"]


@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_runs_between_actions(nano, kind):
    env = started(nano(sandbox=kind))
    ticks = env.unwrapped.episode.workspace / "ticks"
    env.step(shell("(while :; do echo >> ticks; sleep 0.02; done) > /dev/null 2>&1 & sleep 0.3"))
    before = ticks.stat().st_size
    assert before > 0
    time.sleep(0.3)
    assert ticks.stat().st_size == before
    env.step(shell("sleep 0.3"))
    assert ticks.stat().st_size > before


def test_a_policy_that_cannot_be_read_is_the_agents_error(nano, tmp_path):
    env = started(nano())
    env.step(shell("echo > f; head -c 1500000 /dev/zero > big; printf '\\xff' > latin; ln -s /etc/passwd link"))
    for path in ("x" * 300, "f/x", "big", "latin", "link", "..", "pool", "/etc/passwd"):
        obs, _, _, _, info = env.step(policy(path=path))
        assert info["error"] == "policy_failed", path
        assert str(tmp_path) not in obs["message"]
        env.unwrapped.episode.state.free_errors = 3


# ---------------------------------------------------------------------- failures of the machine


def test_a_failure_behind_a_request_is_not_the_agents(nano, monkeypatch):
    env = started(nano())
    before = where(env)
    with monkeypatch.context() as patch:
        failing(patch, env.unwrapped.pipeline, "signal", StageFailed("/secret/path"))
        for action in (
            policy("import curation\ncuration.signal('loss')"),
            policy(f"import curation\ntry: curation.signal('loss')\nexcept Exception: pass\n{SELECT}"),
            shell("curation signal loss > said 2>&1"),
        ):
            with pytest.raises(StageFailed):
                env.step(action)
            assert where(env) == before
    assert "step" not in kinds(env)
    obs, _, _, _, info = env.step(shell("cat said; curation signal loss -o loss.npy"))
    assert info["status"] == "shell_ok", obs["message"]
    assert "not your doing" in obs["message"]
    assert "secret" not in obs["message"]


def test_a_ticket_survives_a_failure_of_the_machine(nano, tmp_path, monkeypatch):
    env = started(nano(run_dir=tmp_path / "run"))
    policies = [f"{SELECT}# {number}".encode() for number in range(2)]
    names = [ticket_name(source) for source in policies]
    for source in policies:
        env.unwrapped.session.submit(source)
    env.step(shell("true"))
    with monkeypatch.context() as patch:
        failing(patch, env.unwrapped.pipeline, "score", StageFailed("no"))
        with pytest.raises(StageFailed):
            env.step(policy())
        assert [ticket.name for ticket in env.unwrapped.session.waiting()] == names
    with monkeypatch.context() as patch:  # and one that comes when all is done but the record
        failing(patch, env.unwrapped.ledger, "event", LedgerError("full"), when=lambda kind: kind == "step")
        with pytest.raises(LedgerError):
            env.step(policy())
        assert [ticket.name for ticket in env.unwrapped.session.waiting()] == names
        assert env.unwrapped.episode.state.iteration == 0
    env.close()

    env = nano(run_dir=tmp_path / "run")
    env.reset(seed=1, options={"resume": True})
    assert [ticket.name for ticket in env.unwrapped.session.waiting()] == names
    assert env.step(policy())[4]["status"] == "scored"
    assert env.unwrapped.session.wait(names[0])["result"]["status"] == "scored"
    assert [ticket.name for ticket in env.unwrapped.session.waiting()] == names[1:]


@pytest.mark.parametrize("kind", ["iteration", "step"])
def test_a_step_whose_record_fails_has_not_happened(nano, monkeypatch, kind):
    env = started(nano())
    before = where(env)
    with monkeypatch.context() as patch:
        failing(patch, env.unwrapped.ledger, "event", LedgerError("full"), when=lambda given: given == kind)
        with pytest.raises(LedgerError):
            env.step(policy(SELECT))
    assert where(env) == before
    info = env.step(policy(f"{SELECT}# another"))[4]  # its commit takes the other's place
    assert (info["status"], info["iteration"]) == ("scored", 1)
    files = env.unwrapped.ledger.files(info["commit"])
    assert files["policy.py"].endswith(b"# another")
    assert [commit.iteration for commit in env.unwrapped.ledger.commits()] == [0, 1]


def test_waiting_tickets_are_journaled_once(nano, tmp_path):
    env = started(nano())
    for number in range(4):
        env.unwrapped.session.submit(f"# {number} {'x' * 100_000}".encode())
    for _ in range(4):
        env.step(shell("true"))
    events = env.unwrapped.ledger.events()
    assert [event["kind"] for event in events].count("ticket") == 4
    assert len(events[-1]["state"]["tickets"]) == 4
    assert (env.unwrapped.episode.run_dir / "journal.jsonl").stat().st_size < 500_000


# ---------------------------------------------------------------------- refusals and the end


def test_the_journal_says_how_far_training_is_and_with_what_loss(nano, monkeypatch):
    monkeypatch.setattr("curation_env.episode.NOTE_SECONDS", 0.0)
    shown = []
    env = nano(cache=False)
    env.unwrapped.on_progress = shown.append
    env.reset(seed=1)
    env.step(policy(SELECT))
    noted = [event for event in env.unwrapped.ledger.events("progress") if event["stage"] == "train"]
    done = [event["done"] for event in noted]  # a worker leaves out what comes too fast
    assert done
    assert done == sorted(set(done))
    assert done[-1] <= noted[0]["total"]
    assert all(event["loss"] > 0 and event["seconds_left"] >= 0 for event in noted)
    assert {event["stage"] for event in shown} >= {"policy", "train", "evaluate"}


def test_breaches_are_charged_like_errors_and_answer_their_ticket(nano):
    env = started(nano(iterations=2)).unwrapped
    breach = RuleBreach("look at the pool first")
    env.session.submit(b"print(1)")
    obs, reward, terminated, _, info = env.refuse(policy(), breach)
    assert (info["status"], info["error"], reward, terminated) == ("breach", "rule_breach", 0.0, False)
    assert "look at the pool first" in obs["message"]
    assert env.session.waiting() == []
    result = env.session.wait(ticket_name(b"print(1)"))["result"]
    assert (result["status"], result["error"]) == ("error", "rule_breach")
    assert env.ledger.events("step")[-1]["ticket"]["name"] == ticket_name(b"print(1)")
    env.session.submit(b"print(2)")
    charged = [env.refuse(shell("ls"), breach)[4]["iteration"] for _ in range(3)]
    assert charged == [0, 0, 1]
    assert len(env.session.waiting()) == 1
    terminated = env.refuse(object(), breach)[2]
    assert terminated


def test_after_the_end_nothing_is_charged_or_recorded(nano):
    env = started(nano()).unwrapped
    assert env.step(stop())[2]
    before, events = where(env), kinds(env)
    for answer in (
        env.step(shell("ls")),
        env.step(policy("print(1)")),
        env.step({"tool": 7}),
        env.refuse(shell("ls"), RuleBreach("no")),
        env.refuse(policy(), InvalidAction("no")),
    ):
        obs, reward, terminated, _, info = answer
        assert (info["status"], reward, terminated) == ("finished", 0.0, True)
        assert "reset" in obs["message"]
    assert where(env) == before
    assert kinds(env) == events
    assert events.count("episode_finished") == 1


@pytest.mark.parametrize("wrong", [shell("ls"), stop(nominate=7)], ids=["shell", "nobody"])
def test_the_final_choice_is_one_step(nano, wrong):
    env = started(nano(iterations=1, final_choice=True)).unwrapped
    sources = [f"{SELECT}# {number}".encode() for number in range(2)]
    for source in sources:
        env.session.submit(source)
    obs, _, terminated, _, info = env.step(policy())
    assert (info["status"], terminated) == ("scored", False)
    # What still waits is answered, and nothing more is taken.
    assert env.session.waiting() == []
    assert env.session.wait(ticket_name(sources[1]))["result"]["error"] == "limit_exceeded"
    obs, _, terminated, _, info = env.step(wrong)
    assert (info["status"], terminated) == ("invalid", True)
    assert f"the nominee is iteration {env.episode.state.best}" in obs["message"]
    assert env.episode.state.finished
    assert kinds(env)[-1] == "episode_finished"


# ---------------------------------------------------------------------- going on


def test_a_run_goes_on_under_its_own_task_and_settings_alone(nano, tmp_path):
    folder = tmp_path / "run"
    started(nano(run_dir=folder)).close()
    for change, words in (
        ({"rows": 50}, r"rows=96 \(now 50\)"),
        ({"feedback": "all"}, r"feedback='split' \(now 'all'\)"),
        ({"iterations": 4}, r"iterations=3 \(now 4\)"),
        ({"detail": "items"}, r"detail='scores' \(now 'items'\)"),
        ({"final_choice": True}, r"final_choice=False \(now True\)"),
    ):
        with pytest.raises(RunDiffers, match=words):
            nano(run_dir=folder, **change).reset(seed=1, options={"resume": True})
    env = nano(run_dir=folder, sandbox="docker")
    env.reset(seed=1, options={"resume": True})
    assert read_run(folder).sandboxes == ["bubblewrap", "docker"]


def test_a_run_without_isolation_says_so(nano, tmp_path):
    started(nano(run_dir=tmp_path / "run", sandbox="none"))
    assert read_events(tmp_path / "run" / "episode-0000")[0]["sandbox"] == "none"
    assert read_run(tmp_path / "run").sandboxes == ["none"]


def test_a_run_goes_on_in_its_own_world(tmp_path):
    env = MiniWorldsEnv("nano", run_dir=tmp_path / "run", sandbox="bubblewrap")
    try:
        env.reset(seed=5, options={"world": 0})
        env.reset(options={"resume": True})
        assert env.episode.task.pool.world == 0
        env.close()
        for given in ({"seed": 5, "options": {"resume": True}}, {"options": {"resume": True, "world": 1}}):
            with pytest.raises(RunDiffers, match=r"pool.world=0 \(now \d+\)"):
                env.reset(**given)
    finally:
        env.close()


# ---------------------------------------------------------------------- what is sealed


def test_nothing_sealed_is_in_the_trajectory_or_before_the_agent(nano):
    env = started(nano(detail="items"))
    _, _, _, _, info = env.step(policy(SELECT))
    core = env.unwrapped
    outcome = core.pipeline.score(Submission.of(core.pipeline.view.ids[:20]))
    items = [json.loads(line) for line in outcome.files["seed-42/predictions.jsonl"].decode().splitlines()]
    parts = {item["part"] for item in items}
    assert parts == {"feedback", "sealed"}
    command = [
        "git",
        "--git-dir",
        core.episode.run_dir / "trajectory.git",
        "cat-file",
        "--batch-all-objects",
        "--batch",
    ]
    objects = subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace")

    shown = {float(value) for value in outcome.scores.parts["feedback"].values()}
    hidden = {float(value) for part in ("sealed", "all") for value in outcome.scores.parts[part].values()} - shown
    hidden |= {outcome.scores.stderr["sealed"], outcome.scores.stderr["all"], outcome.scores.mean("sealed")}
    numbers = [repr(value) for value in hidden if len(repr(value)) > 6]  # others may stand there for something else
    assert len(numbers) > 3
    assert not [number for number in numbers if number in objects]
    assert '"part": "feedback"' in objects
    assert '"part": "sealed"' not in objects
    assert '"sealed":' not in objects.replace(" ", "")

    files = core.ledger.files(info["commit"])
    assert json.loads(files["scores.json"])["scores"]["parts"] == {"feedback": dict(outcome.scores.parts["feedback"])}
    assert len(files[SEALED_DIGEST]) == 65
    names = {part: [item_name(i["benchmark"], i["index"]) for i in items if i["part"] == part] for part in parts}
    told = b"".join(
        path.read_bytes()
        for folder in (core.episode.workspace, core.episode.run_dir / "feedback")
        for path in folder.rglob("*")
        if path.is_file()
    ).decode(errors="replace")
    assert all(name in told for name in names["feedback"])
    assert not [name for name in names["sealed"] if name in told]

    opened = core.ledger.unseal()
    assert opened[1]["scores"]["parts"]["sealed"] == dict(outcome.scores.parts["sealed"])
    kept = opened[1]["predictions"]["seed-42/predictions.jsonl"].splitlines()
    assert [json.loads(line) for line in kept] == [item for item in items if item["part"] == "sealed"]


@pytest.mark.parametrize("shown", ["split", "all"])
def test_details_are_on_the_items_that_scores_are_on(nano, tmp_path, shown):
    core = started(nano()).unwrapped
    outcome = core.pipeline.score(Submission.of(core.pipeline.view.ids[:20]))
    history = core.episode.state.history
    items = [json.loads(line) for line in outcome.files["seed-42/predictions.jsonl"].decode().splitlines()]
    seen = [item for item in items if shown == "all" or item["part"] == "feedback"]
    for detail in ("scores", "categories", "items"):
        folder = tmp_path / detail
        task = core.task.model_copy(update={"feedback": shown, "detail": detail})
        FeedbackFolder(folder).write(task, history, outcome)
        record = json.loads((folder / "iteration-000.json").read_text())
        assert ("categories" in record) == (detail != "scores")
        assert (folder / "items-000.json").exists() == (detail == "items")
    told = json.loads((folder / "items-000.json").read_text())
    assert [item["item"] for item in told] == [item_name(item["benchmark"], item["index"]) for item in seen]
    assert [item["output"] for item in told] == [item["prediction"] for item in seen]
    assert {key for item in told for key in item} == {"item", "benchmark", "category", "output", "score"}
    for name, table in record["categories"].items():
        assert set(table) == {item["category"] for item in seen if item["benchmark"] == name and item["category"]}
    if shown == "all":
        name, table = next((name, table) for name, table in record["categories"].items() if table)
        category, percent = next(iter(table.items()))
        scores = [item["score"] for item in items if (item["benchmark"], item["category"]) == (name, category)]
        assert percent == pytest.approx(100 * sum(scores) / len(scores))
