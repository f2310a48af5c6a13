"""Compare this package's evaluation with VLMEvalKit's own code, question by question.

    python experiments/reproduce/vlmevalkit_parity.py --checkout VLMEvalKit [--data FOLDER] [--files N]

For each of the eight sets: the prompt and the images that each side gives LLaVA-1.5, and the grades and scores of
generated prediction files. Where a judge is involved, both sides ask a loopback server; what they ask is compared, and
what they make of its answers. Every difference is printed; the exit status is 1 if there is one.

VLMEvalKit's code runs as it is, at commit `COMMIT`. It needs openpyxl, xlsxwriter, sty, validators, tabulate and
python-dotenv beside this package. What only other datasets and models need is not imported: the `__init__` files of
vlmeval, vlmeval.dataset, vlmeval.vlm and vlmeval.api are skipped. Without --data the files are the fixtures of
`tests/vlm8_support.py`; with it, a folder of the public TSV files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import Image

from curation_env.evaluation.judge import Endpoint, JudgeClient
from curation_env.evaluation.scorers import Grade, make_scorer
from curation_env.evaluation.spreadsheet import read_back
from curation_env.evaluation.suite import Item, Suite, read_items
from curation_env.evaluation.wording import SETTING, Wording, resolved, title
from curation_env.task import conf_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from vlm8_support import SEEDS, SETS, predictions, write_sets  # noqa: E402

COMMIT = "e8e78f05f3080fe28154f2130321f17951c3be94"
MODEL = "parity"
EXTRACTED = ("A", "B", "the answer is B", "blue", "3", "3.0", "-12", "0", "1.2", "0.5", "[1, 2]", "None", "No answer")


# The judge of both sides


class LoopbackJudge(ThreadingHTTPServer):
    """An endpoint that answers by the hash of what it is asked, in the form that the rule wants; keeps the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, rule: str) -> None:
        super().__init__(("127.0.0.1", 0), _JudgeHandler)
        self.rule = rule
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reply(self, text: str) -> str:
        number = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        if self.rule == "llavabench":
            return f"{number % 9 + 1}{' ,'[number % 2]}{number // 9 % 20 / 2}\nbecause of {number % 7}"
        if self.rule == "mmvet":
            return f"{number % 11 / 10}"
        return EXTRACTED[number % len(EXTRACTED)]


class _JudgeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = [(m["role"], _text(m["content"])) for m in body["messages"]]
        if messages[-1][1] != "hello":  # VLMEvalKit's probe
            self.server.asked.append(json.dumps([messages, body["temperature"], body["max_tokens"]]))
        said = {"choices": [{"message": {"role": "assistant", "content": self.server.reply(messages[-1][1])}}]}
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


# VLMEvalKit's side


