"""The module and the command `curation`, in processes of their own, against a real session."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from workspace_support import Client, Host, make_rows, make_workspace

from curation_env.session import Session
from curation_env.submission import read_submission


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def session(host: Host) -> Iterator[Session]:
    with Session(None, host) as running:
        yield running


@pytest.fixture
def client(tmp_path: Path, session: Session) -> Client:
    return Client(tmp_path, make_workspace(tmp_path / "workspace"), session.path)


def test_the_module_answers(client: Client, host: Host) -> None:
    done = client.python(
        "import curation, json, numpy as np\n"
        "rows = curation.pool(); loss = curation.signal('loss')\n"
        "assert len(rows) == len(loss) == 12 and loss.dtype == np.float32 and np.isnan(loss[0])\n"
        "assert rows[0]['image'] is None and rows[1]['image']['bytes'][:4] == b'\\x89PNG'\n"
        "assert len(rows.filter(lambda row: row['n_tokens'] > 10)) == 6\n"
        "loss[0] = 1.0\n"
        "assert curation.select(rows.select([3, 1])) == 2\n"
        "print(json.dumps([curation.task()['rows'], curation.history()[0]['score'], curation.seed()]))\n"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [4, 40.0, 7]
    assert host.signals_charged == 1
    submission = read_submission(client.workspace)
    assert submission is not None
    assert submission.ids == (f"{1:032x}", f"{3:032x}")


def test_import_is_quick_and_light(client: Client) -> None:
    done = client.python(
        "import sys, time\n"
        "start = time.perf_counter(); import curation; seconds = time.perf_counter() - start\n"
        "curation.select(['a', 'b'])\n"
        "assert not {'numpy', 'datasets', 'pyarrow', 'PIL', 'socket'} & set(sys.modules)\n"
        "print(seconds)"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1  # 8 ms where nothing else runs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("['b', 'a']", ["a", "b"]),
        ("(x for x in 'ab')", ["a", "b"]),
        ("{'a': 2, 'b': 1}", ["a", "a", "b"]),
        ("__import__('numpy').array(['b', 'a'])", ["a", "b"]),
        ("__import__('pyarrow').array(['b', 'a'])", ["a", "b"]),
        ("__import__('pandas').Series(['b', 'a'])", ["a", "b"]),
        ("[]", []),
    ],
)
def test_select_takes_what_holds_ids(client: Client, given: str, expected: list[str]) -> None:
    done = client.python(f"import curation; print(curation.select({given}))")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(expected)
    submission = read_submission(client.workspace)
    assert submission is not None
    assert list(submission.ids) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("'a'", "list of ids"),
        ("[1, 2]", "by position"),
        ("['a b']", "not a row id"),
        ("['']", "not a row id"),
        ("['a'], {'b': [{'user': 'u', 'assistant': 'v'}]}", "not selected"),
        ("['a'], {'a': [{'user': 'u'}]}", "must be a list"),
        ("['a'], {'a': []}", "no turn"),
    ],
)
def test_select_refuses_what_is_no_selection(client: Client, given: str, reason: str) -> None:
    done = client.python(f"import curation; curation.select({given})")
    assert done.returncode == 1
    assert reason in done.stderr
    assert read_submission(client.workspace) is None


def test_columns_come_without_datasets(client: Client) -> None:
    done = client.python(
        "import sys, curation\n"
        "columns = {name: curation.column(name) for name in ('id', 'source', 'n_tokens')}\n"
        "assert 'datasets' not in sys.modules\n"
        "rows = curation.pool()\n"
        "for name, values in columns.items():\n"
        "    assert values.tolist() == list(rows[name]), name\n"
        "assert columns['n_tokens'].dtype == 'int32'\n"
        "print(curation.select(columns['id'][columns['source'] == 'source-1']))\n"
        "curation.column('image')"
    )
    assert done.stdout.strip() == "4"
    assert "column gives id, source, n_tokens, not 'image': pool() has whole rows" in done.stderr


def test_select_replaces_the_whole_selection(client: Client) -> None:
    done = client.python(
        "import curation\n"
        "curation.select(['a'], {'a': [{'user': 'é', 'assistant': 'ü\\nx'}]})\n"
        "first = sorted(p.name for p in (curation.api.workspace() / '.submission').iterdir())\n"
        "assert first == ['ids.txt', 'rewrites.jsonl'], first\n"
    )
    assert done.returncode == 0, done.stderr
    submission = read_submission(client.workspace)
    assert submission is not None
    assert submission.rewrites == {"a": [{"user": "é", "assistant": "ü\nx"}]}
    assert client.python("import curation; curation.select(['b'])").returncode == 0
    submission = read_submission(client.workspace)
    assert submission is not None
    assert (submission.ids, dict(submission.rewrites)) == (("b",), {})


def test_select_does_not_write_through_a_link(client: Client, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (client.workspace / ".submission").symlink_to(tmp_path / "elsewhere")
    done = client.python("import curation; curation.select(['a'])")
    assert "must be a folder" in done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_seed_of_a_scored_run(client: Client) -> None:
    done = client.python("import os; os.environ['CURATION_SEED'] = '41'; import curation; print(curation.seed())")
    assert done.stdout == "41\n"


def test_without_a_host_everything_says_so(tmp_path: Path) -> None:
    client = Client(tmp_path, tmp_path, None)
    (tmp_path / "p.py").write_text("print(1)")
    for arguments in (["task"], ["history"], ["signal", "loss"], ["submit", "p.py"], ["wait", "t-1"], ["card", "x"]):
        done = client.run(*arguments)
        assert done.returncode == 2
        assert "inside a running episode" in done.stderr
        assert "Traceback" not in done.stderr
    assert "no pool at" in client.run("show", "0").stderr
    assert "nothing is selected yet" in client.run("check").stderr
    done = client.python("import curation\ntry: curation.task()\nexcept curation.CurationError as e: print(e.code)")
    assert done.stdout == "unreachable\n"
    assert "is this running inside the sandbox" in client.python("import curation; curation.pool()").stderr


def test_task_and_history_read_as_text_and_json(client: Client) -> None:
    text = client.run("task").stdout
    assert "rows" in text
    assert "signals  loss" in text
    assert client.json("task")["seed"] == 7
    lines = client.run("history").stdout.splitlines()
    assert lines[0].split() == ["iteration", "status", "score", "A", "B"]
    assert lines[2].split() == ["1", "rejected", "-", "-", "-"]
    assert client.json("history")["history"][0]["scores"] == {"A": 35.0, "B": 45.0}


def test_show_prints_and_draws_rows(client: Client) -> None:
    third = f"{3:032x}"
    done = client.run("show", third, "-", "-o", "sheet.png", stdin="0\n 1")
    assert done.returncode == 0, done.stderr
    assert f"{third}  source source-0  image img/3.png  tokens 8" in done.stdout
    assert "Q: What is 0?" in done.stdout
    with Image.open(client.workspace / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.getpixel((150, 100)) == (3, 6, 0)
    rows = client.json("show", third)["rows"]
    assert rows[0]["image"]["path"] == "img/3.png"
    unknown = client.run("show", "abc", "99")
    assert unknown.returncode == 2
    assert "2 of 2 are no rows of the pool (12 rows): abc, 99" in unknown.stderr
    assert "1 to 60 rows" in client.run("show", *["1"] * 61, "-o", "big.png").stderr


def test_signal_is_summed_up_and_saved(client: Client, host: Host) -> None:
    summary = client.json("signal", "loss", "-o", "loss.npy")
    assert (summary["rows"], summary["undefined"], summary["percentiles"]["50%"]) == (12, 1, 6.0)
    assert np.load(client.workspace / "loss.npy").shape == (12,)
    assert "50%   6" in client.run("signal", "loss").stdout
    assert host.signals_charged == 2
    refused = client.run("signal", "gradients")
    assert (refused.returncode, refused.stderr) == (2, "curation: no signal 'gradients'; there is loss\n")


def test_check_asks_the_gate(client: Client) -> None:
    ids = client.workspace / "ids.txt"
    ids.write_text("".join(f"{row['id']}\n" for row in make_rows(3)))
    good = client.run("check", "ids.txt")
    assert (good.returncode, good.stdout) == (0, "3 of 4 rows\n")
    client.python("import curation; curation.select([r['id'] for r in curation.pool()])")
    assert client.run("check").returncode == 1
    rewrites = client.workspace / "rewrites.jsonl"
    rewrites.write_text(json.dumps({"id": f"{1:032x}", "conversation": [{"user": "a", "assistant": "b"}]}))
    assert client.json("check", "ids.txt", "--rewrites", "rewrites.jsonl")["rewrites"] == 1
    ids.write_text("nobody\n")
    refused = client.run("check", "ids.txt")
    assert (refused.returncode, refused.stdout) == (1, "1 unknown ids\n")


def test_card_is_read_and_recorded(client: Client, host: Host) -> None:
    assert client.run("card", "el2n").stdout.startswith("# EL2N")
    assert host.opened == ["el2n"]


def test_submit_gives_a_ticket_and_wait_its_result(client: Client, session: Session) -> None:
    session.deferred = False
    (client.workspace / "p.py").write_text("print(1)\n")
    state = client.json("submit", "p.py")
    assert state["state"] == "waiting"
    name = state["ticket"]
    assert f"next: curation wait {name}" in client.run("submit", "p.py").stdout
    assert client.run("wait", name, "--timeout", "0").returncode == 3

    killed = client.start("wait", name)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    def play() -> None:
        ticket = session.next_ticket(timeout=10)
        assert ticket is not None
        time.sleep(0.2)
        session.resolve(ticket.name, {"status": "scored", "score": 51.5, "message": "score 51.5, +11.5"})

    player = threading.Thread(target=play)
    player.start()
    done = client.run("wait", name)
    player.join()
    assert (done.returncode, done.stdout) == (0, f"{name}: done (scored)\nscore 51.5, +11.5\n")
    assert client.json("submit", "p.py")["result"]["score"] == 51.5
    assert client.json("submit", "p.py", "--again")["ticket"] == f"{name}-2"


def test_inside_a_shell_action_a_ticket_is_the_next_action(client: Client) -> None:
    (client.workspace / "p.py").write_text("print(1)\n")
    submitted = client.run("submit", "p.py")
    assert "becomes the next POLICY action" in submitted.stdout
    started = time.monotonic()
    waited = client.run("wait", submitted.stdout.split(":")[0])
    assert waited.returncode == 3
    assert "becomes the next POLICY action" in waited.stdout
    assert time.monotonic() - started < 10


def test_usage_is_explained(client: Client) -> None:
    assert "submit" in client.run("--help").stdout
    assert client.run("dance").returncode == 2
    assert "No such file" in client.run("submit", "missing.py").stderr
    (client.workspace / "big.py").write_bytes(b"#" * 1_000_001)
    assert "over 1,000,000 bytes" in client.run("submit", "big.py").stderr


def test_a_reader_that_has_enough_is_no_error(client: Client) -> None:
    done = subprocess.run(
        ["sh", "-c", "curation show 0 1 2 3 4 | head -1; curation task | true"],
        env=client.environment,
        cwd=client.workspace,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(f"{0:032x}")
    assert not done.stderr


def test_it_imports_nothing_of_the_core(client: Client) -> None:
    done = client.python(
        "import sys; sys.modules['curation_env'] = None\n"
        "import curation, curation.cli, curation.render, curation.rows, curation.sheet; print('ok')"
    )
    assert done.stdout == "ok\n", done.stderr
