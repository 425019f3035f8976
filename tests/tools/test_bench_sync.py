from __future__ import annotations

import socket
import threading

import pytest

from tools.bench import sync
from tools.bench._tcp_bytes import sent_by_this_process


def test_bytes_sent_are_those_of_this_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with client, connection:
            before, segments_before = sent_by_this_process()
            received = threading.Thread(target=_drain, args=(connection, 3_000_000))
            received.start()
            client.sendall(bytes(3_000_000))
            received.join()
            after, segments_after = sent_by_this_process()
    assert after - before == 3_000_000
    assert 0 < segments_after - segments_before <= 3_000_000 / 1_000


def _drain(connection: socket.socket, count: int) -> None:
    while count:
        count -= len(connection.recv(1 << 20))


@pytest.mark.multirank
@pytest.mark.slow
def test_two_ranks_send_what_the_formula_says() -> None:
    tables = sync.launch(2, quick=True)
    assert tables["wire"]["all-reduce, 8,000 floats"]["formula"] == 32_000
    assert tables["wire"]["gather, [32, 128]"]["formula"] == 4 * 32 * 128
    goals = {goal.name: goal for goal in sync.goals_of(2, tables)}
    assert goals["bytes off the formula, 2 ranks"].met
    assert len(goals) == 5
    shares = {name: row["wait_share"] for name, row in tables["step"].items()}
    assert set(shares) >= {"step", "step again", "all-reduce, 8.2 MB, hidden"}
    assert all(share >= 0 for share in shares.values())
