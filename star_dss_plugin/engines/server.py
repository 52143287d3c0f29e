"""Fetch label probabilities from a server with OpenAI's completions API, such as `vllm serve`.

Prompts are sent as token ids, the longest of a response first, in a few concurrent requests. A
request that fails for a transient reason (429, 5xx, a lost connection, a timeout) is retried with
exponential backoff. The API key comes from the environment and appears in no message, log or
provenance.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from torch import Tensor

from star_dss_plugin.engines.completions import completion_request, read_completions
from star_dss_plugin.engines.connection import Connection
from star_dss_plugin.engines.label_rows import longest_first, rows_of_group
from star_dss_plugin.engines.shared_prompts import SharedPrompts
from star_dss_plugin.errors import GuardError
from star_dss_plugin.validation import shortened
from star_dss_plugin.visible import visible_line

__all__ = ["ServerEngine"]

logger = logging.getLogger(__name__)

_TRANSIENT_STATUSES = {408, 409, 425, 429}  # and 500 to 599
_PROMPT_STATUSES = {400, 413, 422}  # caused by one prompt (too long, say), not by all requests
_MAX_WAIT_SECONDS = 30.0
_ANSWER_BYTES = 1 << 20
_PROMPT_BYTES = 1 << 16  # added for each prompt of the request
_SHOWN_MODELS = 5
_RETRIES_AT_START = 2  # report an unreachable server soon


class ServerEngine:
    """Send prompts to a server over HTTP as an `Engine`.

    Args:
        url: `http://host:port`, with or without the path `/v1`.
        model: The guard's name on the server.
        concurrency: Number of requests in flight at a time.
        prompts_per_request: Largest number of prompts in one request, all about one response.
        timeout: Seconds from sending a request to the last byte of its answer.
        retries: How often a failed request is sent again. 20 retries wait about six minutes in all,
            enough to restart a server.
        max_requests: The budget: the largest number of requests that may be sent, retries included.
            None means no limit.
        api_key_env: Name of the environment variable that holds the API key. If it is not set, no
            key is sent.

    Attributes:
        sent: Number of requests sent so far.

    Raises:
        GuardError: The server cannot be reached, refuses the key, or serves another model.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        concurrency: int = 8,
        prompts_per_request: int = 64,
        timeout: float = 600.0,
        retries: int = 20,
        max_requests: int | None = None,
        api_key_env: str = "STAR_DSS_API_KEY",
    ) -> None:
        self.sent = 0
        self._url = url
        self._model = model
        self._per_request = prompts_per_request
        self._retries = retries
        self._max_requests = max_requests
        self._key_name = api_key_env
        self._key = os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise GuardError(
                f"The environment variable {api_key_env} holds characters that an HTTP header "
                "cannot carry. Set it to the key alone."
            )
        self._counting = threading.Lock()
        # One event per call, so that a new call does not revive the requests of a stopped one.
        self._stops: set[threading.Event] = set()
        self._closed = False
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="star-dss-server")
        self._timeout = timeout
        self._thread = threading.local()
        self._connections: list[Connection] = []
        try:
            self._pool.submit(self._check_model).result()
        except BaseException:
            self.close()
            raise

    def label_logprobs(
        self, groups: Sequence[Sequence[Sequence[int]]], label_ids: Sequence[int]
    ) -> list[Tensor]:
        """See `Engine.label_logprobs`."""
        shared = [SharedPrompts.from_prompts(group) for group in groups]
        parts: list[tuple[int, list[int]]] = []
        for number, of_group in enumerate(shared):
            ordered = longest_first(of_group)
            for first in range(0, len(ordered), self._per_request):
                parts.append((number, ordered[first : first + self._per_request]))
        self._check_budget(len(parts))
        known: list[dict[int, list[float]]] = [{} for _ in groups]
        with self._stoppable() as stop:
            futures = [
                self._pool.submit(self._complete, number, shared[number], indices, label_ids, stop)
                for number, indices in parts
            ]
            try:
                for (number, indices), future in zip(parts, futures, strict=True):
                    known[number].update(zip(indices, future.result(), strict=True))
            except BaseException:
                stop.set()  # the call has failed, so its other requests need no retries
                for future in futures:
                    future.cancel()
                raise
        return [
            rows_of_group(group, rows, len(label_ids))
            for group, rows in zip(shared, known, strict=True)
        ]

    def close(self) -> None:
        """Stop the pending requests of all calls and close the connections."""
        with self._counting:
            self._closed = True
            for stop in self._stops:
                stop.set()
        for connection in list(self._connections):
            connection.close()
        self._pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[threading.Event]:
        """Yield an event that `close` sets, at which a call stops its retries.

        Raises:
            GuardError: The engine was closed before the call or while it ran.
        """
        stop = threading.Event()
        with self._counting:
            if self._closed:
                raise self._closed_error()
            self._stops.add(stop)
        try:
            yield stop
        except (CancelledError, RuntimeError) as error:  # what a closed pool raises
            if not self._closed:
                raise
            raise self._closed_error() from error
        finally:
            with self._counting:
                self._stops.discard(stop)

    def _closed_error(self) -> GuardError:
        return GuardError(
            f"The connection to the server at {self._url} was closed while it was needed. Close a "
            "guard only when nothing is scored with it any more."
        )

    def _connection(self) -> Connection:
        """Return this thread's connection, opened on first use."""
        if not hasattr(self._thread, "connection"):
            url = self._url if self._url.endswith("/v1") else f"{self._url}/v1"
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._thread.connection = Connection(url, headers, self._timeout)
            self._connections.append(self._thread.connection)
        found: Connection = self._thread.connection
        return found

    def _check_model(self) -> None:
        retries = min(self._retries, _RETRIES_AT_START)
        with self._stoppable() as stop:
            listed = self._send("GET", "/models", None, retries, None, stop).get("data")
        entries = listed if isinstance(listed, list) else []
        served = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        if self._model not in served:
            shown = ", ".join(map(shortened, served[:_SHOWN_MODELS])) or "nothing"
            more = ", …" if len(served) > _SHOWN_MODELS else ""
            raise GuardError(
                f"The server at {self._url} serves {shown}{more}, "
                f"not {self._model!r}. If it is the same guard under another name, say so with "
                'engine_options {"model": NAME}; otherwise start it with the guard.'
            )

    def _check_budget(self, requests: int) -> None:
        """Raise a GuardError before sending requests that the budget does not cover."""
        if self._max_requests is not None and self.sent + requests > self._max_requests:
            raise GuardError(
                f"The budget of {self._max_requests} requests does not cover the next "
                f"{requests} ({self.sent} were sent). What was scored is in the cache: raise "
                "engine_options max_requests and start the same run again."
            )

    def _complete(
        self,
        number: int,
        group: SharedPrompts,
        indices: Sequence[int],
        label_ids: Sequence[int],
        stop: threading.Event,
    ) -> list[list[float]]:
        """Return the labels' log-probabilities after prompts of group `number`, in one request."""
        prompts = [group[i] for i in indices]
        body = completion_request(self._model, prompts, label_ids)
        answer = self._send("POST", "/completions", body, self._retries, number, stop)
        return read_completions(answer, prompts, label_ids, url=self._url, model=self._model)

    def _send(
        self,
        method: str,
        path: str,
        body: Any,
        retries: int,
        number: int | None,
        stop: threading.Event,
    ) -> Any:
        """Send a request, with retries until `stop` is set, and return the answer's JSON object."""
        for attempt in range(retries + 1):
            self._count_request()
            retry_after = ""
            try:
                answer = self._connection().ask(method, path, body, _max_bytes(body))
                if 200 <= answer.status < 300:
                    return answer.json_object()
            except httpx2.RequestError as error:
                problem = self._shown(f"{type(error).__name__}: {error}")
            except ValueError as error:
                problem = self._shown(f"its answer is damaged ({error})")
            else:
                retry_after = answer.retry_after
                said = self._shown(answer.body.decode("utf-8", "replace"))
                problem = f"status {answer.status}: {said}"
                if answer.status not in _TRANSIENT_STATUSES and answer.status < 500:
                    raise self._refusal_error(answer.status, problem, number)
            if attempt == retries:
                break
            wait = _wait(attempt, retry_after)
            logger.warning(
                "The server at %s: %s. Trying again in %.1f s.", self._url, problem, wait
            )
            if stop.wait(wait):
                break
        raise GuardError(
            f"The server at {self._url} did not answer in {attempt + 1} tries; the last failed "
            f"with {problem}. Start it (vllm serve {self._model}) or correct the address, and "
            "start the same run again: what was scored is in the cache."
        )

    def _count_request(self) -> None:
        with self._counting:
            self._check_budget(1)
            self.sent += 1

    def _refusal_error(self, status: int, problem: str, number: int | None) -> GuardError:
        hint = "Change what it complains about."
        if status in (401, 403):
            given = "was sent" if self._key else "is not set"
            hint = f"The key in the environment variable {self._key_name} {given}."
        return GuardError(
            f"The server at {self._url} refused a request with {problem}. {hint}",
            request=number if status in _PROMPT_STATUSES else None,
        )

    def _shown(self, text: str) -> str:
        """Return text from the server on one line, with the API key masked.

        Some servers repeat the key. Masking comes before truncation, because it would not recognize
        half of a key.
        """
        return visible_line(text.replace(self._key, "***") if self._key else text, 500)


def _max_bytes(body: Any) -> int:
    """Return the size limit of an answer, many times the size that `vllm serve` sends."""
    prompts = len(body["prompt"]) if body else 0
    return _ANSWER_BYTES + prompts * _PROMPT_BYTES


def _wait(attempt: int, retry_after: str) -> float:
    """Return seconds until the next try: the server's Retry-After, else exponential backoff."""
    after = retry_after.strip()
    if after.isascii() and after.isdecimal():
        return min(float(after), _MAX_WAIT_SECONDS)
    with contextlib.suppress(ValueError, OverflowError):  # it may also be a date (RFC 9110)
        until = parsedate_to_datetime(after)
        now = dt.datetime.now(until.tzinfo or dt.UTC)
        left = (until.replace(tzinfo=until.tzinfo or dt.UTC) - now).total_seconds()
        if left > 0:
            return min(left, _MAX_WAIT_SECONDS)
    # Randomized, so that requests which failed together are not repeated together.
    return min(_MAX_WAIT_SECONDS, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
