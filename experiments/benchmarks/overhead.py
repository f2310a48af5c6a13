"""Seconds that the harness adds: to an import, around an iteration, to a shell action, at a reset.

    python experiments/benchmarks/overhead.py                    # the miniature, bubblewrap
    python experiments/benchmarks/overhead.py --task nano --sandbox docker --json

Prints one table. The stages of an iteration are read from the journal; "harness" is the wall clock of `env.step`
without the policy's own seconds, training and evaluation: snapshot, fresh sandbox, validation, audit, record,
observation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from curation_env import envs
from curation_env.actions import policy, shell

RANDOM = """
import random
import curation
random.seed({seed})
curation.select(random.sample(curation.column("id").tolist(), curation.task()["rows"]))
"""


def seconds(run: Any) -> float:
    """Wall clock of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def import_seconds(before: str = "") -> float:
    """What `import curation_env` takes in a new process, after the modules that `before` names."""
    code = f"import time, sys{before}; t = time.perf_counter(); import curation_env; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def bare(box: Any) -> None:
    """`true` by the engine's own means: a bwrap with the same namespaces, or an exec through the docker SDK."""
    if box.kind == "docker":
        code, _ = box._container.exec_run(["sh", "-c", "true"])
    else:
        shown = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-all"]
        code = subprocess.run(["bwrap", *shown, "sh", "-c", "true"]).returncode
    assert code == 0


def measure(task: str, sandbox: str, iterations: int, commands: int) -> dict[str, list[float]]:
    """Every measured time, in seconds, by what was measured."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(5):
        note("import curation_env", import_seconds())
        note("import curation_env, gymnasium there", import_seconds(", gymnasium"))
    env = envs.make(task, sandbox=sandbox, iterations=iterations + 2, cache=False)  # one is left
    core = env.unwrapped
    note("first reset, workers cold", seconds(lambda: env.reset(seed=0)))

    def iterate(seed: int) -> None:
        obs, *_, info = env.step(policy(RANDOM.format(seed=seed)))
        if info["status"] != "scored":
            raise SystemExit(obs["message"])

    iterate(0)  # warms the worker's caches
    for k in range(1, iterations + 1):
        wall = seconds(lambda k=k: iterate(k))
        stages = core.ledger.events("iteration")[-1]["seconds"]
        run = core.ledger.events("policy_run")[-1]["seconds"]
        note("iteration, wall clock", wall)
        note("iteration: policy in its sandbox", run)
        for stage, value in stages.items():
            note(f"iteration: {stage}", value)
        note("iteration: harness", wall - run - stages["train"] - stages["evaluate"])
    box = core.sandbox
    for _ in range(commands):  # interleaved, so that both meet the same machine
        box.thaw()  # between actions the sandbox is frozen
        note("bare engine, `true`", seconds(lambda: bare(box)))
        note("sandbox exec, `true`", seconds(lambda: box.exec("true", timeout=20)))
        note("shell action, `true`", seconds(lambda: env.step(shell("true"))))
    env.close()
    cached = envs.make(task, sandbox=sandbox)
    cached.reset(seed=0)
    for k in range(3):
        note("reset, warm", seconds(lambda k=k: cached.reset(seed=k)))
    cached.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mini")
    parser.add_argument("--sandbox", default="bubblewrap", choices=["auto", "docker", "bubblewrap"])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--commands", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.task, arguments.sandbox, arguments.iterations, arguments.commands)
    rows = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in found.items()
    }
    shell_action = rows["shell action, `true`"]["median"]
    ratio = shell_action / rows["bare engine, `true`"]["median"]
    record = {"task": arguments.task, "sandbox": arguments.sandbox, "machine": platform.platform(), "seconds": rows}
    record["shell_ratio"] = ratio
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(record))
        return
    table = Table("seconds", "median", "min", "max", "n", title=f"{arguments.task}, {arguments.sandbox}")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in ("median", "min", "max")), str(row["n"]))
    Console(width=100).print(table)
    beside = shell_action / rows["sandbox exec, `true`"]["median"]
    print(
        f"shell action / bare engine: {ratio:.2f} (target 1.3), / sandbox exec: {beside:.2f};"
        " harness an iteration: target 0.5 s; reset: target 2 s; import, gymnasium there: target 0.15 s"
    )


if __name__ == "__main__":
    main()
