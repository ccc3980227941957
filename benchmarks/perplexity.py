"""Perplexity by weight format and KV format, beside that of the stock model in fp32.

    python benchmarks/perplexity.py                      the embedded model on the text that it was not trained on
    python benchmarks/perplexity.py MODEL --text FILE --weights bf16 int4 --kv fp32 int8 --json perplexity.json

Activations are fp32, so that all of a difference is that of what is stored: experts in the weight format, and keys and
values as `ktcompile.ops.PagedKV` stores them in the KV format. Windows of text are independent of each other.

Shape suffixes: B sequences, H heads of queries, J heads of keys, Q queries, S positions, D size of a key, V size of a
value.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask

import ktcompile
from ktcompile.models import hf_experts, tiny_model
from ktcompile.ops import KV_FORMATS, KVFormat, PagedKV
from ktcompile.quant import FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=tiny_model.path(), help="a directory")
    parser.add_argument("--text", type=Path, default=tiny_model.path() / "eval.txt", metavar="FILE")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--kv", nargs="+", choices=KV_FORMATS, default=list(KV_FORMATS), metavar="FORMAT")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--windows", type=int, metavar="N", help="no more than that many, spread over the text")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    windows = text_windows(args.model, args.text, args.window, args.windows)
    stock = perplexity(load(args.model, "grouped_mm", "sdpa"), windows)
    print(f"stock, fp32: {stock:.4f}, {windows.numel()} tokens in windows of {args.window}\n", flush=True)
    print("| weights | " + " | ".join(f"{kv} KV" for kv in args.kv) + " |")
    print("| --- " * (len(args.kv) + 1) + "|")
    rows = []
    for weights in args.weights:
        model = load(args.model, "kt", "kt")
        hf_experts.configure(model, weights)
        cells = []
        for kv in args.kv:
            model.set_attn_implementation(register(KV_FORMATS[kv]))
            value = perplexity(model, windows)
            rows.append({"weights": weights, "kv": kv, "perplexity": value, "more": value / stock - 1})
            cells.append(f"{value:.3f} ({value / stock - 1:+.3%})")
        print(f"| {weights} | {' | '.join(cells)} |", flush=True)
    if args.json:
        facts = {"model": str(args.model), "text": str(args.text), "window": args.window, "windows": len(windows)}
        Path(args.json).write_text(json.dumps(facts | {"stock": stock, "rows": rows}, indent=1))


def text_windows(model: Path, text: Path, size: int, most: int | None) -> Tensor:
    """Return the text's tokens in windows, [N, size]; what is left at the end is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // size * size].view(-1, size)
    if not len(windows):
        raise SystemExit(f"{text} has {len(ids)} tokens; a window has {size}")
    return windows if most is None else windows[:: -(-len(windows) // most)]


def load(folder: Path, experts: str, attention: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts, attn_implementation=attention
    )
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return e to the mean loss of all tokens but the first of each window."""
    losses = []
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, ids[1:]).item())
    return math.exp(sum(losses) / len(losses))


def register(kv_format: KVFormat) -> str:
    """Return the name of an attention implementation that stores all keys and values in a format first."""

    def forward(
        module: Any,
        query_BHQD: Tensor,
        key_BJSD: Tensor,
        value_BJSV: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        sequences, kv_heads, positions, key_size = key_BJSD.shape
        # A sequence is one block.
        kv = PagedKV.empty(kv_format, sequences, positions, kv_heads, key_size, value_BJSV.shape[3])
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (key_BJSD, value_BJSV))
        kv.store(*rows, torch.arange(sequences * positions))
        stored = (kv.key, kv.value, kv.key_scales, kv.value_scales)
        key, value, key_scales, value_scales = (None if x is None else x.transpose(1, 2) for x in stored)
        assert key is not None and value is not None
        out_BHQV = ktcompile.ops.attention(
            query_BHQD,
            key,
            value,
            mask=attention_mask,
            sinks=kwargs.get("s_aux"),
            causal=attention_mask is None,
            scale=scaling,
            softcap=kwargs.get("softcap"),
            key_scales=key_scales,
            value_scales=value_scales,
        )
        return out_BHQV.transpose(1, 2), None

    name = f"kt_{kv_format.name}"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


if __name__ == "__main__":
    main()
