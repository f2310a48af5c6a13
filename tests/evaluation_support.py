"""A small suite in VLMEvalKit's format, one benchmark per kind of rule, over plain coloured images."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd
from training_support import COLOURS, png

from curation_env.evaluation.split import write_split
from curation_env.evaluation.suite import Suite

NAMES = list(COLOURS)


def benchmark(file: str, scorer: str, **fields: Any) -> dict[str, Any]:
    defaults = {"prompt": "open", "max_new_tokens": 4, "chance": 0, "sealed": True, "judge": False, "cost": 1}
    return {"file": file, "scorer": scorer, **defaults, **fields}


SUITE: dict[str, Any] = {
    "name": "toy",
    "judge": {"kind": "builtin", "model": "mini-rubric-1"},
    "benchmarks": {
        "YesNo": benchmark("YesNo.tsv", "hallusion"),
        "Turns": benchmark("Turns.tsv", "mmbench", prompt="choice"),
        "Choice": benchmark("Choice.tsv", "mcq", prompt="choice"),
        "Open": benchmark("Open.tsv", "mmvet", judge=True, max_new_tokens=6),
        "Small": benchmark("Small.tsv", "llavabench", judge=True, sealed=False, max_new_tokens=6),
    },
}


def _image(k: int) -> str:
    return base64.b64encode(png(NAMES[k % 4], k)).decode()


def toy_tables() -> dict[str, list[dict[str, Any]]]:
    """Rows of the toy benchmarks; the copies of `Turns` take their image from the first of the family."""
    yes_no = [
        {
            "index": f"hallusion_VD_colour_{s}_{f}_{q}",
            "image": _image(100 + 2 * s + f),
            "question": f"is it {NAMES[q]} ?",
            "answer": "Yes" if q == (100 + 2 * s + f) % 4 else "No",
            "category": "VD",
            "l2-category": "colour",
        }
        for s in range(6)
        for f in range(2)
        for q in range(2)
    ]
    turns, choice = [], []
    for k in range(8):
        options = [NAMES[(k + j) % 4] for j in range(4)]
        for turn in range(4):
            turned = dict(zip("ABCD", options[turn:] + options[:turn], strict=True))
            answer = next(letter for letter, text in turned.items() if text == NAMES[k % 4])
            image = _image(k) if turn == 0 else str(k)
            row = {"index": k + turn * 1_000_000, "image": image, "question": "what colour is it ?", **turned}
            turns.append({**row, "answer": answer, "category": "colour"})
    for k in range(12):
        options = dict(zip("ABC", NAMES[k % 2 : k % 2 + 3], strict=True))
        row = {"index": k, "image": _image(40 + k), "question": "what colour is it ?", **options, "answer": "B"}
        choice.append({**row, "hint": "it is one" if k % 2 else "", "category": f"kind {k % 2}"})
    open_ = [
        {"index": f"v1_{k}", "image": _image(60 + k), "question": "what colour is it ?", "answer": NAMES[k % 4]}
        for k in range(10)
    ]
    small = [
        {
            "index": k,
            "image": _image(80 + k),
            "question": "what is it ?",
            "answer": f"the colour is {NAMES[k % 4]}",
            "gpt4_ans": f"the colour is {NAMES[k % 4]}",
            "caption": NAMES[k % 4],
            "category": "conv",
        }
        for k in range(4)
    ]
    return {"YesNo": yes_no, "Turns": turns, "Choice": choice, "Open": open_, "Small": small}


def make_suite(folder: Path) -> Suite:
    """Write the toy suite with its split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in toy_tables().items():
        pd.DataFrame(rows).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    write_split(folder, SUITE)
    return Suite.model_validate(SUITE)
