"""Policies in a real sandbox: what they select is read, and every way to fail is told apart and told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workspace_support import Host, make_rows

from curation_env.errors import AgentError, InvalidSubmission, PolicyFailed, SandboxError
from curation_env.policy import FrontMatter, PolicyRun, parse_front_matter, run_policy
from curation_env.pool import write_rows
from curation_env.sandbox.base import Mount, SandboxConfig, SandboxDied, SandboxLimits
from curation_env.sandbox.bubblewrap import BubblewrapSandbox
from curation_env.sandbox.dummy import Answer, DummySandbox
from curation_env.session import Session

SELECT_TWO = f"import curation; curation.select(['{0:032x}', '{1:032x}'])\n"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "rows"
    write_rows(folder, make_rows(12))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine\n")
    (folder / ".submission").mkdir()
    (folder / ".submission/ids.txt").write_text("from-before\n")
    return folder


Run = Callable[..., PolicyRun]


@pytest.fixture
def run(workspace: Path, pool: Path) -> Iterator[Run]:
    with Session(None, Host(), read_only=True) as session:
        config = SandboxConfig(
            workspace=workspace,
            mounts=(Mount(pool, "/workspace/pool"),),
            socket=session.path,
            limits=SandboxLimits(memory_mb=512, disk_mb=64, file_mb=50),
            label="test",
        )

        def go(source: str, *, timeout: float = 20.0, seed: int = 11, snapshot_mb: int = 10) -> PolicyRun:
            before = sorted(str(path) for path in workspace.rglob("*"))
            result = run_policy(
                source,
                workspace=workspace,
                make=BubblewrapSandbox,
                config=config,
                seed=seed,
                timeout=timeout,
                snapshot_mb=snapshot_mb,
            )
            assert sorted(str(path) for path in workspace.rglob("*")) == before
            assert [path.name for path in workspace.parent.iterdir()] == ["workspace"]
            return result

        yield go


def test_a_policy_selects(run: Run, workspace: Path) -> None:
    (workspace / "helper.py").write_text("def least(rows, n):\n    return sorted(rows['id'])[:n]\n")
    result = run(
        "import curation, helper, os, random\n"
        "assert curation.task()['rows'] == 4 and len(curation.signal('loss')) == 12\n"
        "assert open('notes.txt').read() == 'mine\\n' and not os.path.exists('.submission')\n"
        "print('seed', curation.seed(), flush=True)\n"
        "rows = curation.pool().filter(lambda row: row['image'] is not None)\n"
        "curation.select(helper.least(rows, 3))\n"
    )
    assert result.error is None, result.output
    assert result.submission is not None
    assert result.submission.ids == tuple(f"{index:032x}" for index in (1, 2, 3))
    assert result.output == "seed 11"
    assert 0 < result.seconds < 20


def test_the_snapshot_is_named_by_its_content(run: Run, workspace: Path) -> None:
    first = run(SELECT_TWO)
    os.utime(workspace / "notes.txt", (1, 1))
    (workspace / ".submission/ids.txt").write_text("other\n")
    (workspace / "policy.py").write_text("raise SystemExit(9)\n")
    assert run(SELECT_TWO).snapshot_digest == first.snapshot_digest != ""
    (workspace / "notes.txt").write_text("changed\n")
    assert run(SELECT_TWO).snapshot_digest != first.snapshot_digest


def test_the_same_seed_walks_sets_in_the_same_order(run: Run) -> None:
    source = "import curation; print(list({'a', 'b', 'c', 'd', 'e', 'f'})); curation.select(['x'])"
    assert run(source).output == run(source).output


@pytest.mark.parametrize(
    ("source", "message", "output"),
    [
        ("print('before'); raise KeyError('no such source')", "exit code 1: KeyError: 'no such source'", "before"),
        ("def f(:\n", "SyntaxError", ""),
        ("print('nothing to do')", "selected nothing", "nothing to do"),
        ("import os; os.mkdir('.submission')", "selected nothing", ""),
        (SELECT_TWO + "raise SystemExit(3)", "exit code 3", ""),
        ("import os; print('x', flush=True); os.kill(os.getpid(), 9)", "exit code 137", "x"),
        ("x = []\nwhile True: x.append(bytes(2**24))", "512 MB of memory|MemoryError", ""),
        ("open('.submission', 'w').write('a')", "must be a folder", ""),
        ("import os; os.symlink('/etc', '.submission')", "must be a folder", ""),
        ("import os; os.makedirs('.submission/ids.txt')", "regular file", ""),
        ("import os; os.mkdir('.submission'); os.mkfifo('.submission/ids.txt')", "regular file", ""),
        ("import os; os.mkdir('.submission'); os.symlink('/etc/passwd', '.submission/ids.txt')", "regular file", ""),
        ("import os; os.mkdir('.submission'); os.symlink('../notes.txt', '.submission/ids.txt')", "regular file", ""),
        ("import os; os.mkdir('.submission'); open('.submission/ids.txt', 'wb').write(b'\\xff')", "not UTF-8", ""),
        (SELECT_TWO + "open('.submission/rewrites.jsonl', 'w').write('[' * 100000)", "not a JSON object", ""),
        ("\ud800", "SyntaxError|exit code 1", ""),
    ],
)
def test_failures_are_told(run: Run, source: str, message: str, output: str) -> None:
    result = run(source)
    assert result.submission is None
    assert isinstance(result.error, (PolicyFailed, InvalidSubmission))
    assert isinstance(result.error, AgentError)
    with pytest.raises(type(result.error), match=message):
        raise result.error
    assert output in result.error.details


def test_a_policy_that_loops_is_stopped_with_all_it_started(run: Run) -> None:
    source = SELECT_TWO + (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: os.setsid()\n"
        "print('on and on', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    started = time.monotonic()
    result = run(source, timeout=1.0)
    assert time.monotonic() - started < 8
    assert isinstance(result.error, PolicyFailed)
    assert "longer than its 1 s" in str(result.error)
    assert "on and on" in result.output


def test_what_it_leaves_running_cannot_change_what_it_selected(run: Run) -> None:
    source = SELECT_TWO + (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    time.sleep(1)\n"
        "    curation.select(['late'])\n"
        "    time.sleep(60)\n"
    )
    result = run(source)
    assert result.error is None
    assert result.submission is not None
    assert set(result.submission.ids) == {f"{0:032x}", f"{1:032x}"}


def test_output_is_bounded(run: Run) -> None:
    source = SELECT_TWO + "import os\nfor _ in range(1000): os.write(1, b'\\x1b[2Jy' * 20_000)\nos.write(1, b'the end')"
    result = run(source)
    assert result.error is None
    assert len(result.output) < 21_000
    assert "left out" in result.output
    assert result.output.endswith("the end")
    assert "\x1b" not in result.output


def test_a_workspace_that_is_too_large_says_what_to_delete(run: Run, workspace: Path) -> None:
    (workspace / "cache").mkdir()
    (workspace / "cache/a.npy").write_bytes(bytes(1_500_000))
    with open(workspace / "hole", "wb") as stream:
        stream.truncate(10**12)
    result = run(SELECT_TWO, snapshot_mb=1)
    assert isinstance(result.error, PolicyFailed)
    assert "larger than 1 MB" in str(result.error)
    assert "'hole' (1,000,000.0 MB, 1 files), 'cache' (1.5 MB" in str(result.error)
    assert result.snapshot_digest == ""


def test_links_and_odd_files_of_the_workspace_are_not_followed(run: Run, workspace: Path, tmp_path: Path) -> None:
    (workspace / "link").symlink_to("/etc/hostname")
    (workspace / "policy.py").symlink_to(workspace / "notes.txt")
    os.mkfifo(workspace / "fifo")
    result = run(SELECT_TWO + "import os; print(os.readlink('link'), os.path.exists('fifo'))")
    assert result.error is None
    assert result.output == "/etc/hostname False"
    assert (workspace / "notes.txt").read_text() == "mine\n"


def test_folders_without_end_are_refused_and_removed(run: Run, workspace: Path) -> None:
    dig = (
        "import os\nfor _ in range(400):\n    os.mkdir('d'); os.chdir('d')\nos.chdir('/workspace'); os.chmod('d', 0)\n"
    )
    run(SELECT_TWO + dig)  # `run` looks that nothing is left of the copy
    subprocess.run([sys.executable, "-c", dig.replace("/workspace", str(workspace))], cwd=workspace, check=True)
    result = run(SELECT_TWO)
    assert isinstance(result.error, PolicyFailed)
    assert "nested more than" in str(result.error)


def test_a_policy_that_kills_processes_does_not_end_the_run(run: Run) -> None:
    result = run("import os\nos.kill(-1, 9)")
    assert isinstance(result.error, PolicyFailed)


def scripted(workspace: Path, answer: Answer) -> tuple[Callable[[], PolicyRun], list[DummySandbox]]:
    made: list[DummySandbox] = []

    def make(config: SandboxConfig) -> DummySandbox:
        made.append(DummySandbox(config, {"python policy.py": answer}))
        return made[-1]

    def go() -> PolicyRun:
        return run_policy(
            "pass",
            workspace=workspace,
            make=make,
            config=SandboxConfig(workspace=workspace),
            seed=0,
            timeout=5,
            snapshot_mb=10,
        )

    return go, made


def test_a_sandbox_that_dies_once_is_tried_again(workspace: Path) -> None:
    def dies_first(sandbox: DummySandbox, command: str, stdin: bytes) -> Answer:
        if len(made) == 1:
            raise SandboxDied("gone")
        sandbox.write(".submission/ids.txt", b"a\n")
        return ""

    go, made = scripted(workspace, dies_first)
    result = go()
    assert result.submission is not None
    assert result.submission.ids == ("a",)
    assert not any(sandbox.alive() for sandbox in made)


def test_a_sandbox_that_always_dies_under_it_is_the_policys_fault(workspace: Path) -> None:
    go, made = scripted(workspace, SandboxDied("gone"))
    result = go()
    assert isinstance(result.error, PolicyFailed)
    assert "twice" in str(result.error)
    assert len(made) == 2


def test_an_engine_that_fails_is_nobodys_fault(workspace: Path) -> None:
    go, _ = scripted(workspace, SandboxError("the engine failed"))
    with pytest.raises(SandboxError, match="the engine failed"):
        go()
    assert [path.name for path in workspace.parent.iterdir()] == ["workspace"]


def test_what_a_killed_run_left_is_removed(workspace: Path) -> None:
    left = workspace.parent / ".workspace.policy-old"
    left.mkdir()
    go, _ = scripted(workspace, "")
    go()
    assert not left.exists()


FULL = """#!/usr/bin/env python
# A policy.
\"\"\"
parent: 3
family: loss window
cites: [el2n, d4]
evidence: >
  MiniMMStar fell by 4 points
  when captions went up.
