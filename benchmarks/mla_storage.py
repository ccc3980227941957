"""Prefill and decode of an engine that keeps latents against one that keeps expanded keys and values, in CPU time.

The attention is DeepSeek-V2-Lite's (16 heads of 128 + 64, latents of 512), the experts are small, weights random. Run
it from the root of the repository: `PYTHONPATH=tests python -P benchmarks/mla_storage.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from helpers.text_model import byte_level_tokenizer
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

import ktcompile
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import MLA_STORAGES, EngineOptions
from ktcompile.engine.sampling_params import SamplingParams

VOCABULARY, ANSWER = 512, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 2048])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    ktcompile.set_num_threads(1)
    torch.set_num_threads(1)
    engines = {storage: engine_of(args.layers, storage) for storage in MLA_STORAGES}
    for prompt in args.prompts:
        for _ in range(args.rounds):
            for storage, engine in engines.items():
                prefill, steps = run(engine, prompt)
                print(
                    f"{prompt:6} tokens, {storage:8}: prefill {prefill:.2f} s, decode {1e3 * min(steps):.1f} ms"
                    f" (median {1e3 * statistics.median(steps):.1f})",
                    flush=True,
                )


def engine_of(layers: int, storage: str) -> Engine:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=256,
        intermediate_size=2048,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=16384,
    )
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16).eval()
    options = EngineOptions(mla_storage=storage, max_num_seqs=8, kv_device_memory=2 << 30, enable_prefix_caching=False)
    return Engine.of_model(model, byte_level_tokenizer(), options, note=print)


def run(engine: Engine, prompt: int) -> tuple[float, list[float]]:
    """Return CPU seconds of all steps up to the first token, and of each step of decode."""
    ids = torch.randint(0, VOCABULARY, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.add("a", ids, SamplingParams(ANSWER, 0.0, ignore_eos=True))
    prefill, steps, answered = 0.0, list[float](), False
    while engine.has_requests:
        begin = time.process_time()
        deltas = engine.step()
        seconds = time.process_time() - begin
        if answered:
            steps.append(seconds)
        else:
            prefill += seconds
        answered = answered or any(delta.token_ids for delta in deltas)
    return prefill, steps


if __name__ == "__main__":
    main()
