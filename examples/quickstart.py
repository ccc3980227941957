"""Compile a Hugging Face MoE model with backend "kt" and compare it with the stock model.

    python examples/quickstart.py                        # the model that ships with ktcompile
    python examples/quickstart.py --model Qwen/Qwen3-30B-A3B

The model is not modified, and nothing of ktcompile is imported to compile it.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parents[1] / "ktcompile/models/tiny"


def main() -> None:
    """Print perplexity and speed of the stock and of the compiled model, and what the compiler did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="path or hub id (default: the embedded model)")
    parser.add_argument("--text", type=Path, default=TINY / "eval.txt", help="text for the perplexity")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of it to use")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[:, : args.tokens]

    torch.set_grad_enabled(False)
    stock = perplexity(model, ids)
    compiled = torch.compile(model, backend="kt")
    begin = time.perf_counter()
    compiled(ids[:, :512], use_cache=False)
    print(f"compiled in {time.perf_counter() - begin:.1f} s")
    ours = perplexity(compiled, ids)

    print(f"{'':12}{'perplexity':>12}{'tokens/s':>12}")
    for name, (value, speed) in (("stock", stock), ("backend kt", ours)):
        print(f"{name:12}{value:12.3f}{speed:12.0f}")

    from ktcompile import compile_reports

    for report in compile_reports():
        print(report)


def perplexity(model: torch.nn.Module, ids: torch.Tensor, window: int = 512) -> tuple[float, float]:
    """Return (perplexity of `ids` [1, N] in windows, tokens per second)."""
    total, count, seconds = 0.0, 0, 0.0
    for begin in range(0, ids.shape[1] - window + 1, window):
        part = ids[:, begin : begin + window]
        start = time.perf_counter()
        logits = model(part, use_cache=False).logits
        seconds += time.perf_counter() - start
        total += torch.nn.functional.cross_entropy(logits[0, :-1].float(), part[0, 1:], reduction="sum").item()
        count += window - 1
    return math.exp(total / count), (count + count // (window - 1)) / seconds


if __name__ == "__main__":
    main()
