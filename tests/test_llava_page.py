"""docs/llava.md is followed to the letter: its commands, over stand-ins of the public files in the real formats.

The package is copied with other numbers in its data files: the md5 of the stand-ins' TSV files, the width of the
stand-in's language model, and smaller budgets. `vllm` is a program that serves the miniature's judge.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ingest_support import make_source, picture, put, record, words, write_records
from llava_parts_support import make_parts
from vlm8_support import write_sets

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "llava.md").read_text()
JUDGE = "import sys; from curation_env.mini import judge; judge.MODEL = sys.argv[4]; sys.argv[1:] = sys.argv[5:]"


def blocks(language: str) -> list[str]:
    """What the page has the reader run: `sh` and `python`. Its `bash` blocks install and clone, `text` is printed."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's home folder: the public files where the page says, and an empty cache."""
    folder = tmp_path_factory.mktemp("home")
    records = make_source(folder / "llava-665k", rows=90)
    put(folder / "llava-665k", "vg/VG_100K_2/90.jpg", picture(90))
    write_records(folder / "llava-665k", [*records, record(90, "vg/VG_100K_2/90.jpg", *words(90))])
    make_parts(folder / "llava-parts")
    write_sets(folder / "vlm8")
    return folder


@pytest.fixture(scope="module")
def shell(home: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs a command as the reader would; returns what it printed."""
    site, programs, clone = (tmp_path_factory.mktemp(name) for name in ("site", "bin", "clone"))
    package, hide = site / "curation_env", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "curation_env", package, ignore=hide)
    for name in ("agents", "conf", "envs", "wrappers"):
        shutil.copytree(ROOT / name, package / name, ignore=hide)
    small(package / "conf", home / "vlm8")
    for name in ("agents", "conf"):
        (clone / name).symlink_to(package / name)
    python = f'exec {sys.executable} -m curation_env.cli "$@"\n'
    scripts = {"curation-env": python, "vllm": f'exec {sys.executable} -c "{JUDGE}; judge.main()" "$@"\n'}
    scripts["python"] = f'exec {sys.executable} "$@"\n'
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CURATION_")}
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(site), "PATH": f"{programs}:{kept['PATH']}"}

    def run(command: str, expect: int = 0) -> str:
        done = subprocess.run(
            ["sh", "-e", "-c", command], capture_output=True, text=True, timeout=300, env=environment, cwd=clone
        )
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def small(conf: Path, sets: Path) -> None:
    """Make the package's data files those of the stand-ins."""

    def change(path: Path, **fields: object) -> None:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}, sort_keys=False))

    for name in ("vlm8-v1", "vlm5-v1"):
        benchmarks = yaml.safe_load((conf / "suite" / f"{name}.yaml").read_text())["benchmarks"]
        for one in benchmarks.values():
            one |= {"md5": hashlib.md5((sets / one["file"]).read_bytes()).hexdigest(), "max_new_tokens": 4}
        change(conf / "suite" / f"{name}.yaml", benchmarks=benchmarks)
    change(conf / "student" / "llava-1.5-7b.yaml", shape={"hidden_size": 32, "num_hidden_layers": 2})
    change(conf / "task" / "llava.yaml", rows=24, limits={"memory_mb": 2048})


def test_the_page_leads_to_the_first_iteration_with_and_without_a_judge(home: Path, shell) -> None:
    look, judge, *prepare, without_a_judge = blocks("sh")
    said = shell(look, expect=1)
    names = ("lmsys/vicuna-7b-v1.5", "liuhaotian/LLaVA-Instruct-150K", "OCRBench.tsv", "CURATION_JUDGE_URL", "GPU")
    assert [name for name in names if name not in said] == []
    for name in re.findall(r"^\| `([^`]+)` ", PAGE, flags=re.MULTILINE):
        assert name in said, f"the page's table names {name}, and doctor does not"
    said = "".join(shell(command) for command in prepare)
    assert "suite vlm8-v1" in said
    assert "91 of 665,298 rows" in said
    assert "blocked by the audit" in said
    doctor = shell(f"{judge}\ncuration-env doctor llava || true")
    missing = [line.split("│")[1].strip() for line in doctor.splitlines() if "│ missing" in line]
    assert [what for what in missing if not what.startswith("GPU")] == []
    (home / "first.py").write_text(blocks("python")[0])
    printed = shell(f"{judge}\npython ~/first.py")
    assert "feedback after iteration 1 of 10" in printed
    header = re.search(r"^ +HallusionBench  LLaVABench.*$", PAGE, flags=re.MULTILINE)
    assert header is not None
    assert header[0] in printed, "the table has other columns than the page shows"

    said = shell(without_a_judge)
    assert "suite vlm5-v1" in said
    assert "feedback after iteration 1 of 1" in said
