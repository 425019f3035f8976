"""The container's health check: asks ``/healthz`` of the first process, if it has one.

CMKD_HEALTH_PORT is the run's ``monitor.prometheus_port``; without it there is nothing to ask, and
a container that runs is healthy.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5


def problem(port: str) -> str | None:
    """What is wrong with the process that answers at ``port``; None if nothing is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError as error:  # 503, with a line that says where it stands
        with error:
            return error.read().decode(errors="replace")
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    port = os.environ.get("CMKD_HEALTH_PORT")
    sys.exit(problem(port) if port else 0)
