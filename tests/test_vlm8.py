"""The eight public sets on the fixtures: against what VLMEvalKit's own code made of them, and by hand."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from training_support import make_init
from vlm8_support import COPY, SETS, picture, write_sets

from curation_env.audit.items import read_items as audited_items
from curation_env.errors import MissingAssets, StageFailed, TaskMismatch
from curation_env.evaluation.judge import Endpoint
from curation_env.evaluation.prepare import prepare_suite
from curation_env.evaluation.run import evaluate
from curation_env.evaluation.scorers import make_scorer
from curation_env.evaluation.split import split_items
from curation_env.evaluation.spreadsheet import read_back
from curation_env.evaluation.suite import Item, Suite, read_items, read_split, read_suite
from curation_env.mini.judge import MODEL, serve
from curation_env.task import conf_dir
from curation_env.training.recipe import Recipe

# Written by `experiments/reproduce/vlmevalkit_parity.py --files 6 --write`, from VLMEvalKit's own code.
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "vlm8_expected.json").read_text(encoding="utf-8"))
CONFIG: dict[str, Any] = yaml.safe_load((conf_dir() / "suite" / "vlm8-v1.yaml").read_text())


def local_suite(folder: Path) -> Suite:
    """The suite as its file has it, over the files in `folder` in place of the public ones."""
    config = json.loads(json.dumps(CONFIG))
    for spec in config["benchmarks"].values():
        spec["md5"] = hashlib.md5((folder / spec["file"]).read_bytes()).hexdigest()
    return Suite.model_validate(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm8")
    write_sets(folder)
    return folder


@pytest.fixture(scope="module")
def items(folder: Path) -> dict[str, list[Item]]:
    return read_suite(folder, local_suite(folder))


def test_the_expected_results_are_of_the_commit_that_the_suite_names() -> None:
    assert EXPECTED["commit"] == CONFIG["judge"]["prompts"]["commit"]


@pytest.mark.parametrize("name", list(SETS))
def test_grades_and_scores_are_vlmevalkits(name: str, items: dict[str, list[Item]]) -> None:
    scorer = make_scorer(CONFIG["benchmarks"][name]["scorer"])
    for file in EXPECTED[name]:
        rows, grades = items[name], {}
        for item, text in zip(rows, read_back([file["said"][item.index] for item in rows]), strict=True):
            verdict = file["verdicts"].get(item.index)
            assert (scorer.ask(item, text) is None) == (verdict is None)
            grades[item.index] = scorer.grade(item, text, read_back([verdict])[0] if verdict is not None else None)
        score = scorer.score(rows, list(grades.values()))
        assert score == pytest.approx(file["score"], abs=1e-5)
        if name == "MMBench":  # VLMEvalKit keeps one result of a circular family
            found = {
                index: min(grade.score for k, grade in grades.items() if int(k) % COPY == int(index))
                for index in file["grades"]
            }
        elif name == "LLaVABench":
            found = {index: 10 * grade.score + grade.extra / 100 for index, grade in grades.items()}
        else:
            found = {index: grade.score for index, grade in grades.items()}
        assert found == pytest.approx(file["grades"])


def test_the_rows_that_are_items(items: dict[str, list[Item]]) -> None:
    assert not [item.index for item in items["HallusionBench"] if item.index.startswith("VS_chart_0_0_0")]
    assert all(item.images for rows in items.values() for item in rows)
    assert {item.fields["split"] for item in items["MMMU"]} == {"validation"}
    assert {item.fields["split"] for item in items["MMBench"]} == {"dev"}
    assert {len(item.images) for item in items["MMMU"]} == {1, 2, 3, 4}
    first, *copies = [item for item in items["MMBench"] if int(item.index) % COPY == 2]
    assert len(copies) == 3
    assert all(item.images == first.images for item in copies)


def by_index(items: dict[str, list[Item]], name: str, index: object) -> Item:
    return next(item for item in items[name] if item.index == str(index))


@pytest.mark.parametrize(
    ("name", "index", "prompt"),
    [
        (
            "MMBench",
            3,
            "The picture was taken at night.\nWhat is in picture 3?\nA. dog\nB. a red cat\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("MMBench", 4, "图中有什么?\nA. none of these\nB. tree\nC. n\n请直接回答选项字母。"),
        ("MMMU", 7, "Look at <image 1> and <image 2> and <image 3> and <image 4>. How many, in question 7?\n"
                    "Answer the question directly."),
        # A column of numbers and gaps is one of floats, and "None" is a gap.
        ("MMMU", 11, "Look at <image 1> and <image 2> and <image 3> and <image 4>. How many, in question 11?\n"
                     "A. a is 11\nB. b is 12\nD. d of 11\nE. e, a long text\nF. 14.0\n"
                     "Answer with the option's letter from the given choices directly."),
        ("HallusionBench", "VD_math_1_0_1_0", "Is line 0 of the math longer than line 1?"),
        ("LLaVABench", 2, "What is 2 about? {braces} and | bars"),
        ("MMVet", "v1_3", "What is x in picture 3? | a bar"),
        ("MathVista", 1, "Hint: answer with a integer.\nQuestion: how much is shown in 0?"),
        ("OCRBench", 5, "what is written in the image?"),
    ],
)  # fmt: skip
def test_prompts_are_what_llava_is_given(name: str, index: object, prompt: str, items: dict[str, list[Item]]) -> None:
    assert by_index(items, name, index).prompt(CONFIG["benchmarks"][name]["prompt"]) == prompt


def test_pictures_are_those_of_the_files_that_vlmevalkit_writes(items: dict[str, list[Item]]) -> None:
    """A JPEG's name means another encoding, a name that occurs again the first picture; a PNG's changes nothing."""
    assert by_index(items, "OCRBench", 3).images == (base64.b64decode(picture(903)),)
    assert by_index(items, "MMVet", "v1_2").images == (base64.b64decode(picture(702, kind="JPEG")),)
    with Image.open(io.BytesIO(base64.b64decode(picture(201)))) as image:
        out = io.BytesIO()
        image.save(out, "JPEG")
    second, third = (by_index(items, "LLaVABench", index).images for index in (2, 3))
    assert second == third == (out.getvalue(),)


def test_the_audit_reads_the_same_items(folder: Path, items: dict[str, list[Item]]) -> None:
    suite = local_suite(folder).model_dump()
    found = audited_items(suite, folder)
    wanted = [(item.benchmark, item.index, item.images) for rows in items.values() for item in rows]
    assert [(item.benchmark, item.index, item.images) for item in found] == wanted


def test_units_stay_together_and_the_small_set_is_feedback(folder: Path, items: dict[str, list[Item]]) -> None:
    split = split_items(items, local_suite(folder))
    assert {part for part, _ in split["LLaVABench"].values()} == {"feedback"}
    families = {}
    for index, place in split["MMBench"].items():
        families.setdefault(int(index) % COPY, set()).add(place)
    assert all(len(places) == 1 for places in families.values())
    assert {part for part, _ in split["OCRBench"].values()} == {"feedback", "sealed"}


def test_a_file_that_is_not_the_public_one_is_refused_by_its_name(folder: Path) -> None:
    suite = Suite.model_validate(CONFIG)
    words = (
        r"MMStar\.tsv is not the suite's file.*public MMStar\.tsv \(md5 e1ecd2140806c1b1bbf54b43372efb9e\) from https"
    )
    one = suite.benchmarks["MMStar"]
    with pytest.raises(TaskMismatch, match=words):
        read_items(folder / "MMStar.tsv", "MMStar", md5=one.md5, url=one.url)
    with pytest.raises(MissingAssets, match=r"no file .*public MMStar\.tsv"):
        read_items(folder / "elsewhere.tsv", "MMStar", md5=one.md5, url=one.url)


def test_what_is_missing_is_listed_with_where_it_is_public(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "OCRBench.tsv").write_bytes((folder / "OCRBench.tsv").read_bytes())
    with pytest.raises(
        MissingAssets, match=r"HallusionBench, LLaVABench.*(\n.*)*MMMU_DEV_VAL\.tsv: https://"
    ) as caught:
        read_suite(tmp_path, Suite.model_validate(CONFIG))
    assert "OCRBench" not in str(caught.value)


def test_a_suite_is_prepared_from_the_users_files(folder: Path, tmp_path: Path) -> None:
    suite, target = local_suite(folder).model_dump(mode="json"), tmp_path / "suites" / "vlm8-v1"
    digest = prepare_suite(folder, target, suite)
    meta = json.loads((target / "meta.json").read_text())
    assert meta["hash"] == digest
    assert meta["items"]["MMMU"] == 12
    rows = read_suite(target, local_suite(folder))
    assert {name: len(found) for name, found in rows.items()} == meta["items"]
    assert set(read_split(target, rows)["MMMU"]) == {item.index for item in rows["MMMU"]}
    assert sorted(path.name for path in target.iterdir() if path.name.startswith(".")) == []
    assert prepare_suite(tmp_path / "gone", target, suite) == digest  # what is there needs no source


def test_a_suite_is_not_prepared_from_other_files(folder: Path, tmp_path: Path) -> None:
    suite = local_suite(folder).model_dump(mode="json")
    source = tmp_path / "source"
    source.mkdir()
    for file in folder.glob("*.tsv"):
        (source / file.name).write_bytes(file.read_bytes())
    (source / "MMVet.tsv").unlink()
    (source / "OCRBench.tsv").unlink()
    with pytest.raises(MissingAssets, match=r"lacks files of suite vlm8-v1:\n  MMVet\.tsv: h.*\n  OCRBench\.tsv: h"):
        prepare_suite(source, tmp_path / "suite", suite)
    for name in ("MMVet", "OCRBench"):
        (source / f"{name}.tsv").write_bytes((folder / "MMStar.tsv").read_bytes())
    with pytest.raises(TaskMismatch, match=r"MMVet\.tsv is not the suite's file"):
        prepare_suite(source, tmp_path / "suite", suite)
    assert not (tmp_path / "suite" / "meta.json").exists()


def test_a_split_needs_its_column(tmp_path: Path) -> None:
    (tmp_path / "T.tsv").write_text("index\tquestion\tanswer\n1\tq\ta\n")
    with pytest.raises(StageFailed, match="no column split, and only its dev rows"):
        read_items(tmp_path / "T.tsv", "T", split="dev")


@pytest.mark.parametrize(
    ("cell", "message"),
    [("['a.jpg', 'b.jpg']", "1 images have 2 names"), ("['a.jpg", "no list"), ("a.jpg", "can't be stored")],
)
def test_malformed_image_names_and_pictures(cell: str, message: str, tmp_path: Path) -> None:
    image = base64.b64encode(b"no picture" * 9).decode()
    (tmp_path / "T.tsv").write_text(f"index\timage\tquestion\tanswer\timage_path\n1\t{image}\tq\ta\t{cell}\n")
    with pytest.raises(StageFailed, match=message):
        read_items(tmp_path / "T.tsv", "T")


def test_answers_become_what_a_spreadsheet_gives_back() -> None:
    said = ["", "None", "n/a", "nan", "3", " 3", "1,000", "none", 'a "b"\tc\nd', "True"]
    assert read_back(said) == ["nan", "nan", "nan", "nan", "3", " 3", "1,000", "none", 'a "b"\tc\nd', "True"]
    assert read_back(["1", "2"]) == ["1", "2"]
    assert read_back([]) == []


def test_a_student_is_scored_on_all_eight(folder: Path, tmp_path: Path) -> None:
    """The whole stage, with several pictures in a prompt; the miniature's rubric answers for the judge."""
    config = local_suite(folder).model_dump(mode="json")
    config["judge"] |= {"model": MODEL, "body": {}}
    for spec in config["benchmarks"].values():
        spec["max_new_tokens"] = 3
    prepare_suite(folder, tmp_path / "suite", config)
    init = make_init(tmp_path / "init", width=32, layers=1)
    server = serve()
    try:
        result = evaluate(
            checkpoint=init,
            recipe=Recipe.load("mini-v1"),
            suite=Suite.model_validate(config),
            suite_dir=tmp_path / "suite",
            out=tmp_path / "out",
            judge=Endpoint(server.url, MODEL, ""),
            device="cpu",
        )
    finally:
        server.shutdown()
        server.server_close()
    assert set(result["scores"]["all"]) == set(SETS)
    assert set(result["scores"]["sealed"]) == set(SETS) - {"LLaVABench"}
    assert result["n"]["all"] == json.loads((tmp_path / "suite" / "meta.json").read_text())["items"]
    record = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert record["suite"] == "vlm8-v1 (judge asked in own words)"
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {line["benchmark"] for line in lines if "judge" in line} == {"LLaVABench", "MMVet", "MathVista"}
