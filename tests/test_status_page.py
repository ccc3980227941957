"""The page at / in a real browser: Debian's `chromium`, driven by playwright."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from ktcompile.server.status import Latency, Status, page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NOTHING = "\u2013"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

FULL = Status(
    model="/models/Qwen3-30B-A3B",
    version="0.1.0",
    state="ready",
    isa="avx2",
    threads=2,
    weight_format="int4",
    uptime_seconds=93784,
    requests_running=7,
    requests_waiting=12,
    requests_finished=1234,
    requests_rejected=3,
    preemptions=1,
    prompt_tokens=100_000,
    generation_tokens=50_000,
    kv_usage=0.42,
    kv_blocks=4096,
    block_size=16,
    max_model_len=32768,
    ttft=Latency(0.1234, 0.5, 2.0),
    itl=Latency(0.025, 0.04, 0.1),
    expert_counts=[[100] * 128 if layer else [12800] + [0] * 127 for layer in range(48)],
)


def test_the_page_takes_nothing_from_elsewhere():
    text = page()
    assert text.startswith("<!doctype html>") and "</html>" in text
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w""", text)
    assert re.findall(r"""(?:src|href)=["']([^"']*)""", text) == ["data:,"]
    assert "innerHTML" not in text and "eval(" not in text


def test_the_page_reads_the_fields_that_there_are():
    read = set(re.findall(r"status\.(\w+)", page()))
    assert read == set(Status.__dataclass_fields__)
    assert json.loads(json.dumps(FULL.to_json()))["ttft"] == {"p50": 0.1234, "p90": 0.5, "p99": 2.0}
    assert Latency.of([]) is None and Latency.of([1.0, 3.0]) == Latency(2.0, 2.8, 2.98)


class Server:
    """Serves the page and a status that the test sets. failing: /status answers 500."""

    def __init__(self):
        self.status, self.failing, self.asked = {}, False, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += self.path == "/status"
                kind, content = "text/html; charset=utf-8", page()
                if self.path == "/status":
                    kind, content = "application/json", json.dumps(outer.status)
                self.send_response(500 if outer.failing and self.path == "/status" else 200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # As root, as in a container, Chromium has no sandbox of its own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def shown(browser, server):
    """Give a function that shows a status at a width; mistakes of the page's script fail the test."""
    problems, contexts = [], []

    def show(status, width=1200, scheme="light"):
        server.status = status
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda r: r.url.startswith((server.url, "data:")) or problems.append(f"asked {r.url}"))
        tab.goto(server.url)
        tab.wait_for_function("document.getElementById('state').textContent !== 'connecting'")
        folder = os.environ.get("KT_SCREENSHOTS")
        if folder:
            tab.wait_for_timeout(2500)
            tab.screenshot(path=Path(folder) / f"status-{scheme}-{width}-{len(status)}.png", full_page=True)
        return tab

    yield show
    for context in contexts:
        context.close()
    assert problems == []


@needs_browser
def test_everything_is_shown(shown):
    tab = shown(FULL.to_json())
    text = tab.inner_text("main")
    for words in (
        "/models/Qwen3-30B-A3B",
        "ready",
        "kernels avx2",
        "experts int4",
        "up 1 d 2 h",
        "12 waiting",
        "1,234 finished, 3 refused, 1 preempted",
        "42 %",
        "4,096 blocks of 16 tokens",
        "48 layers down, 128 experts across",
        "128.0 times",
    ):
        assert words in text
    rows = tab.locator("#latency tr").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["TTFT", "123", "500", "2,000"],
        ["ITL", "25.0", "40.0", "100"],
    ]
    pixel = "(x, y) => Array.from(document.getElementById('heat').getContext('2d').getImageData(x, y, 1, 1).data)"
    hot, cold, mean = (tab.evaluate(f"({pixel})({x}, {y})") for x, y in ((0, 0), (5, 0), (5, 9)))
    assert hot == [180, 40, 20, 255] and cold == [244, 246, 249, 255] and cold[0] > mean[0] > hot[0]


@needs_browser
def test_rates_are_differences_of_totals(shown, server):
    tab = shown(FULL.to_json())
    assert tab.inner_text("#generated") in (NOTHING, "0.0")
    for total in range(50_500, 52_500, 500):
        server.status = {**FULL.to_json(), "generation_tokens": total, "requests_running": 3}
        before = server.asked
        tab.wait_for_function("() => true")
        for _ in range(100):
            if server.asked > before:
                break
            tab.wait_for_timeout(50)
    tab.wait_for_function("document.getElementById('running').textContent === '3'")
    tab.wait_for_timeout(300)
    shown_rate = float(tab.inner_text("#generated").replace(",", ""))
    assert 0 < shown_rate <= 600
    assert tab.locator("#rates path").get_attribute("d").startswith("M")
    # One that was started again has no negative rate.
    server.status = {**FULL.to_json(), "generation_tokens": 5}
    tab.wait_for_function(f"document.getElementById('generated').textContent === '{NOTHING}'")


@needs_browser
@pytest.mark.parametrize(
    "status",
    [{}, {"model": "a"}, dict.fromkeys(Status.__dataclass_fields__), {"expert_counts": []}, {"kv_usage": 0}],
)
def test_what_is_not_known_is_left_out(shown, status):
    tab = shown(status)
    assert tab.inner_text("#state") == "ready" and tab.inner_text("h1") == (status.get("model") or "ktcompile")
    visible = [card.get_attribute("data-needs") for card in tab.locator(".card").all() if card.is_visible()]
    assert visible == [name for name in status if name in ("expert_counts", "kv_usage") and status[name] is not None]
    for word in ("undefined", "null", "NaN"):
        assert word not in tab.inner_text("main")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_can_be_read_at_any_width_by_day_and_night(shown, width, scheme):
    tab = shown(
        {**FULL.to_json(), "model": "a-model-with-a-very-long-name-that-has-no-place-to-break-" * 3}, width, scheme
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = tab.evaluate(
        """() => {
          const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const card = light(getComputedStyle(document.querySelector('.card')).backgroundColor);
          return [...document.querySelectorAll('.card h2, .big, .note, td, th, #state')].map((e) => {
            const own = light(getComputedStyle(e).color);
            return (Math.max(own, card) + 0.05) / (Math.min(own, card) + 0.05); }); }"""
    )
    assert min(contrasts) >= 4.5  # the W3C's bound for text
    assert scheme == "light" or tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


@needs_browser
def test_a_server_that_does_not_answer_is_told_and_found_again(shown, server):
    tab = shown(FULL.to_json())
    server.failing = True
    tab.wait_for_function("document.getElementById('state').textContent === 'no answer'")
    server.failing = False
    server.status = {**FULL.to_json(), "state": "draining"}
    tab.wait_for_function("document.getElementById('state').textContent === 'draining'")
    assert tab.locator("#state").get_attribute("class") == "warn"
