"""OpenAI-compatible HTTP endpoint on the loopback interface with scripted replies, for demos and tests."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CHARACTERS_PER_TOKEN = 4  # approximates the usage of common vocabularies on English text


@dataclass(frozen=True, slots=True)
class Reply:
    """Reply of the endpoint to one request.

    Args:
        content: Text of the message.
        status: HTTP status. If it is not 200, `content` is sent as the message of an error body.
        headers: Additional HTTP headers.
        body: Raw body to send instead of a chat completion or an error.
        finish_reason: Finish reason of the completion.
        refusal: Text of a refusal.
        delay: Seconds to wait before the reply is sent.
        reset: Whether to reset the TCP connection instead of replying.
        usage: Usage to report. `None` reports an estimate of 4 characters per token.
    """

    content: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    finish_reason: str | None = "stop"
    refusal: str | None = None
    delay: float = 0.0
    reset: bool = False
    usage: Mapping[str, Any] | None = None


class LoopbackEndpoint:
    """Endpoint that serves `POST {base_url}/chat/completions` from a thread, without streaming.

    ```python
    with LoopbackEndpoint(lambda body: Reply('{"ranking": ["B", "A"]}')) as endpoint:
        ranker = LLMRanker("any-model", endpoint.base_url)
    ```

    Args:
        respond: Function from a request body to a reply. It is called concurrently, from one thread per connection. An
            exception becomes HTTP 500.
        api_key: Required bearer key. `None` accepts every request.
    """

    def __init__(self, respond: Callable[[dict[str, Any]], Reply], *, api_key: str | None = None) -> None:
        self._respond = respond
        self._api_key = api_key
        self._lock = threading.Lock()
        self._requests: list[dict[str, Any]] = []
        self._server: _Server | None = None

    @property
    def base_url(self) -> str:
        """Return the base URL for clients, which ends in `/v1` and is known after `start`."""
        if self._server is None:
            raise RuntimeError("The endpoint has no address yet. Call start() first.")
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Return the bodies of valid requests in order of arrival."""
        with self._lock:
            return list(self._requests)

    def start(self) -> LoopbackEndpoint:
        """Bind a free port and serve from a daemon thread."""
        if self._server is None:
            self._server = _Server(self)
            threading.Thread(target=self._server.serve_forever, args=(0.05,), name="loopback", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop serving and drop all connections, including those that wait for a reply."""
        server, self._server = self._server, None
        if server is not None:
            server.closing.set()
            server.shutdown()
            server.drop_connections()
            server.server_close()

    def __enter__(self) -> LoopbackEndpoint:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self, path: str, authorization: str, text: bytes) -> tuple[Reply, dict[str, Any]]:
        if self._api_key is not None and authorization != f"Bearer {self._api_key}":
            return Reply("Incorrect API key provided.", status=401), {}
        if path != "/v1/chat/completions":
            return Reply(f"Unknown path {path}.", status=404), {}
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return Reply("The body is not a JSON object.", status=400), {}
        with self._lock:
            self._requests.append(body)
        try:
            return self._respond(body), body
        except Exception as error:  # the client reports the error
            return Reply(f"{type(error).__name__}: {error}", status=500), body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a handler can be in a long delay
    request_queue_size = 1024  # the default of 5 resets most of many simultaneous connections

    def __init__(self, endpoint: LoopbackEndpoint) -> None:
        self.endpoint = endpoint
        self.closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Shut down all connections, because threads of idle keep-alive connections would wait forever."""
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: they only come from clients that closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections alive
    disable_nagle_algorithm = True
    wbufsize = -1  # send headers and body in one packet
    server: _Server

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        reply, body = self.server.endpoint._answer(self.path, self.headers.get("Authorization", ""), text)
        if self.server.closing.wait(reply.delay):
            self.close_connection = True
            return
        if reply.reset:
            self._reset()
            return
        content = _encode(reply, body)
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""

    def _reset(self) -> None:
        # With a linger time of 0, closing the connection sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _encode(reply: Reply, request: Mapping[str, Any]) -> bytes:
    if reply.body is not None:
        return reply.body.encode()
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.content, "type": "error", "param": None, "code": None}}).encode()
    message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
    return json.dumps(
        {
            "id": "chatcmpl-loopback",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model", ""),
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
            "usage": reply.usage if reply.usage is not None else _estimated_usage(reply, request),
        }
    ).encode()


def _estimated_usage(reply: Reply, request: Mapping[str, Any]) -> dict[str, int]:
    shown = sum(len(str(message.get("content", ""))) for message in request.get("messages", ()))
    prompt_tokens = math.ceil(shown / _CHARACTERS_PER_TOKEN)
    completion_tokens = math.ceil(len(reply.content) / _CHARACTERS_PER_TOKEN)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