class Theirs:
    """VLMEvalKit's datasets and its LLaVA-1.5, without a model.

    Args:
        checkout: Its folder, at `COMMIT`.
        data: A folder of TSV files, which gets its image files as well.
    """

    def __init__(self, checkout: Path, data: Path) -> None:
        os.environ["LMUData"] = str(data)  # noqa: SIM112 (its name there)
        for name in ("vlmeval", "vlmeval.dataset", "vlmeval.vlm", "vlmeval.vlm.llava", "vlmeval.api"):
            module = types.ModuleType(name)
            module.__path__ = [str(checkout.joinpath(*name.split(".")))]
            sys.modules[name] = module
        package = sys.modules["vlmeval.dataset"]
        with _quiet():
            smp = importlib.import_module("vlmeval.smp")
            # At this commit llavabench.py looks for the log one folder too low and can't be imported as it stands.
            sys.modules["vlmeval.dataset.smp"] = smp
            sys.modules["vlmeval.dataset.smp.log"] = sys.modules["vlmeval.smp.log"]
            smp.load_env = lambda: None  # type: ignore[attr-defined]  # keys of the user's are not for a loopback judge
            mcq, vqa, yorn = (importlib.import_module(f"vlmeval.dataset.image_{k}") for k in ("mcq", "vqa", "yorn"))
            self._made_of = {
                "HallusionBench": yorn.ImageYORNDataset,
                "LLaVABench": vqa.LLaVABench,
                "MMBench": mcq.ImageMCQDataset,
                "MMMU": mcq.MMMUDataset,
                "MMStar": mcq.ImageMCQDataset,
                "MMVet": vqa.MMVet,
                "MathVista": vqa.MathVista,
                "OCRBench": vqa.OCRBench,
            }
            types_of = {SETS[name][0]: cls.TYPE for name, cls in self._made_of.items()}
            package.DATASET_TYPE = lambda dataset, **_: types_of[dataset]  # type: ignore[attr-defined]
            package.DATASET_MODALITY = lambda dataset, **_: "IMAGE"  # type: ignore[attr-defined]
            api = sys.modules["vlmeval.api"]
            api.OpenAIWrapper = importlib.import_module("vlmeval.api.gpt").OpenAIWrapper  # type: ignore[attr-defined]
            api.HFChatModel = api.SiliconFlowAPI = None  # type: ignore[attr-defined]
            llava = importlib.import_module("vlmeval.vlm.llava.llava").LLaVA
            llavabench = importlib.import_module("vlmeval.dataset.utils.llavabench")
            self._llavabench_score = llavabench.LLaVABench_score
            self._post_check = importlib.import_module("vlmeval.dataset.utils.mathvista").post_check
        self._load, self._dump = smp.load, smp.dump
        self._model = llava.__new__(llava)
        self._datasets: dict[str, Any] = {}

    def dataset(self, name: str) -> Any:
        if name not in self._datasets:
            cls = self._made_of[name]
            cls.DATASET_MD5.pop(SETS[name][0], None)  # a fixture is not the public file
            with _quiet():
                self._datasets[name] = cls(SETS[name][0])
        return self._datasets[name]

    def prompts(self, name: str) -> dict[str, tuple[list[str], list[tuple[str, bytes]]]]:
        """By index: the texts in order, "image" in place of an image; and mode and pixels of every image as it is read.

        The choice between the model's prompt and the dataset's is that of VLMEvalKit's `infer_data`.
        """
        dataset, found = self.dataset(name), {}
        self._model.set_dump_image(dataset.dump_image)
        for k in range(len(dataset.data)):
            line = dataset.data.iloc[k]
            if self._model.use_custom_prompt(dataset.dataset_name):
                message = self._model.build_prompt(line, dataset=dataset.dataset_name)
            else:
                message = dataset.build_prompt(line)
            parts = self._model.preproc_content(message)
            texts = [part["value"] if part["type"] == "text" else "image" for part in parts]
            pixels = [_pixels(part["value"]) for part in parts if part["type"] == "image"]
            found[str(line["index"])] = (texts, pixels)
        return found

    def evaluate(
        self, name: str, said: list[str], folder: Path, judge: LoopbackJudge | None
    ) -> tuple[dict[str, float], float]:
        """Grade one prediction file: right or wrong (or the judge's score) by index, and the set's score in percent."""
        dataset = self.dataset(name)
        folder.mkdir(parents=True)
        table = dataset.data.copy()
        table["prediction"] = said
        table.pop("image")
        file = str(folder / f"{MODEL}_{dataset.dataset_name}.xlsx")
        settings: dict[str, Any] = {"model": "exact_matching", "nproc": 4}
        if judge is not None:
            settings = {"model": MODEL, "nproc": 16, "key": "", "api_base": f"{judge.url}/chat/completions", "wait": 0}
            settings["verbose"] = False
        with _quiet():
            self._dump(table, file)
            if name == "OCRBench":
                return self._ocrbench(dataset, file, table, folder)
            result = dataset.evaluate(file, **settings)
        kept = {path.stem.removeprefix(Path(file).stem): path for path in folder.iterdir()}
        if name == "HallusionBench":
            overall = result[result["split"] == "Overall"].iloc[0]
            return self._column(kept["_auxmatch"], "score"), sum(overall[k] for k in ("aAcc", "fAcc", "qAcc")) / 3
        if name in ("MMBench", "MMMU", "MMStar"):
            split = {"MMBench": "dev", "MMMU": "validation", "MMStar": "none"}[name]
            score = 100 * result[result["split"] == split].iloc[0]["Overall"]
            graded = self._load(str(kept["_exact_matching_result"].with_suffix(".xlsx")))
            if name != "MMStar":
                graded = graded[graded["split"] == split]
            return {str(k): float(v) for k, v in zip(graded["index"], graded["hit"], strict=True)}, score
        if name == "MMVet":
            score = result[result["Category"] == "Overall"].iloc[0]["acc"]
            return self._column(folder / f"{Path(file).stem}_{MODEL}.xlsx", "score"), score
        if name == "LLaVABench":
            record = self._load(str(kept["_openai_result"]))
            result = self._llavabench_score(record)  # `evaluate` rounds it to a tenth
            score = result[result["split"] == "overall"].iloc[0]["Relative Score (main)"]
            pairs = zip(record["index"], record["score"], record["gpt4_score"], strict=True)
            return {str(k): float(mine) + float(reference) / 1000 for k, mine, reference in pairs}, score
        score = result[result["Task&Skill"] == "Overall"].iloc[0]["acc"]
        record = self._load(str(folder / f"{Path(file).stem}_{MODEL}.xlsx"))
        lines = [record.iloc[k] for k in range(len(record))]
        return {str(line["index"]): float(self._post_check(line, prefetch=False)) for line in lines}, score

    def _ocrbench(self, dataset: Any, file: str, table: Any, folder: Path) -> tuple[dict[str, float], float]:
        """It reports sums only: each row is graded alone as well, beside a text that keeps the column one of texts."""
        total = dataset.evaluate(file)["Final Score"]
        hits = {}
        for k in range(len(table)):
            own = str(folder / f"row{k}.xlsx")
            pair = table.iloc[[k, k]].reset_index(drop=True)
            pair.loc[1, "prediction"] = "~"
            self._dump(pair, own)
            hits[str(table.iloc[k]["index"])] = float(dataset.evaluate(own)["Final Score"])
        return hits, 100 * total / len(table)

    def _column(self, file: Path, name: str) -> dict[str, float]:
        table = self._load(str(file))
        return {str(k): float(v) for k, v in zip(table["index"], table[name], strict=True)}


