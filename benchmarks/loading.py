"""Time the first start of a model, which packs it, and the next ones, which map what was packed.

Each start is a process of its own: imports, `ktcompile.load`, the first token of a prompt of 16 tokens, then 16 more.
`cold` packs and writes the file of the cache, `warm` maps it (the file is in the system's cache of files then), `off`
packs without a cache. `engine cold` and `engine warm` are starts of `ktcompile.LLM` with the model's tokenizer: the
first traces a step and keeps it, the next ones run that. Modules are compiled to bytecode beforehand, as an
installation does. On a machine with other work the seconds of the CPU, of all threads together, say more than those of
the clock. Peaks are of the whole process: all of its memory, and what is its alone (anonymous).

    python benchmarks/loading.py ~/models/Qwen3-30B-A3B --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ktcompile.models import tiny_model

_START = """
import json, sys, threading, time
begin, cpu = time.perf_counter(), time.process_time()
model, weight_format, cache = sys.argv[1:]
import torch
import transformers
times = {"import torch, transformers": time.perf_counter() - begin}
cpus = {"import torch, transformers": time.process_time() - cpu}

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], resident("RssAnon"))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()

def timed(name, function, *args, **others):
    at, used = time.perf_counter(), time.process_time()
    result = function(*args, **others)
    times[name] = times.get(name, 0) + time.perf_counter() - at
    cpus[name] = cpus.get(name, 0) + time.process_time() - used
    return result

def inside(module, function, name):
    plain = getattr(module, function)
    setattr(module, function, lambda *args, **others: timed(name, plain, *args, **others))

def imports():
    import ktcompile.models.load
timed("import ktcompile", imports)
import ktcompile
from ktcompile.models import load as loading, packed_model, streaming
inside(loading, "key_of", "load: key")
inside(streaming, "load", "load: pack")
inside(packed_model, "store", "load: write")
from ktcompile.ops import self_check
inside(self_check.FirstCall, "check", "first token: check")
inside(packed_model, "verify", "load: verify")
inside(packed_model, "_without_weights", "load: model without weights")
before = resident("VmHWM")
loaded = timed("load", ktcompile.load, model, weight_format=weight_format, packed_cache=cache)
ids = torch.arange(16)[None] + 100

def step(**inputs):
    with torch.no_grad():
        return loaded(**inputs, use_cache=True)

out = timed("first token", step, input_ids=ids)
total, used = time.perf_counter() - begin, time.process_time() - cpu
decode = []
for _ in range(16):
    at = time.perf_counter()
    out = step(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    decode.append(time.perf_counter() - at)
print(json.dumps({"seconds": times, "cpu seconds": cpus, "to first token": total, "cpu to first token": used,
    "decode step": min(decode), "peak": resident("VmHWM"), "peak before load": before, "peak anonymous": peak[0],
    "token": int(out.logits[0, -1].argmax())}))
"""


_ENGINE = """
import json, sys, time
begin, cpu = time.perf_counter(), time.process_time()
model, weight_format, cache = sys.argv[1:]
from ktcompile import LLM, SamplingParams
imports = time.perf_counter() - begin
llm = LLM(model, weight_format=weight_format, packed_cache=cache)
made = time.perf_counter() - begin
prompt = {"prompt_token_ids": list(range(100, 116))}
(answer,) = llm.generate(prompt, SamplingParams(1, 0.0, ignore_eos=True))
total, used = time.perf_counter() - begin, time.process_time() - cpu
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
decode = time.perf_counter()
llm.generate(prompt, SamplingParams(65, 0.0, ignore_eos=True))
print(json.dumps({"seconds": {"import ktcompile": imports, "LLM": made - imports}, "to first token": total,
    "cpu to first token": used, "decode step": (time.perf_counter() - decode) / 65, "peak": peak,
    "token": answer.outputs[0].token_ids[0]}))
"""


def start(model: Path, weight_format: str, cache: str, program: str = _START) -> dict[str, object]:
    """Return what one start took. RuntimeError: it failed."""
    command = [sys.executable, "-c", program, str(model), weight_format, cache]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"a start failed:\n{done.stderr}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a checkpoint")
    parser.add_argument("--weight-format", default="auto")
    parser.add_argument("--cache", type=Path, help="for the packed model, removed afterwards (default: beside MODEL)")
    parser.add_argument("--rounds", type=int, default=3, help="warm starts (default: %(default)s)")
    parser.add_argument("--off", action="store_true", help="time a start without a cache, too")
    parser.add_argument("--no-engine", action="store_true", help="time no starts of an engine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.cache or args.model.parent) as cache:
        kinds = ("off", "cold", "warm", "engine cold", "engine warm")
        found: dict[str, list[dict[str, object]]] = {kind: [] for kind in kinds}
        start(tiny_model.path(), "auto", "off", _ENGINE)  # for the bytecode
        if args.off:
            found["off"].append(start(args.model, args.weight_format, "off"))
        found["cold"].append(start(args.model, args.weight_format, cache))
        size = sum(file.stat().st_size for file in Path(cache).iterdir())
        found["warm"] += [start(args.model, args.weight_format, cache) for _ in range(args.rounds)]
        for i in range(0 if args.no_engine else 1 + args.rounds):
            found["engine warm" if i else "engine cold"].append(start(args.model, args.weight_format, cache, _ENGINE))
    if args.json:
        print(json.dumps({"packed_bytes": size, **found}, indent=1))
        return 0
    print(f"packed: {size / 1e9:.2f} GB")
    for kind, runs in found.items():
        for run in runs:
            print(f"{kind}: " + json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
