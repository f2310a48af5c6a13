"""The `curation-env` command: prepare and check tasks, score a policy without an agent, read runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from curation_env.errors import CurationError, InvalidSetting

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
sandbox_app = typer.Typer(no_args_is_help=True, help="The sandbox that agents work in.")
app.add_typer(sandbox_app, name="sandbox")

DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Pools, suites, caches; default $CURATION_ENV_DATA or the user's cache"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else")]
World = Annotated[int | None, typer.Option("--world", help="World of a miniature task that draws one")]


def _console() -> Console:
    """Tables keep their width when piped, so that no column is squeezed away."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, allow_nan=False, default=str) + "\n")


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks."""
    from curation_env.task import Task, task_names

    loaded = [Task.load(name) for name in task_names()]
    if as_json:
        _print_json({"tasks": [task.model_dump(mode="json", exclude={"overrides"}) for task in loaded]})
        return
    table = Table("task", "id", "pool", "student", "suite", "iterations", "rows")
    for task in loaded:
        numbers = (str(task.iterations), str(task.rows))
        table.add_row(task.name, task.id or "(tests only)", task.pool.label, task.student, task.suite, *numbers)
    _console().print(table)


@app.command()
def doctor(task: str, data_root: DataRoot = None, world: World = None, as_json: Json = False) -> None:
    """Say what a task needs, what is there, how its training fits this GPU, and which command brings the rest."""
    from curation_env.doctor import examine

    if world is not None:
        _in_world(task, world)
    findings = examine(task, data_root, world)
    ready = all(finding.ok for finding in findings if finding.required)
    if as_json:
        _print_json({"task": task, "ready": ready, "findings": [finding._asdict() for finding in findings]})
    else:
        table = Table("what", "state", "where, or what to do")
        for finding in findings:
            table.add_row(
                finding.what, "ok" if finding.ok else "missing" if finding.required else "optional", finding.text
            )
        _console().print(table)
    if not ready:
        raise typer.Exit(1)


@app.command()
def prepare(
    task: str,
    source: Annotated[
        Path | None, typer.Option(help="Folder of the public files that the task's pool is made of")
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option(help="Folder of the public files of the task's student: check them and take them up"),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Folder of the public files of the task's suite: check them and take them up")
    ] = None,
    data_root: DataRoot = None,
    world: World = None,
) -> None:
    """Make or check a task's pool, suite, student, audit index and the agent's view.

    With --student or --suite alone nothing else is made: the audit needs all of them.
    """
    from curation_env.assets import data_root as root_of
    from curation_env.assets import prepared
    from curation_env.pool import Pool
    from curation_env.progress import Progress

    chosen = _in_world(task, world)
    if student is not None:
        from curation_env.students import prepare_student

        with Progress() as progress:
            folder = prepare_student(chosen.student, root_of(data_root), student, progress)
        print(f"student {chosen.student}: {folder}", flush=True)
    if suite is not None:
        from curation_env.evaluation.prepare import take_up_suite

        folder, items = take_up_suite(chosen, root_of(data_root), suite)
        print(f"suite {chosen.suite}: {folder}; {sum(items.values()):,} items of {len(items)} benchmarks", flush=True)
    if source is None and (student is not None or suite is not None):
        return
    if source is not None and chosen.pool.kind == "mini":
        raise InvalidSetting(f"task {chosen.name!r} makes its own pool: leave --source out")
    with Progress() as progress:
        if chosen.pool.kind != "mini":
            from curation_env.ingest.catalog import Catalog
            from curation_env.ingest.prepare import prepare_pool, summary

            lacking = [] if source is None else Catalog.load(chosen.pool.kind).check(source)
            for path in lacking:
                sys.stderr.write(f"{path} is not in {source}: rows with images from there stay out of the pool\n")
            print("\n".join(summary(prepare_pool(chosen.pool, root_of(data_root), source, progress))), flush=True)
        assets = prepared(chosen, root_of(data_root), progress, make=True)
    pool, view = Pool.open(assets.pool), Pool.open(assets.view)
    print(f"pool {pool.key}: {len(pool):,} rows, hash {pool.hash[:16]}; {len(pool) - len(view):,} blocked by the audit")


@app.command("match")
def match_list(
    task: str,
    file: Path,
    out: Annotated[Path, typer.Option(help="Where the ids go, one a line; the report goes to OUT with .report.json")],
    data_root: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Find the rows of a published list (ICONS-133K, ARDS-200K) in a task's pool, by the full record."""
    from curation_env.assets import data_root as root_of
    from curation_env.ingest.lists import match
    from curation_env.task import Task

    found = match(Task.load(task), root_of(data_root), file)
    report = found.write(out)
    if as_json:
        _print_json(found.summary())
    else:
        print("\n".join(found.lines()))
        print(f"ids: {out}; what did not match: {report}")


