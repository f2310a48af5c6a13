"""LLaVA's task with nothing real in it but the shapes: random weights, noise for images, words at random for text.

Everything is in the public formats and goes through the real commands: the init is a checkpoint folder, the pool
LLaVA-665K's records and image folders, the suite eight TSV files with VLMEvalKit's columns. Lengths are the real ones:
text of 207 tokens on average, questions of the sets in their real proportions. An answer is as long as the suite lets
it be, because random weights never end one.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from random_student import IMAGE_TOKEN, LLAVA, VOCABULARY, random_student

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
WORDS = [f"w{k}" for k in range(IMAGE_TOKEN - 40)]
#: Tokens of an answer; the sets that are graded on whole sentences get more.
SHORT, LONG = 16, 128
LONG_SETS = ("LLaVABench", "MMVet")


def make_task(folder: Path, rows: int, pool_rows: int, questions: int, device: torch.device, layers: int) -> Path:
    """Write init, public files and a task file, and return the task file.

    Args:
        rows: Of a submission.
        pool_rows: Of the pool.
        questions: Of all sets together; each has its share.
        layers: Of the language model.
    """
    make_init(folder / "init", device, layers)
    make_source(folder / "source", pool_rows)
    suite = make_suite(folder, questions)
    conf = resources.files("curation_env.conf")
    task = yaml.safe_load((conf / "task" / "llava.yaml").read_text())
    del task["id"]
    task |= {"name": "llava-random", "student": f"{folder / 'init'}/", "suite": str(suite), "rows": rows}
    path = folder / "llava-random.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return path


def make_init(folder: Path, device: torch.device, layers: int) -> None:
    """A checkpoint of the real architecture: each of its words is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    marks = ["USER", "ASSISTANT", ":", *"ABCDEFGHI", ".", "?"]
    words = [*SPECIAL, *marks, *WORDS][:IMAGE_TOKEN]
    vocabulary = {word: k for k, word in enumerate(words)}
    vocabulary |= {f"<unused{k}>": k for k in range(len(vocabulary), IMAGE_TOKEN)}
    vocabulary |= {"<image>": IMAGE_TOKEN}
    vocabulary |= {f"<unused{k}>": k for k in range(IMAGE_TOKEN + 1, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **names).save_pretrained(
        folder
    )
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder)
    random_student(LLAVA, device, layers).save_pretrained(folder)


def picture(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG of soft noise, about as large as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_source(folder: Path, rows: int) -> None:
    """LLaVA-665K's records and images: text log-normal with a mean of 207 tokens, 45% of it answers, two turns."""
    rng = np.random.default_rng(0)
    records = []
    names = [f"coco/train2017/{number:012d}.jpg" for number in range(rows)]
    (folder / names[0]).parent.mkdir(parents=True)
    with ThreadPoolExecutor() as threads:
        for name, data in zip(names, threads.map(picture, range(rows)), strict=True):
            (folder / name).write_bytes(data)
    for number, name in enumerate(names):
        text = int(np.clip(rng.lognormal(np.log(207) - 0.5 * 0.9**2, 0.9), 12, 2048 - 576))
        answered = max(2, int(0.45 * text)) // 2
        asked = max(1, text // 2 - answered)
        turns = []
        for turn in range(2):
            said = " ".join(rng.choice(WORDS, asked))
            turns.append({"from": "human", "value": said if turn else f"<image>\n{said}"})
            turns.append({"from": "gpt", "value": " ".join(rng.choice(WORDS, answered))})
        records.append({"id": f"{number:012d}", "image": name, "conversations": turns})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))