def _pixels(source: str | io.BytesIO) -> tuple[str, bytes]:
    with Image.open(source) as image:
        rgb = image.convert("RGB")
    return f"{rgb.size}", rgb.tobytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the other side's progress bars, warnings and logs off the screen."""
    logging.disable(logging.CRITICAL)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# Our side


class Ours:
    """This package's evaluation of the same files, the judge asked in the checkout's words."""

    def __init__(self, suite: Suite, checkout: Path, data: Path) -> None:
        self.suite, self.checkout = suite, checkout
        assert suite.judge is not None
        assert suite.judge.prompts is not None
        self._wording = Wording(checkout, suite.judge.prompts.commit, suite.judge.prompts.files)
        self.items = {
            name: read_items(data / f"{SETS[name][0]}.tsv", name, split=one.split)
            for name, one in suite.benchmarks.items()
        }

    def prompts(self, name: str) -> dict[str, tuple[list[str], list[tuple[str, bytes]]]]:
        style, found = self.suite.benchmarks[name].prompt, {}
        for item in self.items[name]:
            images = [_pixels(io.BytesIO(data)) for data in item.images]
            found[item.index] = (["image"] * len(images) + [item.prompt(style)], images)
        return found

    def evaluate(
        self, name: str, said: dict[str, str], judge: LoopbackJudge | None
    ) -> tuple[dict[str, float], float, dict[str, str]]:
        """Grades by index, as `Theirs.evaluate` gives them; the set's score; the judge's answers by index."""
        items = self.items[name]
        heard = read_back([said[item.index] for item in items])
        scorer = make_scorer(self.suite.benchmarks[name].scorer, self._wording)
        requests = {k: request for k, item in enumerate(items) if (request := scorer.ask(item, heard[k])) is not None}
        verdicts: dict[int, str] = {}
        if judge is not None:
            with JudgeClient(Endpoint(judge.url, MODEL, "")) as client:
                verdicts = dict(zip(requests, read_back(client.ask(list(requests.values()))), strict=True))
        grades = [scorer.grade(item, heard[k], verdicts.get(k)) for k, item in enumerate(items)]
        answered = {items[k].index: verdict for k, verdict in verdicts.items()}
        return self._by_index(name, items, grades), scorer.score(items, grades), answered

    def _by_index(self, name: str, items: list[Item], grades: list[Grade]) -> dict[str, float]:
        if name == "MMBench":  # VLMEvalKit keeps one result a family, under its first row
            scorer, right = make_scorer("mmbench"), {}
            for item, grade in zip(items, grades, strict=True):
                right.setdefault(scorer.unit(item), []).append(grade.score)
            return {key: min(scores) for key, scores in right.items() if key in {item.index for item in items}}
        if name == "LLaVABench":
            return {i.index: 10 * g.score + 10 * g.extra / 1000 for i, g in zip(items, grades, strict=True)}
        return {item.index: grade.score for item, grade in zip(items, grades, strict=True)}


