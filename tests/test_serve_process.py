"""`ktc serve` and `ktc chat` as processes, with the model of the package."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from helpers.processes import ktc_serve
from helpers.servers import wait_for

from ktcompile.quant import FORMATS

BODY = {"model": "tiny", "prompt": "import ", "max_tokens": 400, "ignore_eos": True, "seed": 1}


def post(port: int, body: dict[str, Any], key: str = "") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection.getresponse()


def model_name(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    return str(json.loads(connection.getresponse().read())["data"][0]["id"])


def status(port: int, key: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/status", headers={"Authorization": f"Bearer {key}"})
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    return found


def test_a_process_serves_rests_and_drains(tmp_path: Path) -> None:
    settings = tmp_path / "server.toml"
    settings.write_text('served_model_name = "wrong"\nmax_num_seqs = 5\nlog_level = "debug"\n')
    flags = ("--config", str(settings), "--log-format", "json", "--served-model-name", "tiny")
    with ktc_serve(*flags, KTCOMPILE_API_KEY="secret", KTCOMPILE_SERVE_MAX_N="2") as (process, port, log):
        assert post(port, BODY).status == 401
        assert post(port, {**BODY, "n": 3}, "secret").status == 400
        assert post(port, {**BODY, "max_tokens": 2, "prompt": "my secret"}, "secret").status == 200
        found = status(port, "secret")
        assert found["weight_format"] in FORMATS and found["block_size"] == 64
        counts = found["expert_counts"]
        assert [len(layer) for layer in counts] == [16] * 4 and all(sum(layer) > 0 for layer in counts)
        # Nothing is done while nothing is asked.
        seen = psutil.Process(process.pid)
        before = sum(seen.cpu_times()[:2])
        time.sleep(2)
        assert sum(seen.cpu_times()[:2]) - before <= 0.02
        # A chat with it.
        command = [sys.executable, "-P", "-c", "import sys, ktcompile.cli as c; sys.exit(c.main())", "chat"]
        said = subprocess.run(
            [*command, "--url", f"http://127.0.0.1:{port}", "--api-key", "secret", "--max-tokens", "5"],
            input="def f(x):\n/reset\nimport os\n/quit\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert said.returncode == 0, said.stderr
        assert len(said.stdout.splitlines()) >= 2
        # SIGTERM in the middle of a stream.
        response = post(port, {**BODY, "stream": True}, "secret")
        text = response.read(50)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("draining" in line for line in log))
        refused = post(port, BODY, "secret")
        assert refused.status == 503 and refused.headers["Retry-After"]
        text += response.read()
        assert text.endswith(b"data: [DONE]\n\n")
        assert text.count(b'"finish_reason":"length"') == 1
        assert process.wait(30) == 0
        time.sleep(0.1)
        records = [json.loads(line) for line in log if line.startswith("{")]
    assert [r["status"] for r in records if r.get("path") == "/v1/completions"][:3] == [401, 400, 200]
    assert any(record["message"] == "drained" for record in records)
    assert "my secret" not in "".join(log)


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    with ktc_serve("--max-model-len", "2000") as (process, port, log):
        bodies = [{**BODY, "model": model_name(port), "max_tokens": 1900, "stream": True, "seed": i} for i in range(8)]
        responses = [post(port, body) for body in bodies]
        assert all(response.read(20) for response in responses)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: any("draining" in line for line in log))
        process.send_signal(signal.SIGTERM)
        texts = [response.read() for response in responses]
        assert process.wait(30) == 0
    assert any("is closed" in text.decode() for text in texts)
    assert not all('"finish_reason":"length"' in text.decode() for text in texts)


def test_what_cannot_be_set_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    import pytest

    from ktcompile.cli import main

    wrong = tmp_path / "wrong.toml"
    for text, why in (("prot = 1", "port"), ("port = 'x'", "port"), ("port = ", "TOML"), ("port = 70000", "65535")):
        wrong.write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            printed: list[str] = []
            patch.setattr(sys.stderr, "write", printed.append)
            assert main(["serve", "--config", str(wrong)]) == 2
        assert why in "".join(printed), text
