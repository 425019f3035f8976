"""The real server on loopback: good and bad files, several at a time, and its end."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmkd_scale.operations.predict import Predictor
from tests.conftest import REPOSITORY, kill_tree
from tests.operations.exports import write_random
from tools.serve import Server, main

pytestmark = pytest.mark.multirank


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "export"
    write_random(directory, "image", {"height": 16, "width": 16, "channels": 3})
    return directory


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "tools/serve.py", str(export), "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", program.stdout.readline())
            assert address, program.stderr and program.stderr.read()
            yield program, int(address[1])
        finally:
            kill_tree(program.pid)


def ask(port: int, path: str = "/", content: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=content)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def talk(port: int, words: bytes) -> bytes:
    """What comes back for ``words`` and the end of them."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_each_of_many_at_a_time_has_its_own_answer(export: Path, server: tuple[Any, int]) -> None:
    _, port = server
    predictor = Predictor(export)
    contents = [picture(seed) if seed % 3 else b"no picture" for seed in range(24)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda content: ask(port, content=content), contents))
    for content, (status, answer) in zip(contents, answers, strict=True):
        found = json.loads(answer)
        if content == b"no picture":
            assert (status, set(found)) == (400, {"error"})
            continue
        (top,) = predictor.top(predictor.decode(content)[None])
        assert status == 200
        assert found["label"] == found["top"][0]["label"] == top[0][0]
        assert [row["probability"] for row in found["top"]] == pytest.approx([p for _, p in top])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (b"POST / HTTP/1.0\r\n\r\n", 411),
        (b"POST / HTTP/1.0\r\nContent-Length: -1\r\n\r\n", 411),
        (b"POST / HTTP/1.0\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST / HTTP/1.0\r\nContent-Length: 50\r\n\r\nhalf of it", 408),
        (b"POST / HTTP/1.0\r\nContent-Length: 0\r\n\r\n", 400),
        (b"DELETE / HTTP/1.0\r\n\r\n", 501),
    ],
)
def test_what_is_no_whole_file_is_refused(
    server: tuple[Any, int], words: bytes, status: int
) -> None:
    assert talk(server[1], words).split()[1] == str(status).encode()


def test_one_too_many_is_told_to_come_again(export: Path) -> None:
    with Server(("127.0.0.1", 0), Predictor(export), at_once=0) as full:
        threading.Thread(target=full.serve_forever, daemon=True).start()
        status, answer = ask(full.server_port, content=picture(0))
        full.shutdown()
    assert (status, json.loads(answer)) == (503, {"error": "busy, try again."})


def test_health_metrics_and_a_clean_end(server: tuple[subprocess.Popen[str], int]) -> None:
    program, port = server
    assert ask(port, "/healthz") == (200, b"ok\n")
    assert ask(port, "/elsewhere")[0] == 404
    ask(port, content=picture(1))
    with socket.create_connection(("127.0.0.1", port)) as leaving:
        leaving.sendall(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n")
    status, metrics = ask(port, "/metrics")
    assert status == 200
    assert re.search(rb'cmkd_serve_requests_total\{status="200"\} [1-9]', metrics)
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("directory", "port", "said"),
    [("none", "0", "There is no directory none"), (None, "70000", "127.0.0.1:70000 cannot be")],
)
def test_what_cannot_be_served_is_said_in_a_line(
    export: Path, directory: str | None, port: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([directory or str(export), "--port", port])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)
