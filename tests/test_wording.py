"""The judge's prompts from a checkout: a small one of our own, with VLMEvalKit's names and none of its text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from curation_env.errors import MissingAssets, TaskMismatch
from curation_env.evaluation.scorers import make_scorer
from curation_env.evaluation.suite import Item, Suite
from curation_env.evaluation.wording import SETTING, Wording, resolved
from curation_env.task import Task, conf_dir

FILES = {
    "vlmeval/dataset/utils/llavabench.py": (
        "import something_that_is_not_installed\n"
        "rule_dict = {'llava_bench_conv': {'role': 'R', 'prompt': 'rate'}}\n"
        "def build_prompt(line):\n"
        "    rule = rule_dict['llava_bench_' + line['category']]\n"
        "    return ' / '.join([rule['role'], rule['prompt'], line['caption'], line['gpt4_ans'], line['prediction']])\n"
    ),
    "vlmeval/dataset/utils/mathvista.py": (
        "def get_gpt4_ICE():\n"
        "    return ['one example']\n"
        "def build_mathvista_gpt4_prompt(line):\n"
        "    return ' / '.join([*get_gpt4_ICE(), line['question'], line['prediction']])\n"
        "raise RuntimeError('the rest of the file is not run')\n"
    ),
    "vlmeval/dataset/utils/mmvet.py": (
        "def build_mmvet_gpt4_prompt(line):\n"
        "    return ' / '.join([line['question'], line['answer'], line['prediction']])\n"
    ),
    "vlmeval/dataset/image_vqa.py": (
        "class LLaVABench:\n    def evaluate(self):\n        system_prompt = 'be fair'\n        return system_prompt\n"
    ),
}
ITEM = Item("B", "1", "what ?", "a<OR>b", "conv", (), {}, {
    "caption": "a picture", "gpt4_ans": "a thing", "question_type": "free_form", "answer_type": "integer"
})  # fmt: skip


def blob(text: str) -> str:
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


BLOBS = {name: blob(text) for name, text in FILES.items()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_judge_is_asked_in_the_checkouts_words(checkout: Path) -> None:
    wording = Wording(checkout, "c0ffee", BLOBS)
    asked = {rule: make_scorer(rule, wording).ask(ITEM, "3 or so") for rule in ("llavabench", "mathvista", "mmvet")}
    found = {rule: (r.system, r.message, r.temperature, r.max_tokens) for rule, r in asked.items() if r is not None}
    assert found == {
        "llavabench": ("be fair", "R / rate / a picture / a thing / 3 or so", 0.2, 2048),
        "mathvista": ("", "one example / what ? / 3 or so", 0.0, 128),
        "mmvet": ("", "what ? / a<OR>b / 3 or so", 0.0, 2048),
    }


def test_answers_are_accepted_by_the_same_rules_in_any_words(checkout: Path) -> None:
    wording = Wording(checkout, "c0ffee", BLOBS)
    for rule, good, bad in (("llavabench", "9 7\nso", "9"), ("mmvet", "0.4", "2")):
        for words in (wording, None):
            request = make_scorer(rule, words).ask(ITEM, "a")
            assert request is not None
            assert request.accept(good)
            assert not request.accept(bad)


def test_another_file_or_none_is_refused(checkout: Path) -> None:
    path = checkout / "vlmeval/dataset/utils/mmvet.py"
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(
        TaskMismatch, match=r"mmvet\.py is not the file of VLMEvalKit's commit c0ffee: check that commit"
    ):
        Wording(checkout, "c0ffee", BLOBS)
    path.unlink()
    with pytest.raises(
        MissingAssets, match=f"{SETTING} names .*no checkout of VLMEvalKit: vlmeval/dataset/utils/mmvet"
    ):
        Wording(checkout, "c0ffee", BLOBS)


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        ("vlmeval/dataset/utils/mathvista.py", "get_gpt4_ICE", "has no get_gpt4_ICE"),
        ("vlmeval/dataset/image_vqa.py", "system_prompt", "has no system message"),
    ],
)
def test_a_file_without_what_is_looked_for(name: str, lost: str, words: str, checkout: Path) -> None:
    text = FILES[name].replace(lost, "other")
    (checkout / name).write_text(text)
    with pytest.raises(MissingAssets, match=words):
        Wording(checkout, "c0ffee", {**BLOBS, name: blob(text)})


def config(folder: Path) -> dict[str, Any]:
    import yaml

    suite = yaml.safe_load((conf_dir() / "suite" / "vlm8-v1.yaml").read_text())
    suite["judge"]["prompts"] = {"commit": "c0ffee1234", "files": BLOBS}
    (folder / "suite.yaml").write_text(json.dumps(suite))  # JSON is YAML
    return suite


def test_the_suites_name_and_the_tasks_hash_say_whose_words(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = config(checkout)
    monkeypatch.delenv(SETTING, raising=False)
    own = Task.load("nano").model_copy(update={"suite": str(checkout / "suite")})
    assert own.suite_title == "vlm8-v1 (judge asked in own words)"
    assert Suite.model_validate(own.suite_config).judge is not None
    assert len(own.judge_free) == 5
    before = own.hash
    monkeypatch.setenv(SETTING, str(checkout))
    theirs = Task.load("nano").model_copy(update={"suite": str(checkout / "suite")})
    assert theirs.suite_title == "vlm8-v1 (judge asked in VLMEvalKit c0ffee1)"
    assert theirs.hash != before
    assert str(checkout) not in json.dumps(theirs.suite_config)  # where it lies moves no score
    assert resolved(suite)["judge"]["prompts"]["source"] == "vlmevalkit"
    (checkout / "vlmeval/dataset/image_vqa.py").write_text("")
    with pytest.raises(TaskMismatch):
        resolved({**suite, "judge": {**suite["judge"], "prompts": {"commit": "c0", "files": BLOBS}}})


def test_a_suite_without_such_prompts_stays_as_it_is(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Task.load("nano").hash
    monkeypatch.setenv(SETTING, str(checkout / "nowhere"))
    assert Task.load("nano").hash == before
    assert Task.load("nano").suite_title == "mini-v1"


def test_the_suite_without_a_judge_is_the_five_that_rules_grade() -> None:
    eight, five = (
        yaml.safe_load((conf_dir() / "suite" / f"{name}.yaml").read_text()) for name in ("vlm8-v1", "vlm5-v1")
    )
    free = {name: one for name, one in eight["benchmarks"].items() if not one["judge"]}
    assert five["benchmarks"] == free
    assert five["spreadsheets"] is eight["spreadsheets"] is True
    assert "judge" not in five
