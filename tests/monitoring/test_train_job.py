"""The status of a TrainJob against a real HTTPS server with a certificate authority of its own."""

from __future__ import annotations

import ipaddress
import itertools
import json
import logging
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.monitoring import train_job
from cmkd_scale.monitoring.train_job import (
    Endpoint,
    Progress,
    Reporter,
    TrainJobSink,
    from_environment,
)

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/digits/status"


def make_authority(directory: Path, name: str) -> tuple[Path, Path]:
    """A CA's certificate, and a server's certificate for 127.0.0.1 with its key, as PEM files."""
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def certificate(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )

    authority = certificate(name, ca_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = certificate("server", key.public_key()).add_extension(host, critical=False)
    pem = serialization.Encoding.PEM
    ca_file, server_file = directory / f"{name}.crt", directory / f"{name}-server.pem"
    ca_file.write_bytes(authority.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    server_file.write_bytes(
        server.sign(ca_key, hashes.SHA256()).public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca_file, server_file


@dataclass
class Clock:
    """Time that passes only when somebody waits."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Controller:
    """What a status server has been told, and what it answers."""

    url: str
    ca_file: Path
    token_file: Path
    clock: Clock = field(default_factory=Clock)
    requests: list[SimpleNamespace] = field(default_factory=list)
    status: int = 200
    hangs: bool = False
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.ca_file, self.token_file)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_authority(tmp_path_factory.mktemp("authority"), "kubeflow")


@pytest.fixture
def controller(authority: tuple[Path, Path], tmp_path: Path) -> Iterator[Controller]:
    ca_file, server_file = authority
    token_file = tmp_path / "token"
    token_file.write_text("first\n")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.requests.append(
                SimpleNamespace(
                    path=self.path,
                    at=told.clock.now,
                    headers=dict(self.headers),
                    status=json.loads(body)["trainerStatus"],
                    size=len(body),
                )
            )
            if told.hangs:
                told.released.wait()
            self.send_response(told.status)
            if told.status == 302:
                self.send_header("Location", f"{told.url}/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    told = Controller(f"https://127.0.0.1:{server.server_port}{PATH}", ca_file, token_file)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield told
    told.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def report(reporter: Reporter, clock: Clock, turns: int) -> list[float]:
    """Let a reporter run for so many turns, with progress before each; what it waited for."""
    waits: list[float] = []

    def pause(seconds: float) -> bool:
        waits.append(seconds)
        clock.sleep(seconds)
        step = reporter.progress.step + 1
        reporter.progress = Progress(1000, step, at=clock.now)
        return len(waits) > turns

    reporter.run(pause, clock.sleep)
    return waits


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for their turn wait for next to nothing."""
    monkeypatch.setattr(train_job, "INTERVAL_SECONDS", 0.01)


@pytest.mark.usefixtures("hurried")
def test_the_controller_is_told_where_the_run_stands(controller: Controller) -> None:
    sink = TrainJobSink(controller.endpoint, steps=200, step=50)
    sink.log(60, {"loss": 0.25, "loss/ce": float("nan"), "eta_seconds": 70.0})
    sink.step(131, 0.5, 0.0)
    sink.log(131, {"test/accuracy": 0.5})
    sink.close()
    last = controller.requests[-1]
    assert last.path == PATH
    assert last.headers["Authorization"] == "Bearer first"
    assert last.headers["Content-Type"] == "application/json"
    observed = datetime.fromisoformat(last.status.pop("lastUpdatedTime"))
    assert abs(observed - datetime.now(UTC)) < timedelta(minutes=5)
    assert last.status == {
        "progressPercentage": 65,
        "estimatedRemainingSeconds": 34,  # half a second for each of 69 steps
        "metrics": [
            {"name": "current_step", "value": "131"},
            {"name": "total_steps", "value": "200"},
            {"name": "loss", "value": "0.25"},
            {"name": "loss/ce", "value": "nan"},
            {"name": "test/accuracy", "value": "0.5"},
        ],
    }


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("last_step", "percentage"), [(7, 70), (10, 100)])
def test_the_last_status_is_where_the_run_ended(
    controller: Controller, last_step: int, percentage: int
) -> None:
    sink = TrainJobSink(controller.endpoint, steps=10)
    for step in range(1, last_step + 1):
        sink.step(step, 0.1, 0.0)
    sink.close()
    assert controller.requests[-1].status["progressPercentage"] == percentage


def test_requests_are_five_seconds_apart_the_last_one_too(controller: Controller) -> None:
    reporter = Reporter(controller.endpoint, Progress(1000, 0, at=0.0), controller.clock)
    waits = report(reporter, controller.clock, turns=4)
    assert waits == [5.0] * 5
    assert [request.at for request in controller.requests] == [100.0 + 5 * n for n in range(6)]
    # Each tells the newest state alone.
    steps = [request.status["metrics"][0]["value"] for request in controller.requests]
    assert steps == ["0", "1", "2", "3", "4", "5"]


def test_the_last_status_waits_for_its_turn(controller: Controller) -> None:
    reporter = Reporter(controller.endpoint, Progress(10, 0, at=0.0), controller.clock)

    def ends_after_a_second(seconds: float) -> bool:
        controller.clock.sleep(1.0)
        reporter.progress = Progress(10, 10, at=controller.clock.now)
        return True

    reporter.run(ends_after_a_second, controller.clock.sleep)
    told = [(request.at, request.status["progressPercentage"]) for request in controller.requests]
    assert told == [(100.0, 0), (105.0, 100)]


def test_what_was_told_is_not_told_again(controller: Controller) -> None:
    reporter = Reporter(controller.endpoint, Progress(10, 3, at=0.0), controller.clock)
    ends = iter([False, False, True])
    reporter.run(lambda seconds: next(ends), controller.clock.sleep)
    assert len(controller.requests) == 1


@given(answers=st.lists(st.tuples(st.floats(0, 400), st.booleans()), min_size=1, max_size=40))
def test_whatever_the_server_does_attempts_stay_apart(answers: list[tuple[float, bool]]) -> None:
    clock = Clock()
    begun: list[float] = []
    left = iter(answers)

    class Slow(Endpoint):
        def post(self, body: bytes) -> None:
            begun.append(clock.now)
            seconds, fails = next(left, (0.0, True))
            clock.sleep(seconds)
            if fails:
                raise ConnectionError("gone")

    reporter = Reporter(Slow("", Path(), Path()), Progress(1000, 0, at=0.0), clock)
    report(reporter, clock, turns=len(answers) - 1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(begun)]
    assert len(begun) == len(answers) + 1
    assert all(gap > 4.999 for gap in gaps)
    failures = 0
    for gap, (seconds, fails) in zip(gaps[:-1], answers, strict=False):
        failures = failures + 1 if fails else 0
        assert gap == pytest.approx(max(seconds, min(300, 5 * 2**failures)))


def test_the_token_is_read_anew(controller: Controller) -> None:
    endpoint = controller.endpoint
    endpoint.post(b'{"trainerStatus": {}}')
    controller.token_file.write_text("second\n")
    endpoint.post(b'{"trainerStatus": {}}')
    tokens = [request.headers["Authorization"] for request in controller.requests]
    assert tokens == ["Bearer first", "Bearer second"]


def break_it(controller: Controller, fault: str, directory: Path) -> None:
    """Let every request fail as ``fault`` says."""
    if fault in ("401", "500", "302"):
        controller.status = int(fault)
    elif fault == "hangs":
        controller.hangs = True
    elif fault == "refused":
        controller.url = "https://127.0.0.1:1/status"
    elif fault == "not an address":
        controller.url = "https://127.0.0.1:port/status"
    elif fault == "other authority":
        controller.ca_file = make_authority(directory, "stranger")[0]
    elif fault == "no certificate":
        controller.ca_file = directory / "absent.crt"
    elif fault == "damaged certificate":
        controller.ca_file = directory / "damaged.crt"
        controller.ca_file.write_text("?")
    elif fault == "no token":
        controller.token_file.unlink()
    else:
        controller.token_file.write_text("first\nsecond")


FAULTS = {
    "401": "HTTP 401",
    "500": "HTTP 500",
    "302": "HTTP 302",
    "hangs": "timed out",
    "refused": "refused",
    "not an address": "InvalidURL",
    "other authority": "CERTIFICATE_VERIFY_FAILED",
    "no certificate": "FileNotFoundError",
    "damaged certificate": "SSLError",
    "no token": "FileNotFoundError",
    "two tokens": "Invalid header value",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_ends_the_run_and_each_is_warned_about_once(
    controller: Controller,
    fault: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_job, "TIMEOUT_SECONDS", 0.2)
    break_it(controller, fault, tmp_path)
    reporter = Reporter(controller.endpoint, Progress(1000, 0, at=0.0), controller.clock)
    waits = report(reporter, controller.clock, turns=2)
    assert waits == [10.0, 20.0, 40.0]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert FAULTS[fault] in record.getMessage()
    assert all("elsewhere" not in request.path for request in controller.requests)


def test_reports_go_on_when_the_server_is_back(
    controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    controller.status = 500
    reporter = Reporter(controller.endpoint, Progress(1000, 0, at=0.0), controller.clock)
    waits: list[float] = []

    def pause(seconds: float) -> bool:
        waits.append(seconds)
        controller.clock.sleep(seconds)
        reporter.progress = Progress(1000, len(waits), at=0.0)
        controller.status = 500 if len(waits) == 1 else 200
        return len(waits) == 4

    reporter.run(pause, controller.clock.sleep)
    assert waits == [10.0, 20.0, 5.0, 5.0]
    assert len(caplog.records) == 1


def test_a_server_that_hangs_does_not_hold_up_the_end(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_job, "CLOSE_SECONDS", 0.1)
    controller.hangs = True
    sink = TrainJobSink(controller.endpoint, steps=10)
    sink.log(10, {"loss": 1.0})
    sink.close()
    assert sink._thread.is_alive()


def test_a_status_keeps_to_the_limits_of_the_schema() -> None:
    values = {f"metric_{number}": -1.2345678901234e-300 for number in range(400)}
    values["a" * 65] = 1.0
    progress = Progress(10, 12, at=0.0, step_seconds=1.0, values=values)
    status = json.loads(progress.body())["trainerStatus"]
    assert status["progressPercentage"] == 100
    assert status["estimatedRemainingSeconds"] == 0
    assert len(status["metrics"]) == 256
    assert all(0 < len(text) <= 64 for metric in status["metrics"] for text in metric.values())
    assert len(progress.body()) < 2**16
    never = Progress(10**9, 1, at=0.0, step_seconds=1e9)
    assert json.loads(never.body())["trainerStatus"]["estimatedRemainingSeconds"] == 2**31 - 1


class TestEnvironment:
    @pytest.fixture
    def variables(
        self, controller: Controller, monkeypatch: pytest.MonkeyPatch
    ) -> pytest.MonkeyPatch:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", controller.url)
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(controller.ca_file))
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(controller.token_file))
        return monkeypatch

    @pytest.mark.usefixtures("hurried", "variables")
    def test_a_trainjob_is_reported_to(self, controller: Controller) -> None:
        sink = from_environment(steps=4, step=1)
        assert sink is not None
        sink.close()
        assert controller.requests[-1].status["progressPercentage"] == 25

    def test_elsewhere_nothing_is_reported(
        self, variables: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        variables.delenv("KUBEFLOW_TRAINER_SERVER_URL")
        assert from_environment(steps=4) is None
        assert not caplog.records

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1/status"),
            ("KUBEFLOW_TRAINER_SERVER_CA_CERT", ""),
            ("KUBEFLOW_TRAINER_SERVER_TOKEN", ""),
        ],
    )
    def test_what_is_incomplete_or_in_the_clear_is_not_used(
        self, variables: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
    ) -> None:
        variables.setenv(name, value)
        assert from_environment(steps=4) is None
        assert name in caplog.text


@pytest.mark.usefixtures("hurried")
def test_transformers_speaks_to_the_same_server_alike(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    if not hasattr(integrations, "KubeflowCallback"):
        pytest.skip("this transformers has no KubeflowCallback")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", controller.url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(controller.ca_file))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(controller.token_file))
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=3, epoch=None)
    callback: Any = integrations.KubeflowCallback()
    callback._MIN_UPDATE_INTERVAL = 0.0
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 0.5})
    callback.on_step_end(None, state, None)
    theirs = controller.requests[-1]
    sink = from_environment(steps=4)
    assert sink is not None
    sink.log(3, {"loss": 0.5, "eta_seconds": 1.0})
    sink.close()
    ours = controller.requests[-1]
    assert ours is not theirs

    def by_name(status: dict[str, Any]) -> dict[str, str]:
        return {metric["name"]: metric["value"] for metric in status["metrics"]}

    assert ours.status.keys() == theirs.status.keys()
    assert ours.status["progressPercentage"] == theirs.status["progressPercentage"]
    assert by_name(ours.status) == by_name(theirs.status)
    for name in ("Authorization", "Content-Type"):
        assert ours.headers[name] == theirs.headers[name]
