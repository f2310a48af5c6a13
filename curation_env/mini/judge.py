"""A judge that needs no model: an OpenAI-compatible HTTP server with a deterministic rubric.

    python -m curation_env.mini.judge --port 0 --ready-file F

It asks for the key in `CURATION_JUDGE_KEY`, where that is set, and ends when its standard input is a pipe that closes.
It serves `/v1/models` and `/v1/chat/completions`. The user message ends, on its last line, with a JSON object
`{"question", "reference", "prediction", "rule"}`; rules are

- `mmvet`: a number from 0.0 to 1.0 in tenths, the share of the reference's content words that the prediction holds;
- `llavabench`: two numbers from 1 to 10, for the reference and for the prediction (F1 of their content words);
- `mathvista`: the extracted answer: an option's letter where there are options, else the last number, else the words.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import re
import stat
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "mini-rubric-1"
MAX_BODY = 1_000_000
_STOP = frozenset(["a", "an", "the", "is", "are", "in", "of", "and", "or", "with", "that", "there", "it", "to"])
_OPTION = re.compile(r"^\(?([A-D])[.)] (.+)$", re.MULTILINE)
REFERENCE_SCORE = 9  # what the rubric gives a reference answer on LLaVABench's scale


def content_words(text: str) -> Counter[str]:
    """Lower-case words that carry meaning, with their counts."""
    return Counter(w for w in re.findall(r"\w+", text.lower()) if w not in _STOP)


def grade_mmvet(reference: str, prediction: str) -> str:
    """Share of the required words that are there; `<AND>` joins elements that must all be, `<OR>` alternatives."""
    best = 0.0
    for alternative in reference.split("<OR>"):
        wanted, said = content_words(alternative.replace("<AND>", " ")), content_words(prediction)
        found = sum((wanted & said).values()) / max(1, sum(wanted.values()))
        if sum(said.values()) > 2 * sum(wanted.values()) + 2:  # naming everything is no answer
            found /= 2
        best = max(best, found)
    return f"{int(best * 10 + 1e-9) / 10:.1f}"


def grade_llavabench(reference: str, prediction: str) -> str:
    """The reference's score and the prediction's, 1 to 10."""
    wanted, said = content_words(reference), content_words(prediction)
    shared = sum((wanted & said).values())
    f1 = 2 * shared / max(1, sum(wanted.values()) + sum(said.values()))
    return f"{REFERENCE_SCORE} {1 + round(f1 * (REFERENCE_SCORE - 1))}\nscored by the words that both share"


def extract_mathvista(question: str, prediction: str) -> str:
    """The final answer that a prediction states."""
    options = dict(_OPTION.findall(question))
    if options:
        letters = re.findall(r"\b[A-D]\b", prediction)
        if letters:
            return letters[-1]
        said = [key for key, text in options.items() if text.lower() in prediction.lower()]
        return said[0] if len(said) == 1 else prediction.strip()
    numbers = re.findall(r"-?\d+(?:\.\d+)?", prediction)
    return numbers[-1] if numbers else prediction.strip()


def answer(message: str) -> str:
    """Grade what the last line of a user message holds.

    Raises:
        ValueError: The last line is not the agreed JSON object.
    """
    last = message.strip().splitlines()[-1] if message.strip() else ""
    try:
        case = json.loads(last)
        question, reference, prediction = (str(case[k]) for k in ("question", "reference", "prediction"))
        rule = case["rule"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the last line must be a JSON object with question, reference, prediction and rule: {error}"
        ) from error
    if rule == "mmvet":
        return grade_mmvet(reference, prediction)
    if rule == "llavabench":
        return grade_llavabench(reference, prediction)
    if rule == "mathvista":
        return extract_mathvista(question, prediction)
    raise ValueError(f"no rule {rule!r}: mmvet, llavabench or mathvista")


class Handler(BaseHTTPRequestHandler):
    """Two routes; every answer is JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path.rstrip("/") == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "curation-env"}]})
        else:
            self._fail(404, f"no route {self.path}")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            self.close_connection = True
            return self._fail(413, f"a request holds at most {MAX_BODY} bytes")
        body = self.rfile.read(length)
        if not self._allowed():
            return None
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self._fail(404, f"no route {self.path}")
        try:
            request = json.loads(body)
            content = [m["content"] for m in request["messages"] if m["role"] == "user"][-1]
            if isinstance(content, list):
                content = "\n".join(part["text"] for part in content if part.get("type") == "text")
            reply = answer(content)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return self._fail(400, f"{type(error).__name__}: {error}")
        choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(content.split()), "completion_tokens": len(reply.split())}
        usage["total_tokens"] = sum(usage.values())
        self._send(
            200,
            {
                "id": "rubric",
                "object": "chat.completion",
                "created": 0,
                "model": MODEL,
                "choices": [choice],
                "usage": usage,
            },
        )

    def _allowed(self) -> bool:
        """Answer 401 and return False when a key is asked for and the request does not carry it."""
        key = os.environ.get("CURATION_JUDGE_KEY", "")
        given = self.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            self._fail(401, "wrong key")
            return False
        return True

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: a thousand requests an evaluation would drown the run's own output."""


class JudgeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def serve(port: int = 0) -> JudgeServer:
    """Start the server on a thread of this process; `shutdown()` ends it."""
    server = JudgeServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The miniature's judge: an OpenAI-compatible server with a fixed rubric."
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--ready-file", type=Path, help="written with the base URL once the server answers")
    args = parser.parse_args()
    server = JudgeServer(("127.0.0.1", args.port), Handler)
    if args.ready_file:
        scratch = args.ready_file.with_suffix(".partial")
        scratch.write_text(server.url)
        os.replace(scratch, args.ready_file)
    else:
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


def _end_with_parent() -> None:
    """Whoever started the server holds the other end of its standard input."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
