"""A real Prometheus server on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

POLL = 0.1  # seconds


class Server:
    """Asks a server what it knows."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        """Whether it answers queries."""
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """What the API answers, an error included."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                return dict(json.load(error))

    def query(self, expression: str, *labels: str) -> dict[tuple[str, ...], float]:
        """An instant vector: values by the values of ``labels``."""
        answer = self.get("query", query=expression)
        assert answer["status"] == "success", answer
        return {
            tuple(sample["metric"].get(label, "") for label in labels): float(sample["value"][1])
            for sample in answer["data"]["result"]
        }

    def firing(self) -> set[tuple[str, str]]:
        """Name and job of each alert that fires."""
        return {
            (alert["labels"]["alertname"], alert["labels"].get("job", ""))
            for alert in self.get("alerts")["data"]["alerts"]
            if alert["state"] == "firing"
        }


def wait_for(what: Callable[[], bool], seconds: float, about: Callable[[], object]) -> float:
    """Wait until ``what`` holds, and return how long that took; ``about`` explains a failure."""
    begun = time.monotonic()
    while not what():
        waited = time.monotonic() - begun
        assert waited < seconds, f"not within {seconds:g} s: {about()}"
        time.sleep(POLL)
    return time.monotonic() - begun


@contextmanager
def serve(program: str, directory: Path, config: Mapping[str, Any]) -> Iterator[Server]:
    """Run a server with this configuration until the block ends.

    Args:
        program: path of prometheus.
        directory: for its files.
        config: content of ``prometheus.yml``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (directory / "prometheus.yml").write_text(yaml.safe_dump(dict(config), width=1000))
    log = directory / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Server(port)
        wait_for(server.ready, 30, log.read_text)
        yield server
    finally:
        process.terminate()
        process.wait(30)
