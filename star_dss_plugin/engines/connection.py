"""Send HTTP requests to an untrusted server, with limits on each answer's time and size."""

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
    """Hold a server's answer.

    Attributes:
        status: The HTTP status.
        retry_after: The Retry-After header; "" if there is none.
        body: The without_decoding bytes.
    """

    status: int
    retry_after: str
    body: bytes

    def json_object(self) -> dict[str, Any]:
        """Return the body as a JSON object.

        Raises:
            ValueError: The body is not a JSON object, or is nested too deep.
        """
        try:
            found = json.loads(self.body)
        except RecursionError as error:
            raise ValueError("its JSON is nested too deep") from error
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
        return found


class Connection:
    """Send requests over one connection, from one thread.

    Args:
        url: Base URL of all requests.
        headers: Sent with each request, besides a header that asks for uncompressed answers.
        timeout: Seconds from the start of a request to the last byte of its answer.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._timed_out = False
        # Changes when a request starts and ends, so that an old timer never cuts a new request.
        self._request = 0
        self._cutting = threading.Lock()
        self._client = httpx2.Client(
            base_url=url,
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0)),
            limits=httpx2.Limits(max_connections=1),
        )

    def ask(self, method: str, path: str, body: Any, max_bytes: int) -> Answer:
        """Send a request and return its whole answer.

        Args:
            method: HTTP method.
            path: Path below the base URL.
            body: Sent as JSON; None sends no body.
            max_bytes: Largest accepted size of the answer.

        Raises:
            httpx2.RequestError: The connection failed, or the answer was not complete in time.
            ValueError: The answer is too large, or compressed (a few kB could expand to gigabytes).
        """
        self._request += 1
        self._timed_out = False
        # The client's timeout applies to each read, and a server can send one byte at a time.
        timer = threading.Timer(self._timeout, self._cut, [self._request])
        timer.daemon = True
        timer.start()
        try:
            return self._ask(method, path, body, max_bytes)
        except (httpx2.RequestError, ValueError) as error:
            if self._timed_out:
                raise httpx2.ReadTimeout(
                    f"the answer was not complete after {self._timeout:g} s"
                ) from error
            raise
        finally:
            timer.cancel()
            with self._cutting:
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
            if self._timed_out:
                raise ValueError("cut off")
            retry_after = response.headers.get("Retry-After", "")
            return Answer(response.status_code, retry_after, bytes(data))

    def close(self) -> None:
        """Close the connection; a request in flight fails."""
        self._cut(self._request)
        self._client.close()
        if self._socket is not None:
            self._socket.close()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            opened = info["return_value"].get_extra_info("socket")
            if self._socket is not None:
                self._socket.close()
            # A duplicate, because TLS takes over the socket itself.
            self._socket = opened.dup()

    def _cut(self, request: int) -> None:
        """Shut the socket down if `request` is in flight, so that its thread stops reading."""
        with self._cutting:
            if request == self._request and self._socket is not None:
                self._timed_out = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