@app.command()
def audit(task: str, file: Path, data_root: DataRoot = None, world: World = None, as_json: Json = False) -> None:
    """Validate and audit a submission: FILE holds row ids, one a line."""
    from curation_env.submission import MAX_IDS_BYTES, Submission, read_bounded

    ids = _text(file, read_bounded(file, MAX_IDS_BYTES)).split()
    with _pipeline(_in_world(task, world), data_root) as pipeline:
        valid, certificate = pipeline.check(Submission.of(ids))
    if as_json:
        _print_json(
            {"rows": valid.rows, "supervised_tokens": valid.supervised_tokens, **certificate.model_dump(mode="json")}
        )
    else:
        print(f"{valid.rows:,} rows, {valid.supervised_tokens:,} supervised tokens")
        print("passed" if certificate.passed else certificate.reason)
    if not certificate.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    task: str,
    policy: Path,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds; default: the task's own number")] = None,
    sandbox: Annotated[str, typer.Option(help="auto, docker, bubblewrap or none")] = "auto",
    data_root: DataRoot = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the record goes; default: under the data root")] = None,
    world: World = None,
    as_json: Json = False,
) -> None:
    """Take one policy through the whole path, without an agent: sandbox, audit, training, evaluation, record."""
    from curation_env import envs
    from curation_env.actions import policy as submit
    from curation_env.progress import Progress
    from curation_env.task import Task

    source = _text(policy, policy.read_bytes())
    options = {}
    if world is not None:
        Task.load(task).drawn(world)
        options["world"] = world
    with Progress(quiet=as_json) as progress:
        env = envs.make(
            task, seeds=seeds, iterations=1, sandbox=sandbox, data_root=data_root, run_dir=run_dir, on_progress=progress
        ).unwrapped  # of a numeric task, too, a policy is a text
        try:
            _, started = env.reset(seed=0, options=options)
            observation, _, _, _, info = env.step(submit(source))
            folder = env.episode.run_dir  # type: ignore[attr-defined]
        finally:
            env.close()
    if as_json:
        scores = {key.removeprefix("scores/"): value for key, value in info.items() if key.startswith("scores/")}
        record = {
            key: info[key] for key in ("status", "error", "commit", "submission", "n_rows", "n_supervised_tokens")
        }
        record |= {key: _number(info[key]) for key in ("score", "stderr", "gain_recovered")}
        _print_json(
            {
                "task": task,
                **record,
                "base": _number(started["score"]),
                "scores": {name: _number(value) for name, value in scores.items()},
                "message": observation["message"],
                "run": str(folder),
            }
        )
    else:
        print(observation["message"])
        print(f"run folder: {folder}")
    if info["status"] != "scored":
        raise typer.Exit(1)


