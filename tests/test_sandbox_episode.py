"""What the sandbox of a real episode shows, from a shell action and from a policy: the mounts it needs and no more."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sandbox_support import ENGINES, new_nap

from curation_env.actions import policy, shell
from curation_env.pool import Pool

# Evaluation items, their split and answers, the truth about the pool, the ledger, other runs.
SECRET_NAMES = ("*.tsv", "truth*", "items.parquet", "split.json", "sealed*", "journal*", "episode-*", "blocked*")
# Parts of the system and of Python may be called so too. What of ours could lie in them is tested as hidden folders.
NOT_OURS = ("/proc", "/sys", "/usr", sys.prefix, sys.base_prefix)

# Compact, since the answer to a policy shows the end of its output alone.
PROBE = """
import hashlib, json, os, socket, subprocess, sys
import curation
secret_names, not_ours, blocked, paths, port = json.loads({known!r})
match = " -o ".join(f"-name '{{name}}'" for name in secret_names)
skip = " -o ".join(f"-path {{path}}" for path in not_ours)
find = f"find / \\\\( {{skip}} \\\\) -prune -o \\\\( {{match}} \\\\) -print"
found = subprocess.run(["sh", "-c", find], capture_output=True, text=True).stdout.split("\\n")[:-1]
rows = b"".join(open(os.path.join(folder, name), "rb").read()
                for folder, _, names in os.walk("/workspace/pool") for name in names)
targets = [line.split()[4] for line in open("/proc/self/mountinfo")]
commands = " ".join(open(f"/proc/{{pid}}/cmdline").read() for pid in os.listdir("/proc") if pid.isdigit())
environments = ""
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        environments += open(f"/proc/{{pid}}/environ").read()
    except OSError:
        pass
try:
    socket.create_connection(("127.0.0.1", port), 2)
    network = "reached"
except ConnectionRefusedError:
    network = "refused"
print("PROBE" + json.dumps({{
    "found": found[:20],
    "ids": hashlib.sha256("\\n".join(curation.pool()["id"]).encode()).hexdigest(),
    "blocked": sum(id.encode() in rows for id in blocked),
    "mounts": sorted(path for path in targets if path.startswith(("/workspace", "/run"))),
    "reached": [path for path in paths if os.path.exists(path)],
    "variables": sorted(set(os.environ) - {{"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}}),
    "planted": "planted" in environments + "".join(os.environ.values()),
    "nap": {nap!r}[::-1] in commands,
    "processes": sum(map(str.isdigit, os.listdir("/proc"))),
    "interfaces": [line.split(":")[0].strip() for line in list(open("/proc/net/dev"))[2:]],
    "network": network,
}}) + "PROBE", flush=True)
"""
VARIABLES = {"PATH", "HOME", "USER", "LANG", "TERM", "TMPDIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
VARIABLES |= {"PYTHONUNBUFFERED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
VARIABLES |= {"CURATION_WORKSPACE", "CURATION_SOCKET"}
SEEDS = {"CURATION_SEED", "PYTHONHASHSEED"}
MOUNTS = ["/run/curation/socket", "/workspace", "/workspace/feedback", "/workspace/pool", "/workspace/student"]


@pytest.fixture
def runs() -> Iterator[Path]:
    """A folder for runs where it is hardest to hide: in the harness's Python, which is shown inside."""
    folder = Path(tempfile.mkdtemp(dir=sys.prefix, prefix="planted-"))
    yield folder / "runs"
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ENGINES)
def test_an_episode_shows_what_the_design_says_and_no_more(
    kind: str, runs: Path, nano: Callable[..., Any], data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_KEY", "planted")
    env = nano(sandbox=kind, run_dir=runs / "one")
    env.reset(seed=0)
    episode = env.unwrapped.episode
    assert episode.sandbox.kind == kind
    other = runs / "two/episode-0000"
    other.mkdir(parents=True)
    (other / "journal.jsonl").write_text("planted")
    assets = episode.pipeline.assets
    view, whole = episode.pipeline.view, Pool.open(assets.pool)
    blocked = sorted(set(whole.ids) - set(view.ids))
    assert blocked
    hidden = (data_root, assets.suite, assets.index, episode.run_dir, episode.run_dir / "workspace", other)
    paths = [str(path) for path in hidden]
    nap = new_nap()
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", nap]) as outside:
        try:
            known = json.dumps([SECRET_NAMES, NOT_OURS, blocked[:20], paths, server.getsockname()[1]])
            probe = PROBE.format(known=known, nap=nap[::-1])  # the shell's own command holds the probe
            from_shell = env.step(shell(f"python - <<'END'\n{probe}\nEND"))[0]
            from_policy = env.step(policy(probe + "sys.exit(1)"))[0]
        finally:
            outside.kill()
    for where, observation in (("shell", from_shell), ("policy", from_policy)):
        parts = observation["message"].split("PROBE")
        assert len(parts) == 3, observation["message"]
        seen = json.loads(parts[1])
        assert seen["found"] == [], where
        assert seen["ids"] == hashlib.sha256("\n".join(view.ids).encode()).hexdigest()
        assert seen["blocked"] == 0
        assert seen["mounts"] == sorted([*MOUNTS, *(["/run/link"] if kind == "docker" else [])])
        assert seen["reached"] == []
        assert set(seen["variables"]) == VARIABLES | (SEEDS if where == "policy" else set())
        assert not seen["planted"]
        assert not seen["nap"]
        assert seen["processes"] < 10
        assert (seen["interfaces"], seen["network"]) == (["lo"], "refused")
