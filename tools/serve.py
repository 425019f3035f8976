"""A small HTTP server around an exported model: an example to start from, not a product.

    python tools/serve.py runs/debug/student/export --port 8000
    curl --data-binary @picture.png http://127.0.0.1:8000/

POST / takes the bytes of one file, and answers {label, probability, top}, or {error} with 400
(not what the model reads), 408 (not whole in time), 411 or 413 (no or too large a length) or 503
(busy). GET /healthz and GET /metrics are for who runs it. It has no TLS and asks nobody who they
are: keep it on loopback or behind something that does. SIGTERM ends it when what was begun is
answered.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from cmkd_scale.data.modalities import DecodeError
from cmkd_scale.errors import CmkdError
from cmkd_scale.operations.predict import Predictor
from cmkd_scale.operations.predict_files import max_bytes

_WAIT_SECONDS = 10.0  # for a client to send or take more


class Server(ThreadingHTTPServer):
    """One model, a thread a request, at most ``at_once`` of them with a file in memory."""

    daemon_threads = False  # so that closing waits for what was begun

    def __init__(
        self,
        address: tuple[str, int],
        predictor: Predictor,
        *,
        at_once: int = 8,
    ) -> None:
        super().__init__(address, _Handler)
        self.predictor = predictor
        self.max_bytes = min(max_bytes(predictor.modality), 2**25)
        self.room = threading.BoundedSemaphore(at_once)
        self.model_lock = threading.Lock()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cmkd_serve_requests", "Answers.", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "cmkd_serve_duration_seconds", "From a request to its answer.", registry=self.registry
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _WAIT_SECONDS

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._send(200, b"ok\n", "text/plain")
        elif self.path == "/metrics":
            self._send(200, generate_latest(self.server.registry), CONTENT_TYPE_LATEST)
        else:
            self._answer(404, {"error": "there are POST /, GET /healthz and GET /metrics."})

    def do_POST(self) -> None:
        began = time.monotonic()
        if self.server.room.acquire(blocking=False):
            try:
                status, answer = self._predict()
            finally:
                self.server.room.release()
        else:
            status, answer = 503, {"error": "busy, try again."}
        self._answer(status, answer)
        self.server.requests.labels(str(status)).inc()
        self.server.seconds.observe(time.monotonic() - began)

    def _predict(self) -> tuple[int, dict[str, Any]]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, {"error": "send a Content-Length."}
        if len(length) > 15 or int(length) > self.server.max_bytes:
            return 413, {"error": f"at most {self.server.max_bytes} bytes are read."}
        try:
            content = self.rfile.read(int(length))
            if len(content) < int(length):
                raise TimeoutError
            inputs = self.server.predictor.decode(content)[None]
        except TimeoutError:
            return 408, {"error": "the file did not arrive in time and whole."}
        except DecodeError as error:
            return 400, {"error": str(error)}
        with self.server.model_lock:
            (top,) = self.server.predictor.top(inputs)
        if not top:
            return 400, {"error": "the model has no finite scores for it."}
        ranks = [{"label": label, "probability": share} for label, share in top]
        return 200, {**ranks[0], "top": ranks}

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode() + b"\n", "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what a client has sent is none of a terminal's business."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Serve an exported model over HTTP.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch")
    parser.add_argument("--device", metavar="D")
    options = parser.parse_args(arguments)
    try:
        predictor = Predictor(options.directory, device=options.device, backend=options.backend)
        server = Server((options.host, options.port), predictor)
    except CmkdError as error:
        parser.exit(error.exit_code, f"{error}\n")
    except (OSError, OverflowError) as error:
        parser.exit(2, f"{options.host}:{options.port} cannot be served ({error}).\n")
    with server:
        for number in (signal.SIGTERM, signal.SIGINT):
            # From a thread, since shutdown waits for the loop that the signal has interrupted.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        address = f"http://{options.host}:{server.server_port}/"
        print(f"serving {options.directory} at {address}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