failure_mode: noisy top of the loss
adaptation: drop the rows above the 95th percentile
\"\"\"
import curation
"""


def test_front_matter_is_read() -> None:
    matter = parse_front_matter(FULL)
    assert matter.parent == 3
    assert matter.cites == ["el2n", "d4"]
    assert matter.evidence == "MiniMMStar fell by 4 points when captions went up."
    assert matter.adaptation.endswith("percentile")


def test_the_example_of_the_documentation_is_valid() -> None:
    page = (Path(__file__).parents[1] / "docs/workspace.md").read_text()
    example = page.split("```python\n")[2].split("```")[0]
    assert parse_front_matter(example).parent == 2


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Balance the sources.", {}),
        ("Note: this has a colon.\nSee: elsewhere", {}),
        ("---\nparent: 1\n\nfamily: a\n---\nThen prose: with colons", {"parent": 1, "family": "a"}),
        ("Prose first.\n\nparent: 2\ncites: el2n\n\nfamily: after the paragraph", {"parent": 2, "cites": ["el2n"]}),
        ("  parent: 2\n  family: indented", {"parent": 2, "family": "indented"}),
        ("parent:\ncites:\nfamily: x", {"family": "x"}),
        ("parent: none", {}),
        ("family: 1.5", {"family": "1.5"}),
        ("family: yes", {"family": "yes"}),
        ("---\n---", {}),
        ("", {}),
    ],
)
def test_front_matter_in_many_forms(docstring: str, expected: dict[str, object]) -> None:
    assert parse_front_matter(f'"""{docstring}"""') == FrontMatter(**expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source", ["", "x = 1\n'''parent: 1'''", "b'parent: 1'", "f'''parent: {1}'''", "'''parent: 1", "\x00", "(" * 5000]
)
def test_a_script_without_a_docstring_has_none(source: str) -> None:
    assert parse_front_matter(source) == FrontMatter()


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        ("parent: x", "parent: Input should be a valid integer"),
        ("parent: -1", "greater than or equal to 0"),
        ("parent: 1\nauthor: me", "author: Extra inputs"),
        ("parent: [1", "not YAML"),
        ("family: &a x\ncites: *a", "aliases are not allowed"),
        ("cites: [[a]]", "cites.0"),
        ("cites: {a: b}", "valid list"),
        ("family: {a: b}", "valid string"),
        ("family: " + "x" * 201, "at most 200"),
        ("cites: [" + "a, " * 21 + "]", "at most 20"),
        ("evidence: " + "x" * 20_000, "16,384 characters"),
        ("cites: " + "[" * 5_000, "not YAML"),
        ("---\nparent: 1", "not closed"),
        ("---\njust text\n---", "key: value"),
        ("family: !!python/object/apply:os.system [ls]", "valid string"),
        ("---\n? [parent]\n: 1\n---", "not YAML"),
    ],
)
def test_malformed_front_matter_is_an_error(docstring: str, reason: str) -> None:
    with pytest.raises(InvalidSubmission, match=reason):
        parse_front_matter(f'"""{docstring}"""')


YAMLISH = st.text(alphabet="parentfmilycs: -[]{}#&*!|>'\"?,%@`\n\t\\\x00\ud800é~0", max_size=200)


@settings(max_examples=400, deadline=None)
@given(st.one_of(YAMLISH, YAMLISH.map("parent: ".__add__), YAMLISH.map(lambda text: f"---\n{text}\n---"), st.text()))
def test_any_docstring_gives_front_matter_or_the_documented_error(text: str) -> None:
    for source in (f'"""{text}"""', f"'{text}'", repr(text), text):
        try:
            assert isinstance(parse_front_matter(source), FrontMatter)
        except InvalidSubmission as error:
            reason = str(error)
            assert len(reason) < 1_000