def make_suite(folder: Path, questions: int) -> Path:
    """Eight TSV files and a suite file; the judge is the miniature's, on this machine, and answers at once."""
    suite = yaml.safe_load((resources.files("curation_env.conf") / "suite" / "vlm8-v1.yaml").read_text())
    suite |= {"name": "vlm8-random", "judge": {"kind": "builtin", "model": "mini-rubric-1"}}
    of_all = sum(one["cost"] for one in suite["benchmarks"].values())
    sets = folder / "sets"
    sets.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name, one in suite["benchmarks"].items():
        n = max(8, round(one["cost"] * questions / of_all))
        rows = [{key: str(value) for key, value in ROWS[name](k, rng).items()} for k in range(n)]
        path = sets / one["file"]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        one |= {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "cost": n}
        one["max_new_tokens"] = LONG if name in LONG_SETS else SHORT
    path = folder / "vlm8-random.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


Fields = dict[str, Any]


def _asked(k: int, rng: np.random.Generator, offset: int) -> Fields:
    return {"index": k, "image": _shown(offset + k), "question": " ".join(rng.choice(WORDS, int(rng.integers(8, 60))))}


def _shown(seed: int) -> str:
    return base64.b64encode(picture(10_000_000 + seed)).decode()


def _choice(rng: np.random.Generator) -> Fields:
    return dict(zip("ABCD", rng.choice(WORDS, 4, replace=False).tolist(), strict=True))


def _hallusion(k: int, rng: np.random.Generator) -> Fields:
    index = f"VD_figure_1_{k // 6}_{k // 2 % 3}_{k % 2}"
    kind = {"category": "VD", "l2-category": "figure", "answer": ("Yes", "No")[k % 2]}
    return _asked(k, rng, 0) | {"index": index, "image": _shown(k // 2)} | kind


def _llavabench(k: int, rng: np.random.Generator) -> Fields:
    kind = ("conv", "detail", "complex")[k % 3]
    return _asked(k, rng, 1000) | {"gpt4_ans": "w1 w2", "caption": "w3", "category": kind, "image_path": f"{k}.jpg"}


def _mmbench(k: int, rng: np.random.Generator) -> Fields:
    """Families of four: the later rows take the first one's image."""
    family, turn = divmod(k, 4)
    own = {"index": family + turn * 1_000_000, "image": str(family) if turn else _shown(2000 + family), "hint": ""}
    kind = {"category": "object_localization", "l2-category": "finegrained_perception (instance-level)", "split": "dev"}
    return _asked(k, rng, 2000) | own | _choice(rng) | {"answer": "ABCD"[turn]} | kind


def _mmmu(k: int, rng: np.random.Generator) -> Fields:
    kind = {"category": "Art", "l2-category": "Art & Design", "split": "validation"}
    return _asked(k, rng, 20_000) | _choice(rng) | {"answer": "ABCD"[k % 4]} | kind


def _mmstar(k: int, rng: np.random.Generator) -> Fields:
    kind = {"category": "math", "l2-category": "geometry"}
    return _asked(k, rng, 30_000) | _choice(rng) | {"answer": "ABCD"[k % 4]} | kind


def _mmvet(k: int, rng: np.random.Generator) -> Fields:
    return _asked(k, rng, 40_000) | {"index": f"v1_{k}", "answer": "w5", "category": "rec", "image_path": f"v1_{k}.png"}


def _mathvista(k: int, rng: np.random.Generator) -> Fields:
    kind = {"question_type": "free_form", "answer_type": "integer", "answer": k % 9, "choices": "", "answer_option": ""}
    more = {
        "precision": "",
        "task": "math word problem",
        "category": "general-vqa",
        "skills": "['arithmetic reasoning']",
    }
    return _asked(k, rng, 50_000) | kind | more


def _ocrbench(k: int, rng: np.random.Generator) -> Fields:
    return _asked(k, rng, 60_000) | {"answer": "['w7']", "category": "Regular Text Recognition"}


ROWS: dict[str, Callable[[int, np.random.Generator], Fields]] = {
    "HallusionBench": _hallusion,
    "LLaVABench": _llavabench,
    "MMBench": _mmbench,
    "MMMU": _mmmu,
    "MMStar": _mmstar,
    "MMVet": _mmvet,
    "MathVista": _mathvista,
    "OCRBench": _ocrbench,
}