# The comparison


class Report:
    """Counts what was compared and keeps what differs."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.differences: Counter[tuple[str, str]] = Counter()

    def compare(self, name: str, what: str, where: str, theirs: Any, ours: Any) -> None:
        self.counts[name, what] += 1
        if theirs != ours:
            self.differences[name, what] += 1
            print(f"DIFFERENCE {name} {what} {where}\n  theirs {_short(theirs)}\n  ours   {_short(ours)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:300]} ... {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def compare_prompts(name: str, theirs: Theirs, ours: Ours, report: Report) -> None:
    """Texts, order of images and pixels of every item; rows that only they have must be of another split."""
    their, our = theirs.prompts(name), ours.prompts(name)
    split = ours.suite.benchmarks[name].split
    if split is not None:
        data = theirs.dataset(name).data
        kept = {str(index) for index, of in zip(data["index"], data["split"], strict=True) if of == split}
        their = {index: prompt for index, prompt in their.items() if index in kept}
    report.compare(name, "items", "", sorted(their), sorted(our))
    for index in their.keys() & our.keys():
        report.compare(name, "prompts", index, their[index][0], our[index][0])
        report.compare(name, "images", index, their[index][1], our[index][1])


def compare_scores(
    name: str, theirs: Theirs, ours: Ours, report: Report, files: int, folder: Path
) -> list[dict[str, Any]]:
    """Grades of every item and the score of every generated prediction file; returns what VLMEvalKit made of each."""
    expected = []
    data = theirs.dataset(name).data
    index = [str(k) for k in data["index"]]
    rows = [
        {k: str(v) for k, v in row.items() if not isinstance(v, list) and not pd.isna(v)}
        for row in data.drop(columns="image").to_dict("records")
    ]
    judged = ours.suite.benchmarks[name].judge
    for number in range(files):
        said = predictions(rows, number)
        judges = [LoopbackJudge(ours.suite.benchmarks[name].scorer) if judged else None for _ in range(2)]
        their_grades, their_score = theirs.evaluate(name, said, folder / name / str(number), judges[0])
        our_grades, our_score, verdicts = ours.evaluate(name, dict(zip(index, said, strict=True)), judges[1])
        report.compare(name, "scores", f"file {number}", round(float(their_score), 6), round(our_score, 6))
        report.compare(name, "graded items", f"file {number}", sorted(their_grades), sorted(our_grades))
        text = dict(zip(index, said, strict=True))
        expected.append(
            {
                "score": round(float(their_score), 6),
                "grades": {key: round(value, 6) for key, value in their_grades.items()},
                "said": text,
                "verdicts": verdicts,
            }
        )
        for key in their_grades.keys() & our_grades.keys():
            their, our = round(their_grades[key], 6), round(our_grades[key], 6)
            report.compare(name, "grades", f"file {number} item {key} {text[key]!r}", their, our)
        if judges[0] is not None and judges[1] is not None:
            # Ours asks equal questions once.
            pair = [set(judge.asked) for judge in judges if judge is not None]
            report.counts[name, "judge requests"] += len(pair[0]) - 1
            report.compare(
                name, "judge requests", f"file {number}", sorted(pair[0] - pair[1]), sorted(pair[1] - pair[0])
            )
            for judge in judges:
                judge.shutdown()  # type: ignore[union-attr]
                judge.server_close()  # type: ignore[union-attr]
    return expected


def write_expected(path: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    """Keep what VLMEvalKit made of the fixtures, one line a prediction file."""
    sets = []
    for name, files in expected.items():
        lines = ",\n  ".join(json.dumps(file, ensure_ascii=False) for file in files)
        sets.append(f'"{name}": [\n  {lines}\n ]')
    path.write_text('{"commit": "' + COMMIT + '",\n ' + ",\n ".join(sets) + "}\n", encoding="utf-8")


def checked_out(folder: Path) -> None:
    """Raise SystemExit where the checkout is not at `COMMIT` or was changed."""
    ask = ["git", "-C", str(folder)]
    head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if head != COMMIT:
        raise SystemExit(f"{folder} is at {head or 'no commit'}; this comparison is with {COMMIT}")
    if subprocess.run([*ask, "status", "--porcelain", "--untracked-files=no"], capture_output=True).stdout:
        raise SystemExit(f"{folder} has local changes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help=f"a clone of VLMEvalKit at {COMMIT[:12]}")
    parser.add_argument("--data", type=Path, help="folder of the public TSV files; the fixtures where left out")
    parser.add_argument("--files", type=int, default=SEEDS, help=f"prediction files of each set (default {SEEDS})")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--write", type=Path, help="file for VLMEvalKit's results on the fixtures, which tests read")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    checked_out(checkout)
    os.environ[SETTING] = str(checkout)
    suite = Suite.model_validate(resolved(yaml.safe_load((conf_dir() / "suite" / "vlm8-v1.yaml").read_text())))
    report, expected = Report(), {}
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        data = Path(scratch) / "data"
        if arguments.data is None:
            write_sets(data)
        else:
            data.mkdir()
            for one in suite.benchmarks.values():
                (data / one.file).symlink_to((arguments.data / one.file).resolve())
        theirs, ours = Theirs(checkout, data), Ours(suite, checkout, data)
        for name in arguments.sets:
            compare_prompts(name, theirs, ours, report)
            work = Path(scratch) / "work"
            expected[name] = compare_scores(name, theirs, ours, report, arguments.files, work)
            shutil.rmtree(data / "images", ignore_errors=True)
    files = "fixtures" if arguments.data is None else arguments.data
    print(f"VLMEvalKit {COMMIT}, {title(suite.model_dump())}, {files}")
    whats = list(dict.fromkeys(what for _, what in report.counts))
    for name in arguments.sets:
        cells = [f"{what} {report.counts[name, what]}" for what in whats if report.counts[name, what]]
        wrong = sum(count for (of, _), count in report.differences.items() if of == name)
        print(f"{name:15s} {wrong} differences; compared: {', '.join(cells)}")
    if arguments.write is not None:
        write_expected(arguments.write, expected)
    total = sum(report.differences.values())
    print(f"{total} differences in {sum(report.counts.values())} comparisons")
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
