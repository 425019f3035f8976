"""Progress of a run in the status of its Kubeflow TrainJob (KEP-2779, Trainer v2.2 and later).

Where the feature gate ``TrainJobStatus`` is on, the controller gives each pod the address of its
status server, a CA file and a token file in environment variables.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

URL = "KUBEFLOW_TRAINER_SERVER_URL"
CA_CERT = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"

INTERVAL_SECONDS = 5.0
"""Between the beginnings of two requests, at least."""
LONGEST_INTERVAL_SECONDS = 300.0
"""The same where one attempt after the other fails: the interval doubles with each."""
CLOSE_SECONDS = 5.0
"""That the end of a run waits for its last status."""
TIMEOUT_SECONDS = 5.0
"""Of a connection, and of whatever is read from it."""

# Limits of the TrainJob's schema; one field beyond them and the server refuses the whole status.
_MOST_METRICS = 256
_LONGEST_NAME = 64
_LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a TrainJob's status goes."""

    url: str
    """``https://HOST:PORT/PATH``."""
    ca_file: Path
    """Certificate that the server's is signed with."""
    token_file: Path
    """Holds the token of the pod's service account."""

    def post(self, body: bytes) -> None:
        """Send one request. Both files are read each time: Kubernetes replaces them as they age.

        Raises:
            OSError: no answer, the wrong one, or a file that cannot be read.
            http.client.HTTPException: what answers does not speak HTTP.
            ValueError: a file does not hold what it should.
        """
        token = self.token_file.read_text("ascii").strip()
        address = urlsplit(self.url)
        # Neither proxies nor redirects: the token is for this server alone.
        connection = http.client.HTTPSConnection(
            address.netloc,
            timeout=TIMEOUT_SECONDS,
            context=ssl.create_default_context(cafile=self.ca_file),
        )
        try:
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", address.path, body, headers)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                said = answer.read(500).decode(errors="replace")
                raise ConnectionError(f"HTTP {answer.status} {answer.reason}: {said}")
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

    steps: int
    """That are planned."""
    step: int
    """That was finished last."""
    at: float
    """Unix time of that."""
    step_seconds: float | None = None
    """That each step still to come takes, as far as is known."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Of the last logged step."""

    def body(self) -> bytes:
        """The request that says so: an ``UpdateTrainJobStatusRequest``."""
        numbers = {"current_step": self.step, "total_steps": self.steps, **self.values}
        status: dict[str, Any] = {
            "lastUpdatedTime": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="seconds"),
            "progressPercentage": min(100, 100 * self.step // self.steps),
            "metrics": [
                {"name": name, "value": f"{number:.9g}"}
                for name, number in numbers.items()
                if len(name) <= _LONGEST_NAME and name != "eta_seconds"
            ][:_MOST_METRICS],
        }
        if self.step_seconds is not None:
            seconds = int(self.step_seconds * max(0, self.steps - self.step))
            status["estimatedRemainingSeconds"] = min(seconds, _LARGEST_INTEGER)
        return json.dumps({"trainerStatus": status}).encode()


class Reporter:
    """Sends the newest progress, at most once in ``INTERVAL_SECONDS``, and never fails.

    Args:
        endpoint: where to.
        progress: where the run stands at the beginning.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress = progress
        self._endpoint = endpoint
        self._clock = clock
        self._sent: Progress | None = None
        self._begun = -math.inf  # the last request
        self._failures = 0  # in a row
        self._warned = False

    def run(self, pause: Callable[[float], bool], rest: Callable[[float], object]) -> None:
        """Report until there is nothing left to report.

        Args:
            pause: waits so many seconds, and returns early and true once the run has ended.
            rest: waits so many seconds.
        """
        while not pause(self._turn()):
            pass
        if self.progress is not self._sent:
            rest(max(0.0, self._begun + INTERVAL_SECONDS - self._clock()))
            self._turn()

    def _turn(self) -> float:
        """Send the progress unless it was sent; seconds until the next turn."""
        progress = self.progress
        if progress is self._sent:
            return INTERVAL_SECONDS
        self._begun = self._clock()
        try:
            self._endpoint.post(progress.body())
            self._sent, self._failures = progress, 0
        except Exception as error:
            self._failures += 1
            self._warn(error)
        doubled = INTERVAL_SECONDS * (1 << min(self._failures, 10))
        return max(0.0, self._begun + min(doubled, LONGEST_INTERVAL_SECONDS) - self._clock())

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "The TrainJob's status is not up to date: %s does not take it (%s: %s). The run "
                "goes on, and so do attempts, ever more rarely.",
                self._endpoint.url,
                type(error).__name__,
                error,
            )


class TrainJobSink:
    """Keeps a TrainJob's status up to date, from a thread of its own; for rank 0.

    Args:
        endpoint: where to.
        steps: that are planned.
        step: after which the run begins.
    """

    def __init__(self, endpoint: Endpoint, *, steps: int, step: int = 0) -> None:
        self._reporter = Reporter(endpoint, Progress(steps, step, time.time()))
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._reporter.run,
            args=(self._ended.wait, time.sleep),
            name="TrainJob status",
            daemon=True,
        )
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a logged step; those that it lacks stay as they were."""
        progress = self._reporter.progress
        seconds = progress.step_seconds
        if "eta_seconds" in values:
            seconds = values["eta_seconds"] / max(1, progress.steps - step)
        self._reporter.progress = replace(
            progress,
            step=step,
            at=time.time(),
            step_seconds=seconds,
            values={**progress.values, **values},
        )

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Note that ``step`` has ended."""
        self._reporter.progress = replace(self._reporter.progress, step=step, at=time.time())

    def close(self) -> None:
        """Let the last status go out; waits ``CLOSE_SECONDS`` at most."""
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)


def from_environment(steps: int, step: int = 0) -> TrainJobSink | None:
    """What reports to the TrainJob that this process is part of; None if it is part of none.

    Args:
        steps: that are planned.
        step: after which the run begins.
    """
    url, ca_file, token_file = (os.environ.get(name, "") for name in (URL, CA_CERT, TOKEN))
    if not url:
        return None
    if not (url.startswith("https://") and ca_file and token_file):
        _log.warning(
            "The TrainJob's progress is not reported: %s must be an https:// address, and %s and "
            "%s must name files.",
            *(URL, CA_CERT, TOKEN),
        )
        return None
    return TrainJobSink(Endpoint(url, Path(ca_file), Path(token_file)), steps=steps, step=step)
