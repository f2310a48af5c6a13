"""The client of the judge: an OpenAI-compatible endpoint, probed first, asked concurrently, never replaced."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from curation_env.errors import JudgeUnavailable
from curation_env.evaluation.scorers import JudgeRequest

ATTEMPTS = 5
CONCURRENCY = 8
TIMEOUT = urllib3.Timeout(connect=10.0, read=120.0)
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0
_VERSION = ("id", "owned_by", "max_model_len")  # of what an endpoint lists; the rest are times and paths


class Endpoint(NamedTuple):
    """Where the judge is.

    Attributes:
        url: The base URL, ending in /v1. model: the model to ask. key: its key, "" for none.
        body: More fields of every request.
        vlmevalkit: The checkout whose words it is asked in, "" for ours.
    """

    url: str
    model: str
    key: str
    body: Mapping[str, Any] = {}
    vlmevalkit: str = ""


class JudgeClient:
    """Asks one judge. Equal messages are asked once; requests and answers are kept in `log`.

    Args:
        first_wait: Seconds before a request is tried again for the first time; later waits grow.
        journal: File that every answer is added to at once, and whose answers are not asked for again.

    Attributes:
        version: After `probe`, what the endpoint says that it is: model, owner, context, the name that it answers as.

    Raises:
        JudgeUnavailable: The address is malformed; from `find`, `probe` and `ask`, when the endpoint can't be reached,
            refuses, or answers nonsense after retries with growing waits (and temperature, from the second attempt on).
    """

    def __init__(self, endpoint: Endpoint, first_wait: float = FIRST_WAIT, journal: Path | None = None) -> None:
        self.endpoint = endpoint
        self.first_wait = first_wait
        self._journal = journal
        self.log: dict[str, str] = _journaled(journal) if journal is not None else {}
        self.version: dict[str, Any] = {}
        self._fingerprints: set[str] = set()
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        try:
            url = urllib3.util.parse_url(endpoint.url)
        except LocationParseError as error:
            raise self._unavailable(f"its address is none: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise self._unavailable("its address is none: it must begin with http:// or https://")
        # Not the proxy of the machine's settings, which is for the world outside: a judge is named by its address.
        self._client = urllib3.PoolManager(1, headers, maxsize=CONCURRENCY, timeout=TIMEOUT, retries=False)

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.clear()

    def find(self) -> None:
        """Check that the endpoint serves the model, which it is not asked anything; keep its version."""
        listed = self._send("GET", "models")
        try:
            served = {entry["id"]: entry for entry in listed["data"]}
        except (KeyError, TypeError) as error:
            raise self._unavailable(f"its list of models is malformed: {listed!r}"[:300]) from error
        if self.endpoint.model not in served:
            raise self._unavailable(f"it does not serve {self.endpoint.model!r}, only {', '.join(map(str, served))}")
        self.version = {key: value for key, value in served[self.endpoint.model].items() if key in _VERSION}

    def probe(self, request: JudgeRequest) -> None:
        """Check that the endpoint serves the model and answers `request` acceptably; keep its version."""
        self.find()
        self._answer(request)

    @property
    def fingerprints(self) -> list[str]:
        """What it said of its build with its answers, as OpenAI's `system_fingerprint`."""
        return sorted(self._fingerprints)

    def ask(self, requests: Sequence[JudgeRequest], on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Return the judge's answer to every request; the first failure cancels the rest."""
        distinct = {request.message: request for request in requests if request.message not in self.log}
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            futures = {threads.submit(self._answer, request): message for message, request in distinct.items()}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    self._keep(futures[future], future.result())
                    if on_progress:
                        on_progress(done, len(futures))
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise
        return [self.log[request.message] for request in requests]

    def _keep(self, message: str, answer: str) -> None:
        self.log[message] = answer
        if self._journal is not None:
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"request": message, "answer": answer}) + "\n")

    def _answer(self, request: JudgeRequest) -> str:
        said: Any = None
        system = [{"role": "system", "content": request.system}] if request.system else []
        for attempt in range(ATTEMPTS):
            body = {
                "model": self.endpoint.model,
                "messages": [*system, {"role": "user", "content": request.message}],
                "temperature": request.temperature + 0.5 * attempt,
                "max_tokens": request.max_tokens,
                **self.endpoint.body,
            }
            reply = self._send("POST", "chat/completions", body)
            try:
                said = reply["choices"][0]["message"]["content"]
                self._note_version(reply)
            except (KeyError, IndexError, TypeError):
                said = {"no chat completion": reply}  # never taken for an answer, whatever it is
            if isinstance(said, str) and request.accept(said.strip()):
                return said.strip()
        raise self._unavailable(f"{ATTEMPTS} answers in a row were no grade, the last was {str(said)[:200]!r}")

    def _note_version(self, reply: dict[str, Any]) -> None:
        """Keep under which name and fingerprints it answers; another name is another judge."""
        said = str(reply.get("model") or self.endpoint.model)
        if said != self.version.setdefault("answers_as", said):
            raise self._unavailable(f"it answers as {said!r} now, and as {self.version['answers_as']!r} before")
        if reply.get("system_fingerprint"):
            self._fingerprints.add(str(reply["system_fingerprint"]))

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request; try again after a time-out, a broken connection, 429, 5xx, or an answer that is no JSON."""
        cause = ""
        for attempt in range(ATTEMPTS):
            wait = min(self.first_wait * 2**attempt, LONGEST_WAIT)
            try:
                response = self._client.request(method, f"{self.endpoint.url.rstrip('/')}/{path}", json=body)
                if response.status == 200:
                    return json.loads(response.data)
                cause = f"it answered {response.status}: {response.data.decode(errors='replace')[:200]}"
                if response.status not in (408, 409, 429) and response.status < 500:
                    raise self._unavailable(cause)
                asked = response.headers.get("Retry-After", "")
                wait = min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
            except HTTPError as error:
                cause = f"{type(error).__name__}: {error}"
            except ValueError as error:
                cause = f"its answer is no JSON: {error}"
            if attempt < ATTEMPTS - 1:
                time.sleep(wait)
        raise self._unavailable(f"{ATTEMPTS} attempts failed, the last because {cause}")

    def _unavailable(self, cause: str) -> JudgeUnavailable:
        return JudgeUnavailable(f"the judge {self.endpoint.model} at {self.endpoint.url} is of no use: {cause}")


def _journaled(path: Path) -> dict[str, str]:
    """The answers in a journal; a last line that was cut off is cut away."""
    kept: dict[str, str] = {}
    if not path.is_file():
        return kept
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    path.write_bytes(whole)
    for line in whole.splitlines():
        entry = json.loads(line)
        kept[entry["request"]] = entry["answer"]
    return kept
