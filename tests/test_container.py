"""The Dockerfile, whose steps run here without Docker, and what starts its image."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = ROOT / "docker" / "steps.sh"
BUILD = ROOT / "build" / "dev"


def instructions(kind):
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return [line.split(None, 1)[1] for line in joined.splitlines() if line.startswith(f"{kind} ")]


def test_each_run_line_is_a_step_and_each_step_is_one():
    called = [line.split() for line in instructions("RUN")]
    assert called and all(words[0] == "/src/docker/steps.sh" for words in called)
    known = set(re.findall(r"^(\w+)\)$", STEPS.read_text(), re.MULTILINE))
    assert {words[1] for words in called} == known
    subprocess.run(["sh", "-n", str(STEPS)], check=True)
    wrong = subprocess.run([str(STEPS), "other"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no step 'other'" in wrong.stderr


def test_the_image_is_no_root_and_tells_its_health():
    stages = DOCKERFILE.split("\nFROM ")[1:]
    names = [re.match(r"\S+ AS (\w+)", stage)[1] for stage in stages]
    assert names == ["wheel", "base", "cuda", "cpu"]
    for name, stage in zip(names, stages, strict=True):
        if name in ("cuda", "cpu"):
            assert stage.startswith("base ") and stage.rstrip().endswith("USER ktcompile")
    assert "http://127.0.0.1:8000/health" in instructions("HEALTHCHECK")[0]
    assert instructions("ENTRYPOINT") == ['["ktc"]'] and "0.0.0.0" in instructions("CMD")[0]


def test_what_the_build_needs_is_sent_to_it():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    needed = set(re.findall(r"^(?:cmake|native|passes|ktcompile)\b|^CMakeLists.txt|^pyproject.toml", tracked, re.M))
    assert needed <= set(kept)
    copied = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert all(word == "." or (ROOT / word).exists() for word in copied)


def test_compose_is_closed_to_others():
    record = yaml.safe_load((ROOT / "compose.yaml").read_text())
    targets = re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE)
    for name, service in record["services"].items():
        assert service["build"]["target"] == name and name in targets
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_knows_what_the_unit_says(tmp_path):
    text = (ROOT / "docker" / "ktc-serve.service").read_text()
    # The program is not installed here; all else is as it is.
    unit = tmp_path / "ktc-serve.service"
    unit.write_text(text.replace("/opt/ktcompile/bin/ktc", sys.executable))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    found = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (found.returncode, [line for line in found.stderr.splitlines() if "ktc-serve" in line]) == (0, [])
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", rated.stdout)
    assert exposure and float(exposure[1]) < 2.0, rated.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BUILD.is_dir(), reason="make setup leaves the built objects in build/dev")
def test_the_steps_make_a_server(tmp_path):
    """The wheel is made of objects that are built already, and the libraries are those of this environment: what is
    left out is apt, the compiler's minutes and the downloads."""
    prefix, libraries = tmp_path / "prefix", sysconfig.get_path("purelib")
    places = {"SRC": str(ROOT), "DIST": str(tmp_path / "dist"), "PREFIX": str(prefix), "PYTHON": sys.executable}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **places, "EXTRAS": "", "PATH": path}

    def step(*words):
        done = subprocess.run([str(STEPS), *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    step("wheel", "--no-build-isolation", f"--config-settings=build-dir={BUILD}")
    (wheel,) = (tmp_path / "dist").iterdir()
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    assert "ktcompile/server/static/index.html" in names and "ktcompile/_native" in names
    step("install", "--no-deps")
    environment["PYTHONPATH"] = libraries
    printed = step("check")
    assert "ktcompile" in printed and str(prefix) in run_python(
        prefix, "import ktcompile; print(ktcompile.__file__)", environment
    )
    if find_spec("ktcompile.cli.serve") is None:
        pytest.skip("ktc serve is not there yet")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(prefix / "bin" / "ktc"), "serve", "--host", "127.0.0.1", "--port", str(port)], env=environment, cwd="/"
    )
    try:
        assert healthy(f"http://127.0.0.1:{port}/health", server, 120)
    finally:
        server.terminate()
        assert server.wait(60) == 0


def run_python(prefix, program, environment):
    command = [str(prefix / "bin" / "python"), "-c", program]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout


def healthy(url, server, patience):
    end = time.monotonic() + patience
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False
