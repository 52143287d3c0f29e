"""Keep one HTTP connection to a server that may answer anything, and end each request in time."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2

__all__ = ["Answer", "Connection"]


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        status: The HTTP status.
        retry_after: The header of this name; "" if there is none.
        body: All bytes, as they came.
    """

    status: int
    retry_after: str
    body: bytes

    def json_object(self) -> dict[str, Any]:
        """Return the body as a JSON object.

        Raises:
            ValueError: It is something else, or nested too deep.
        """
        try:
            found = json.loads(self.body)
        except RecursionError as error:
            raise ValueError("its JSON is nested too deep") from error
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
        return found


class Connection:
    """One connection, used by one thread.

    Args:
        url: Base of all requests.
        headers: Sent with each request. Compressed answers are never asked for.
        timeout: Seconds from the beginning of a request to the last byte of its answer.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._late = False
        self._request = 0
        self._changing = threading.Lock()
        self._client = httpx2.Client(
            base_url=url,
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0)),
            limits=httpx2.Limits(max_connections=1),
        )

    def ask(self, method: str, path: str, body: Any, max_bytes: int) -> Answer:
        """Send a request and return its whole answer.

        Args:
            method: Of HTTP.
            path: Below the base.
            body: Sent as JSON, unless it is None.
            max_bytes: The longest answer that is read.

        Raises:
            httpx2.RequestError: The connection failed, or the answer was not there in time.
            ValueError: The answer is too long, or compressed: a few kB could fill any memory.
        """
        self._request += 1
        self._late = False
        # Timeouts of the client are those of single reads; a server can send a byte at a time.
        timer = threading.Timer(self._timeout, self._cut, [self._request])
        timer.daemon = True
        timer.start()
        try:
            return self._ask(method, path, body, max_bytes)
        except (httpx2.RequestError, ValueError) as error:
            if self._late:
                raise httpx2.ReadTimeout(
                    f"the answer was not complete after {self._timeout:g} s"
                ) from error
            raise
        finally:
            timer.cancel()
            with self._changing:
                self._request += 1

    def _ask(self, method: str, path: str, body: Any, max_bytes: int) -> Answer:
        with self._client.stream(
            method, path, json=body, extensions={"trace": self._trace}
        ) as response:
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding != "identity":
                raise ValueError("it is compressed, though it was asked not to be")
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(f"it has more than {max_bytes} bytes")
            if self._late:
                raise ValueError("cut off")
            retry_after = response.headers.get("Retry-After", "")
            return Answer(response.status_code, retry_after, bytes(data))

    def close(self) -> None:
        """Close the connection; a request that is under way fails."""
        self._cut(self._request)
        self._client.close()
        if self._socket is not None:
            self._socket.close()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            opened = info["return_value"].get_extra_info("socket")
            if self._socket is not None:
                self._socket.close()
            # A copy: TLS takes the socket itself over.
            self._socket = opened.dup()

    def _cut(self, request: int) -> None:
        """End a request that is still under way: its thread then reads the end of the answer."""
        with self._changing:
            if request == self._request and self._socket is not None:
                self._late = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
