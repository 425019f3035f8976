"""The page in a real browser: nothing sticks out at the side, nothing is fetched.

The page itself allows no script, so its measures are taken on a copy that does.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.monitoring.report import write_report
from tests.monitoring.test_report_runs import NAMES, make_memory, make_predictions, make_run

CHROMIUM = shutil.which("chromium")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  parent.postMessage({inner: innerWidth, scroll: root.scrollWidth, fetched}, "*");
});</script>"""
# A window of its own is never as narrow as a telephone.
FRAME = """<!DOCTYPE html><title></title>
<script>onmessage = event => { document.title = JSON.stringify(event.data); };</script>
<iframe src="{name}" style="border: 0; width: {width}px; height: 900px"></iframe>"""
HOSTILE = ("<img src=http://127.0.0.1:9/x>", "x" * 3000, "\u202e$\\frac{1}$ 猫")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def browse(tmp_path: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
        ),
        f"--user-data-dir={tmp_path / 'profile'}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(tmp_path: Path, page: str, width: int) -> dict[str, Any]:
    """Widths of window and page in CSS pixels, and the addresses of what the page fetched."""
    copy, found = POLICY.subn("", page)
    assert found == 1
    (tmp_path / "copy.html").write_text(copy.replace("</body>", f"{MEASURE}</body>"), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("{name}", "copy.html").replace("{width}", f"{width}"))
    dom = browse(tmp_path, frame, "--window-size=1600,1000", "--dump-dom").stdout
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    measured: dict[str, Any] = json.loads(html.unescape(title[1]))
    return measured


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of normal and of hostile names, of runs done and under way."""
    root = tmp_path_factory.mktemp("layout")
    runs = []
    for classes, word in ((NAMES, "plain"), (HOSTILE, HOSTILE[1][:200])):
        memory = make_memory(root / f"{word[:5]}.safetensors", classes)
        for seed, method in enumerate(("ce_ls", "ucmkd_global", f"kd_{word}", "ce_ls")):
            by_class = dict.fromkeys(classes, 0.1 * seed)
            run = make_run(
                root / f"{word}-{seed}",
                method,
                metrics={"test/accuracy": 0.1 * seed, "test/per_class_accuracy": by_class},
                memory_file=str(memory),
                versions={"torch": classes[1]},
            )
            make_predictions(run, classes)
            config = {"run": {"seed": 0}, "method": {"name": method}, "data": {word: classes[1]}}
            (run / "config.yaml").write_text(json.dumps(config))
            runs.append(run)
        (runs[-1] / "results.json").unlink()
    return write_report(runs, root / "report.html")[0]


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_sticks_out_and_nothing_is_fetched(tmp_path: Path, page: Path, width: int) -> None:
    measured = measure(tmp_path, page.read_text(encoding="utf-8"), width)
    assert measured["inner"] == width
    assert measured["scroll"] <= width
    assert measured["fetched"] == []


def test_the_measure_sees_what_sticks_out_and_what_is_fetched(tmp_path: Path) -> None:
    policy = '<meta http-equiv="Content-Security-Policy" content="">'
    wide = '<div style="width: 900px">x</div><img src="http://127.0.0.1:9/x.png">'
    text = f"<!DOCTYPE html><html><head>{policy}<title></title></head><body>{wide}</body></html>"
    measured = measure(tmp_path, text, 400)
    assert measured["scroll"] > 400
    assert measured["fetched"] == ["http://127.0.0.1:9/x.png"]


def test_the_page_keeps_to_its_own_policy(tmp_path: Path, page: Path) -> None:
    said = browse(tmp_path, page, "--enable-logging=stderr", "--dump-dom").stderr
    assert "Content Security Policy" not in said
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"))
    said = browse(tmp_path, broken, "--enable-logging=stderr", "--dump-dom").stderr
    assert "Content Security Policy" in said
