"""The eight public sets in their real format, small and made here: every branch of VLMEvalKit's rules has its rows."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]
COPY = 1_000_000
LETTERS = "ABCDEFGHI"


def picture(seed: int, mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (24, 18)) -> str:
    """A smooth picture in base64, another for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (size[1], size[0]), dtype=np.uint8)))
    image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


def hallusion() -> list[Row]:
    """Sets of figures and questions of both categories; a figure 0 without a picture is no item."""
    rows = []
    kinds = (("VD", "illusion", 1), ("VD", "math", 1), ("VS", "chart", 0), ("VS", "map", 1))
    for place, (category, kind, shown) in enumerate(kinds):
        for number in range(2):
            for figure in range(3 if number else 2):
                for question in range(2):
                    bare = shown == 0 and figure == 0
                    rows.append(
                        {
                            "index": f"{category}_{kind}_{shown}_{number}_{figure}_{question}",
                            "category": category,
                            "l2-category": kind,
                            "image": "" if bare else picture(100 + 20 * place + 10 * number + figure),
                            "question": f"Is line {question} of the {kind} longer than line {figure}?",
                            "answer": "Yes" if (number + figure + question) % 2 else "No",
                        }
                    )
    return rows


def llavabench() -> list[Row]:
    """All three categories; its image files are JPEGs, so the pictures are encoded again."""
    rows = []
    for k, category in enumerate(("conv", "detail", "complex", "conv", "detail", "complex")):
        rows.append(
            {
                "index": k,
                "image": picture(200 + k // 2, kind="JPEG" if k % 2 else "PNG"),
                "question": f"What is {k} about? {{braces}} and | bars",
                "gpt4_ans": f"It is about thing {k}.\nTwo lines.",
                "caption": f"A thing, number {k}.",
                "category": category,
                "image_path": f"{k // 2:03d}.jpg",
            }
        )
    return rows


def mmbench() -> list[Row]:
    """Families of two to four turned copies that take their picture from the first; one row of another split."""
    words = ["cat", "dog", "a red cat", "3 birds", "none of these", "tree", "n", "House"]
    rows: list[Row] = []
    for k in range(9):
        n = 2 + k % 3
        options = [words[(3 * k + j) % len(words)] for j in range(n)]
        for turn in range(n):
            turned = options[turn:] + options[:turn]
            rows.append(
                {
                    "index": k + turn * COPY,
                    "image": str(k) if turn else picture(300 + k, mode=("RGB", "RGBA", "L", "P")[k % 4]),
                    "hint": "The picture was taken at night." if k % 3 == 0 else "",
                    "question": "图中有什么?" if k == 4 else f"What is in picture {k}?",
                    **{letter: turned[j] if j < n else "" for j, letter in enumerate("ABCD")},
                    "answer": "ABCD"[turned.index(options[0])],
                    "category": ("object_localization", "identity_reasoning")[k % 2],
                    "l2-category": ("finegrained_perception (instance-level)", "attribute_reasoning")[k % 2],
                    "split": "test" if k == 8 else "dev",
                }
            )
    lost = {**rows[0], "index": 77 + COPY, "image": "0"}  # a copy whose first row is not there
    return [*rows, lost]


def mmmu() -> list[Row]:
    """Dev and validation rows, several images in lists, open questions, many options, a column of numbers alone."""
    rows = []
    for k in range(16):
        images = [picture(400 + 7 * k + j, mode=("RGB", "LA", "P")[j % 3]) for j in range(1 + k % 4)]
        marks = " and ".join(f"<image {j + 1}>" for j in range(len(images)))
        options: dict[str, Any] = {
            letter: f"{letter.lower()} is {k + j}" for j, letter in enumerate("ABCD"[: 2 + k % 3])
        }
        answer: Any = "ABCD"[k % (2 + k % 3)]
        if k in (3, 7, 9):  # open questions; one answer is a lone capital
            options, answer = {}, {3: "2.5", 7: "B", 9: "the third law"}[k]
        if k in (5, 11):  # "None" is no option
            options |= {"C": "None", "D": f"d of {k}", "E": "e, a long text", "F": 3 + k}
            answer = "E" if k == 5 else "F"
        rows.append(
            {
                "index": k,
                "image": images[0] if len(images) == 1 else str(images),
                "question": f"计算 {marks}" if k == 6 else f"Look at {marks}. How many, in question {k}?",
                **{letter: options.get(letter, "") for letter in LETTERS},
                "answer": answer,
                "category": ("Art", "Physics")[k % 2],
                "l2-category": ("Art & Design", "Science")[k % 2],
                "split": "dev" if k % 5 == 0 else "validation",
            }
        )
    return rows


def mmstar() -> list[Row]:
    """Four options each, some within others, one a part of "nan"."""
    rows = []
    for k in range(12):
        options = [("red", "dark red", "a", "green grass"), ("10", "100", "1,000", "0.5"), ("Yes", "No", "Both", "x")][
            k % 3
        ]
        rows.append(
            {
                "index": k,
                "image": picture(600 + k, kind=("PNG", "JPEG")[k % 2]),
                "question": f"Which one fits picture {k}?\nChoose.",
                **dict(zip("ABCD", options, strict=True)),
                "answer": "ABCD"[k % 4],
                "category": ("math", "coarse perception")[k % 2],
                "l2-category": ("geometry", "image scene")[k % 2],
            }
        )
    return rows


def mmvet() -> list[Row]:
    answers = ("-1<AND>-5", "a cat<OR>a kitten", "5", "It is late.", "0.5", "<AND>", "NASA<AND>moon<OR>Mars")
    kinds = ("math,ocr", "rec", "ocr", "rec,know,gen", "math", "spat", "rec,spat")
    return [
        {
            "index": f"v1_{k}",
            "image": picture(700 + k, kind="JPEG"),
            "question": f"What is x in picture {k}? | a bar",
            "answer": answer,
            "category": kinds[k],
            "image_path": f"v1_{k}.{('png', 'jpg')[k % 2]}",
        }
        for k, answer in enumerate(answers)
    ]


def mathvista() -> list[Row]:
    """Every type of question and answer that the set has."""
    kinds: list[tuple[str, str, str, str, str]] = [
        ("free_form", "integer", "3", "", ""),
        ("free_form", "integer", "0", "", ""),
        ("free_form", "integer", "-12", "", ""),
        ("free_form", "float", "1.20", "", ""),
        ("free_form", "float", "0.5", "", ""),
        ("free_form", "float", "3.0", "", ""),
        ("free_form", "list", "[1, 2]", "", ""),
        ("free_form", "text", "blue", "", ""),
        ("multi_choice", "text", "blue", "['red', 'blue', 'light blue']", "B"),
        ("multi_choice", "integer", "10", "[5, 10, 15, 20]", "B"),
        ("multi_choice", "text", "Yes", "['Yes', 'No']", "A"),
        ("multi_choice", "float", "2.5", "['1.5 cm', '2.5 cm', 'a']", "B"),
    ]
    rows = []
    for k, (question_type, answer_type, answer, choices, option) in enumerate(kinds):
        rows.append(
            {
                "index": k + 1,
                "image": picture(800 + k, mode=("RGB", "L", "RGBA")[k % 3]),
                "question": f"Hint: answer with a {answer_type}.\nQuestion: how much is shown in {k}?",
                "question_type": question_type,
                "answer_type": answer_type,
                "answer": answer,
                "choices": choices,
                "answer_option": option,
                "precision": 2.0 if answer_type == "float" else "",
                "task": ("figure question answering", "math word problem")[k % 2],
                "category": ("math-targeted-vqa", "general-vqa")[k % 2],
                "skills": ("['arithmetic reasoning']", "['geometry reasoning', 'algebraic reasoning']")[k % 2],
            }
        )
    return rows


def ocrbench() -> list[Row]:
    """Every category, of one answer and of several."""
    categories = (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
        "Scene Text-centric VQA",
        "Doc-oriented VQA",
        "Key Information Extraction",
        "Handwritten Mathematical Expression Recognition",
    )
    answers = (["Stop"], ["CLOSED", "closed now"], ["a\nb"], ["n"], ["0731"], ["qzt"], ["$ 5", " five "], ["3.0"])
    rows = []
    for k in range(2 * len(categories)):
        category = categories[k % len(categories)]
        formula = category.startswith("Handwritten M")
        answer = ["x ^ { 2 } + y", "X\n= 1"] if formula else list(answers[(k + k // 10) % len(answers)])
        rows.append(
            {
                "index": k,
                "image": picture(900 + k),
                "question": "what is written in the image?",
                "answer": repr(answer),
                "category": category,
            }
        )
    return rows


#: By benchmark of conf/suite/vlm8-v1.yaml: VLMEvalKit's name of the set, and its rows.
SETS = {
    "HallusionBench": ("HallusionBench", hallusion),
    "LLaVABench": ("LLaVABench", llavabench),
    "MMBench": ("MMBench_DEV_EN", mmbench),
    "MMMU": ("MMMU_DEV_VAL", mmmu),
    "MMStar": ("MMStar", mmstar),
    "MMVet": ("MMVet", mmvet),
    "MathVista": ("MathVista_MINI", mathvista),
    "OCRBench": ("OCRBench", ocrbench),
}


def write_sets(folder: Path) -> None:
    """Write the eight files under their public names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SETS.values():
        rows = make()
        with (folder / f"{name}.tsv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


_PHRASES = (
    "",
    "None",
    "nan",
    "N/A",
    "null",
    "I do not know.",
    "yes",
    "No.",
    "Yes, it is.",
    "No, there are 1,000 of them; yes",
    "Answer:yes",
    "yes/no",
    "Yes - no doubt about it, nobody knows.",
    "3.5 yes",
    "no...",
    "no/one has 1,000",
    "no(body) yes",
    "." * 40 + "no",
    "B is what I would think that it may be",
    "C I think it is",
    "D?",
    "Sorry, I can't help with images of people yet.",
    "Z",
    "A B",
    "A, it is a thing that one can not see so well",
    "The correct answer is **b**.",
    "A or B, but the answer is C",
    "answer is e",
    "Sorry, I can't help with images of people yet. A",
    "Cannot determine the answer",
    "Failed to obtain answer via API. B",
    "It is, I think, a b c d e f g",
    "3",
    " 3 ",
    "3.0",
    "0",
    "0.0",
    "-12",
    "1.2",
    "1.20",
    ".5",
    "[1, 2]",
    "2.5 cm",
    "1_000",
    "x^{2}+y",
    "x = 1",
    "X=1 .",
    "the sign says\nSTOP",
    "=1+1",
    "<b>bold</b> & \"quoted\" 'text'",
    "grün 图",
)

SEEDS = 2 * len(_PHRASES)


def predictions(rows: Sequence[dict[str, str]], seed: int) -> list[str]:
    """One answer a row: letters, texts of its options and of its answer, dressed in different ways.

    Every other row gets a stock phrase instead; over `SEEDS` seeds each row gets each phrase.

    Args:
        rows: Of each row: its options by letter, `answer`, and whatever else is text.
    """
    rng = random.Random(seed)
    drawn = [rng.choice(list(_candidates(row, rng))) for row in rows]
    for k in range(seed % 2, len(rows), 2):
        drawn[k] = _PHRASES[(seed // 2 + 7 * k) % len(_PHRASES)]
    return drawn


def _candidates(row: dict[str, str], rng: random.Random) -> Iterator[str]:
    options = {letter: row[letter] for letter in LETTERS if row.get(letter)}
    right = row.get("answer_option") or row.get("answer", "")
    letters = [*options, *([right] if len(right) == 1 else []), rng.choice(LETTERS)]
    letter = rng.choice(letters)
    texts = [*options.values(), right, row.get("answer", "")]
    text = rng.choice(texts)
    yield from (
        letter,
        right,
        right,
        right,
        f"{letter}.",
        f"({letter}) {text}",
        f"Answer: {letter}",
        text,
        text.upper(),
    )
    yield from (f"It is {text}.", f"the answer is {letter}", f"{letter} {rng.choice(texts)}", f"{text} or {letter}")
    yield from (text.strip("[]'"), f"so: {text.strip('[]')!r}")
    yield from (text + "." * n for n in (20, rng.randrange(60), 60))