@app.command()
def calibrate(
    task: str,
    subsets: Annotated[int, typer.Option(min=2, help="Random submissions")] = 12,
    seeds: Annotated[int, typer.Option(min=2, help="Training seeds of one random submission and of the full pool")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Put it into this file, as conf/reference/ has them; other worlds in it stay")
    ] = None,
    data_root: DataRoot = None,
    world: World = None,
    as_json: Json = False,
) -> None:
    """Measure a task's reference: base, random (mean and sd) and full pool, for each part of the items."""
    from curation_env.calibrate import calibrate as measure
    from curation_env.progress import Progress
    from curation_env.task import put_reference

    chosen = _in_world(task, world)
    with Progress(quiet=as_json) as progress, _pipeline(chosen, data_root) as pipeline:
        reference = measure(pipeline, subsets=subsets, seeds=seeds, on_progress=progress)
    if out is not None:
        put_reference(out, chosen.pool.world, reference)
    if as_json:
        _print_json(reference)
        return
    table = Table("part", "base", "random", "sd over subsets", "sd over training seeds", "full")
    for part in ("feedback", "sealed", "all"):
        row = reference[part]
        cells = (row["base"]["mean"], row["random"]["mean"], row["random"]["sd"], row["seed_sd"], row["full"]["mean"])
        table.add_row(part, *(f"{value:.2f}" for value in cells))
        free = [row[name]["judge_free"] for name in ("base", "random", "full")]
        cells = (free[0]["mean"], free[1]["mean"], free[1]["sd"], row["judge_free_seed_sd"], free[2]["mean"])
        table.add_row("  judge-free", *(f"{value:.2f}" for value in cells))
    _console().print(table)


@app.command()
def unseal(run: Path, as_json: Json = False) -> None:
    """Open a run's sealed scores; every opening is counted in its ledger and shown."""
    from curation_env.report.sealed import sealed_table, unsealed

    opened = unsealed(run)
    if as_json:
        _print_json(opened)
    else:
        _console().print(sealed_table(opened))


@app.command()
def report(run: Path) -> None:
    """Print a run's table and write its plot beside its journal."""
    from curation_env.report.table import run_table, save_plot
    from curation_env.runs import read_run

    record = read_run(run)
    _console().print(run_table(record))
    print(f"plot: {save_plot(record, record.folder / 'scores.png')}")


@sandbox_app.command("build")
def sandbox_build(
    base: Annotated[
        str, typer.Option(help="A Docker image, or `debootstrap` to make a Debian root here")
    ] = "debootstrap",
) -> None:
    """Build the Docker image of the sandbox."""
    from curation_env.sandbox.image import build_image

    print(build_image(base))


def _in_world(name: str, world: int | None) -> Any:
    from curation_env.task import Task

    task = Task.load(name)
    return task if world is None else task.in_world(world)


def _number(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)


def _pipeline(task: Any, data_root: Path | None) -> Any:
    from curation_env.calibrate import open_pipeline

    return open_pipeline(task, data_root)


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidSetting(f"{path} is not UTF-8 (byte {error.start})") from error


def main() -> None:
    """Run the command. A documented error is one line on stderr and exit code 2; with --json also an object on stdout.

    The object is `{"error": code, "message": text}`.
    """
    as_json = "--json" in sys.argv[1:]
    try:
        # Outside of its standalone mode typer raises what the user did wrong, and returns a command's exit code.
        raise SystemExit(app(standalone_mode=not as_json))
    except CurationError as error:
        _give_up(error.code, str(error), error.details, as_json=as_json)
    except OSError as error:
        _give_up("os_error", str(error), as_json=as_json)
    except (typer.Abort, KeyboardInterrupt):
        _give_up("interrupted", "interrupted", as_json=as_json, exit_code=130)
    except Exception as error:  # click's, which typer brings along under a name of its own in newer releases
        if not hasattr(error, "format_message"):
            raise
        _give_up("usage", error.format_message(), as_json=as_json, exit_code=getattr(error, "exit_code", 2))


def _give_up(code: str, text: str, details: str = "", *, as_json: bool, exit_code: int = 2) -> NoReturn:
    if as_json:
        _print_json({"error": code, "message": text})
    sys.stderr.write(f"curation-env: {text}\n")
    if details:
        sys.stderr.write(details.rstrip() + "\n")
    raise SystemExit(exit_code) from None


if __name__ == "__main__":
    main()
