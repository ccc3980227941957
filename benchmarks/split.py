"""Time a whole model with its experts on the CPU, on a GPU, and on both.

    python benchmarks/split.py MODEL --fractions 0 0.5 1                  a directory or a hub id
    python benchmarks/split.py MODEL --prompt 2048 --formats bf16 int4 --json split.json

Each row is one way to run the model: "cpu" without a device, a fraction of each layer's experts on the GPU with the
rest on the CPU, and "stock": transformers with all of the model on the GPU, where it fits. With --compiled each
fraction has a row for the compiled model, Inductor between the kernels. All begin with the same prompt of random
tokens; decode is the median step of a greedy continuation, of one request, after a few that do not count. Prompts are
timed twice behind a first one ("first"), and the faster counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import ktcompile

ON_DEVICE = {"device": "cuda"}
COMPILED = " compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="F")
    parser.add_argument("--formats", nargs="+", default=["auto"], metavar="FORMAT")
    parser.add_argument("--placement", default="uniform", help="see ktc generate --help")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="of decode")
    parser.add_argument("--compiled", action="store_true", help="each fraction by torch.compile too")
    parser.add_argument("--skip", nargs="+", choices=["cpu", "stock"], default=[])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("split.py needs a GPU, and PyTorch sees none")
    rows = []
    for name, options in ways(args):
        try:
            model = stock(args.model) if options is None else ktcompile.load(args.model, **options)
            run: Any = model
            if name.endswith(COMPILED):
                run = torch.compile(model, backend="kt", dynamic=True, options=ON_DEVICE)
            row = {"way": name} | timed(run, args.prompt, args.steps)
            if options and "device" in options:
                row["experts"] = str(ktcompile.expert_metrics(model).summary())
            del model, run
        except Exception as error:  # the others are still worth having
            row = {"way": name, "error": f"{type(error).__name__}: {error}"}
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row)
        print(line(row, args.prompt), flush=True)
    if args.json:
        facts = {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(args.json).write_text(json.dumps(facts | {"rows": rows}))


def ways(args: argparse.Namespace) -> list[tuple[str, dict[str, Any] | None]]:
    found: list[tuple[str, dict[str, Any] | None]] = []
    for weight_format in args.formats:
        if "cpu" not in args.skip:
            found.append((f"cpu {weight_format}", {"weight_format": weight_format}))
        for fraction in args.fractions:
            options = ON_DEVICE | {"device_expert_fraction": fraction, "placement": args.placement}
            name = f"{fraction:.0%} {weight_format}"
            for suffix in ("", COMPILED) if args.compiled else ("",):
                found.append((name + suffix, options | {"weight_format": weight_format}))
    if "stock" not in args.skip:
        found.append(("stock", None))
    return found


def stock(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto", experts_implementation="grouped_mm").eval().cuda()


def line(row: dict[str, Any], prompt: int) -> str:
    if "error" in row:
        return f"{row['way']:16} {row['error']}"
    rate = f"{prompt / row['prefill']:8.0f} tokens/s of {prompt}"
    steps = f"decode {row['decode'] * 1e3:7.2f} ms   first {row['first']:5.1f} s"
    return f"{row['way']:16} prefill {rate}   {steps}   {row.get('experts', '')}"


@torch.no_grad()
def timed(model: Any, prompt: int, steps: int) -> dict[str, float]:
    """Return the seconds of a first prompt, of those after it, and of a step."""
    generator = torch.Generator().manual_seed(0)
    where = model.get_input_embeddings().weight.device
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, prompt), generator=generator).to(where)
    prefill = []
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        wait(where)
        begin = time.perf_counter()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        chosen = logits[:, -1:].argmax(-1)
        wait(where)
        prefill.append(time.perf_counter() - begin)
    decode = []
    for _ in range(steps + 4):
        begin = time.perf_counter()
        chosen = model(chosen, past_key_values=cache).logits[:, -1:].argmax(-1)
        wait(where)
        decode.append(time.perf_counter() - begin)
    return {"first": prefill[0], "prefill": min(prefill[1:]), "decode": statistics.median(decode[4:])}


def wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
