"""What the README shows is run here, to the letter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_scores_a_policy(tmp_path):
    example = max(blocks("python"), key=len)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pool_rows" in done.stdout or "rows" in done.stdout
    assert "feedback after iteration 1 of 2" in done.stdout


def test_every_command_of_the_readme_exists():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    targets = {line.split()[1] for line in commands if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    names = {line.split()[1] for line in commands if line.startswith("curation-env ")}
    listed = subprocess.run(
        [sys.executable, "-m", "curation_env.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert names
    assert all(name in listed for name in names)
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(([\w./]+)\)", README))


def test_files_that_the_pages_on_the_real_task_cite_exist():
    for page in ("llava.md", "fidelity.md"):
        text = (ROOT / "docs" / page).read_text()
        cited = set(re.findall(r"`((?:conf|curation_env|tests|experiments|docs)/[\w./*-]+)`", text))
        assert [name for name in cited if not list(ROOT.glob(name.rstrip("/")))] == []
        assert cited
