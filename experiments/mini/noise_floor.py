"""The miniature's noise floor: what base, random, full, hand-written, careless and oracle selections score.

    python experiments/mini/noise_floor.py --worlds 0,1000000,1000001,1000002,1000003,1000004 --jobs 2

Every run goes through the real trainer and evaluation. Finished runs are JSON lines under `--out`, keyed by world,
policy and seeds, so an interrupted measurement goes on where it was; runs of another task or of other policies are
made again. It prints a table a world and checks the lines that the miniature promises: all of them on world 0, each on
all but one of the others, and no plain policy the best on all of them. With `--write` it stores
`conf/reference/mini.json`. It exits with 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from policies import CARELESS, HAND_WRITTEN, Facts, Policy, oracle, random_rows, random_tokens

from curation_env.calibrate import open_pipeline, spread
from curation_env.feedback import judge_free_mean
from curation_env.pipeline import PARTS, Pipeline
from curation_env.submission import Submission
from curation_env.task import Task

ORDER = ("base", "random", "random by tokens", *HAND_WRITTEN, *CARELESS, "oracle", "full")
ROOT = Path(__file__).resolve().parents[2]
POLICIES_DIGEST = hashlib.sha256((Path(__file__).parent / "policies.py").read_bytes()).hexdigest()[:12]
SUBSETS, TRAINING_SEEDS = 12, 5
POLICIES: dict[str, Policy] = {
    "random": random_rows,
    "random by tokens": random_tokens,
    "oracle": oracle,
    **HAND_WRITTEN,
    **CARELESS,
}


class Run(NamedTuple):
    """One training run: a policy's rows for a policy seed, and which of the recipe's training seeds."""

    policy: str
    seed: int
    training: int


def plan() -> list[Run]:
    """All runs of a world, what is needed first in front."""
    runs = [Run("base", 0, 0)]
    runs += [Run("random", k, 0) for k in range(SUBSETS)]
    runs += [Run(name, k, 0) for k in range(2) for name in ("oracle", *HAND_WRITTEN)]
    runs += [Run(name, 0, 0) for name in CARELESS]
    runs += [Run("random", 0, k) for k in range(1, TRAINING_SEEDS)]
    runs += [Run("full", 0, 0)]
    return runs + [Run("random by tokens", k, 0) for k in range(4)]


def facts(pipeline: Pipeline) -> Facts:
    """The agent's view with the init's loss, and the truth beside it."""
    import pyarrow.parquet as pq

    truth = {row["id"]: row for row in pq.read_table(pipeline.assets.pool / "truth.parquet").to_pylist()}
    rows = [truth[id_] for id_ in pipeline.view.ids]
    loss, _ = pipeline.signal("loss")
    questions = [turns[0]["user"] for turns in pipeline.view.table["conversation"]]
    return Facts(
        sources=pipeline.view.sources,
        questions=questions,
        tokens=pipeline.view.n_tokens,
        loss=loss,
        skill=[r["skill"] for r in rows],
        fault=[r["fault"] for r in rows],
        duplicate=[r["duplicate_of"] != "" for r in rows],
    )


def measure(pipeline: Pipeline, world: int, run: Run, seen: Facts) -> dict[str, Any]:
    started = time.monotonic()
    chosen: np.ndarray = np.arange(0)
    if run.policy == "base":
        scores = pipeline.base().scores
    else:
        chosen = np.arange(len(seen))
        if run.policy != "full":
            chosen = POLICIES[run.policy](seen, pipeline.task.rows, np.random.default_rng([world, run.seed]))
        submission = Submission.of(pipeline.view.ids[int(k)] for k in chosen)
        seed = pipeline.task.recipe_config["seeds"][run.training]
        scores = pipeline.train_scores(submission, [seed])[seed]
    return {
        "world": world,
        **run._asdict(),
        "rows": len(chosen),
        "tokens": int(seen.tokens[chosen].sum()),
        "scores": {part: dict(scores.parts[part]) for part in PARTS},
        "mean": {part: scores.mean(part) for part in PARTS},
        "task": pipeline.task.hash,
        "policies": POLICIES_DIGEST,
        "seconds": round(time.monotonic() - started, 2),
    }


def work(args: argparse.Namespace, world: int, job: int) -> None:
    """Do this job's part of a world's runs that nobody has finished."""
    task = Task.load("mini").in_world(world)
    with open_pipeline(task, args.data, device=args.device) as pipeline:
        seen = facts(pipeline)
        done = {(r["policy"], r["seed"], r["training"]) for r in records(args.out, world)}
        todo = [run for run in plan()[job :: args.jobs] if run not in done]
        with (args.out / f"world-{world}-{job}.jsonl").open("a") as file:
            for k, run in enumerate(todo):
                record = measure(pipeline, world, run, seen)
                file.write(json.dumps(record) + "\n")
                file.flush()
                name = f"{run.policy} {run.seed} {run.training}"
                print(f"world {world} job {job} {k + 1}/{len(todo)}: {name}: {record['mean']['all']:.2f}", flush=True)


def records(out: Path, world: int) -> list[dict[str, Any]]:
    """Finished runs of a world under today's task and policies; a later line of a run replaces an earlier one."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    current = (Task.load("mini").in_world(world).hash, POLICIES_DIGEST)
    for path in sorted(out.glob(f"world-{world}-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if (record["task"], record["policies"]) == current:
                found[record["policy"], record["seed"], record["training"]] = record
    return list(found.values())


class Floor:
    """A world's figures on one part of the items."""

    def __init__(self, runs: list[dict[str, Any]], part: str) -> None:
        self.runs, self.part = runs, part
        random = self.means("random")
        self.base, self.full = float(np.mean(self.means("base"))), float(np.mean(self.means("full")))
        self.random, self.sd = float(np.mean(random)), float(np.std(random, ddof=1))
        self.repeated = [r for r in runs if r["policy"] == "random" and r["seed"] == 0]
        self.seed_sd = float(np.std([r["mean"][part] for r in self.repeated], ddof=1))
        self.gap = self.full - self.base

    def means(self, policy: str) -> list[float]:
        """Means of the runs with the first training seed."""
        return [r["mean"][self.part] for r in self.runs if r["policy"] == policy and r["training"] == 0]

    def scores(self, policy: str) -> list[dict[str, float]]:
        """Scores by benchmark of the same runs."""
        return [r["scores"][self.part] for r in self.runs if r["policy"] == policy and r["training"] == 0]

    def sds(self, policy: str) -> float:
        """How far a policy's mean lies above random's, in random-run standard deviations."""
        return (float(np.mean(self.means(policy))) - self.random) / self.sd

    def moves(self) -> dict[str, float]:
        """Rise of every benchmark from base to full."""
        scores = {r["policy"]: r["scores"][self.part] for r in self.runs if r["policy"] in ("base", "full")}
        return {name: scores["full"][name] - scores["base"][name] for name in scores["base"]}

    def best(self) -> str:
        """The hand-written policy (random included) with the highest mean."""
        return max(("random", *HAND_WRITTEN), key=lambda name: float(np.mean(self.means(name))))

    def checks(self) -> dict[str, tuple[bool, str]]:
        """The promised lines, each with its figure."""
        above = sorted((self.sds(name) for name in HAND_WRITTEN), reverse=True)
        below = {name: self.sds(name) for name in ("lowest loss", "one noisy source")}
        least = min(self.moves().items(), key=lambda item: item[1])
        return {
            "base < random < full": (
                self.base < self.random < self.full,
                f"{self.base:.1f} {self.random:.1f} {self.full:.1f}",
            ),
            "full - base >= 20": (self.gap >= 20, f"{self.gap:.1f}"),
            "random - base >= 8": (self.random - self.base >= 8, f"{self.random - self.base:.1f}"),
            "random sd 4-7% of full - base": (0.035 <= self.sd / self.gap < 0.075, f"{100 * self.sd / self.gap:.1f}%"),
            "training-seed sd <= 5%": (self.seed_sd / self.gap <= 0.05, f"{100 * self.seed_sd / self.gap:.1f}%"),
            "oracle >= random + 4 sd": (self.sds("oracle") >= 4, f"{self.sds('oracle'):+.1f} sd"),
            "two hand-written >= random + 2.5 sd": (above[1] >= 2.5, f"{above[0]:+.1f} {above[1]:+.1f} sd"),
            "careless <= random - 3 sd": (
                max(below.values()) <= -3,
                " ".join(f"{v:+.1f}" for v in below.values()) + " sd",
            ),
            "each benchmark moves >= 5": (least[1] >= 5, f"{least[0]} {least[1]:+.1f}"),
        }


def table(world: int, runs: list[dict[str, Any]]) -> str:
    """A world's policies with their scores, and the promised lines."""
    floor = Floor(runs, "all")
    names = list(runs[0]["scores"]["all"])
    lines = [
        f"\nworld {world}",
        f"{'policy':24} {'n':>2} {'mean':>6} {'sd':>5} {'vs random':>10} {'tokens':>7}  "
        + " ".join(f"{n[4:][:7]:>7}" for n in names),
    ]
    for policy in ORDER:
        held = [r for r in runs if r["policy"] == policy and r["training"] == 0]
        values = floor.means(policy)
        spread = f"{np.std(values, ddof=1):5.2f}" if len(values) > 1 else "    -"
        each = " ".join(f"{np.mean([r['scores']['all'][n] for r in held]):7.1f}" for n in names)
        tokens = int(np.mean([r["tokens"] for r in held]))
        lines.append(
            f"{policy:24} {len(held):2} {np.mean(values):6.2f} {spread} {floor.sds(policy):+7.1f} sd {tokens:7}  {each}"
        )
    lines.append(
        f"training-seed sd {floor.seed_sd:.2f} (same rows, {TRAINING_SEEDS} seeds); best plain policy: {floor.best()}"
    )
    lines += [f"  {'ok  ' if good else 'MISS'} {what}: {figure}" for what, (good, figure) in floor.checks().items()]
    return "\n".join(lines)


def summary(floors: dict[int, Floor]) -> str:
    """All worlds in one Markdown table: means, and how many random-run standard deviations they lie above random's."""
    lines = ["| policy |" + "".join(f" {world} |" for world in floors), "|---|" + "---|" * len(floors)]
    for policy in ORDER:
        cells = []
        for floor in floors.values():
            far = f" ± {floor.sd:.1f}" if policy == "random" else f" ({floor.sds(policy):+.1f})"
            cells.append(f"{np.mean(floor.means(policy)):.1f}{'' if policy in ('base', 'full') else far}")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    cells = [f"{floor.seed_sd:.1f}" for floor in floors.values()]
    return "\n".join([*lines, "| sd over training seeds | " + " | ".join(cells) + " |"])


def promises(floors: dict[int, Floor]) -> tuple[bool, str]:
    """Whether the miniature keeps what it promises over these worlds, and the lines that say so."""
    others = [world for world in floors if world != 0]
    checks = {world: floor.checks() for world, floor in floors.items()}
    kept, lines = True, ["\npromises" + "".join(f"{world:>10}" for world in floors)]
    for what in next(iter(checks.values())):
        good = {world: held[what][0] for world, held in checks.items()}
        enough = good.get(0, True) and sum(good[world] for world in others) >= len(others) - 1
        kept &= enough
        marks = "".join(f"{'ok' if held else 'MISS':>10}" for held in good.values())
        lines.append(f"  {'ok  ' if enough else 'MISS'} {what:38}{marks}")
    best = {world: floors[world].best() for world in floors}
    differ = len(others) < 2 or len({best[world] for world in others}) > 1
    told = ", ".join(f"{world}: {name}" for world, name in best.items())
    lines.append(f"  {'ok  ' if differ else 'MISS'} no plain policy is best on all test worlds: {told}")
    return kept and differ, "\n".join(lines)


def reference(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the task ships for a world: base, random and full on each part of the items, each with its source."""
    source, task = "experiments/mini/noise_floor.py", Task.load("mini")
    shipped: dict[str, Any] = {}
    for part in PARTS:
        floor = Floor(runs, part)

        def summary(policy: str, floor: Floor = floor) -> dict[str, Any]:
            values = floor.means(policy)
            free = [judge_free_mean(task, scores) for scores in floor.scores(policy)]
            return {**spread(values), "n": len(values), "source": source, "judge_free": spread(free)}

        shipped[part] = {name: summary(name) for name in ("base", "random", "full")} | {
            "seed_sd": floor.seed_sd,
            "judge_free_seed_sd": spread([judge_free_mean(task, r["scores"][part]) for r in floor.repeated])["sd"],
        }
    return shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="0", help="comma-separated seeds")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, each with a worker of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/noise_floor"))
    parser.add_argument("--data", type=Path, help="data root")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="store conf/reference/mini.json")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)  # a child process: one world, one job
    args = parser.parse_args()
    worlds = [int(w) for w in args.worlds.split(",")]
    if args.job is not None:
        return work(args, worlds[0], args.job)
    args.out.mkdir(parents=True, exist_ok=True)
    for world in worlds:
        command = [sys.executable, *sys.argv, "--worlds", str(world)]
        children = [subprocess.Popen([*command, "--job", str(job)]) for job in range(args.jobs)]
        if any([child.wait() for child in children]):
            sys.exit(f"world {world}: a job failed, see above; run the same command again to go on")
        print(table(world, records(args.out, world)), flush=True)
    floors = {world: Floor(records(args.out, world), "all") for world in sorted(worlds)}
    kept, verdict = promises(floors)
    print(f"\n{summary(floors)}\n{verdict}")
    if args.write:
        path = ROOT / "conf" / "reference" / "mini.json"
        path.parent.mkdir(exist_ok=True)
        held = json.loads(path.read_text())["worlds"] if path.is_file() else {}
        held |= {str(world): reference(records(args.out, world)) for world in worlds}
        path.write_text(json.dumps({"worlds": held}, indent=1) + "\n")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
