"""A vLLM that is none: the parts of its interface that the benchmarks of models and caches use, as a module's source.

The next token is the sum of those before it. All requests but the first have theirs a step late. With prefix caching,
what blocks of an earlier prompt began with is found.
"""

from __future__ import annotations

FAKE_VLLM = """
import os, types
class SamplingParams:
    def __init__(self, **settings): self.__dict__.update(settings)
class Engine:
    model_config = types.SimpleNamespace(get_vocab_size=lambda: 50)
    def __init__(self, length, most, caches, block_size=64, kv_cache_memory_bytes=1 << 20):
        self.requests, self.most, self.model_config.max_model_len = {}, most, length
        self.caches, self.size, self.seen = caches, block_size, set()
        config = types.SimpleNamespace(num_gpu_blocks=kv_cache_memory_bytes // block_size)
        self.vllm_config = types.SimpleNamespace(cache_config=config)
    def add_request(self, name, prompt, settings):
        ids = list(prompt["prompt_token_ids"])
        assert settings.max_tokens >= 1 and settings.temperature == 0 and len(self.requests) < self.most
        begins = [tuple(ids[:end]) for end in range(self.size, len(ids), self.size)]
        found = max((len(b) for b in begins if b in self.seen), default=0)
        if self.caches: self.seen.update(begins)
        self.requests[name] = [ids, 1 if self.requests else 0, len(ids) + settings.max_tokens, found]
    def abort_request(self, names): self.requests = {n: r for n, r in self.requests.items() if n not in names}
    def has_unfinished_requests(self): return bool(self.requests)
    def step(self):
        outputs = []
        for name, request in self.requests.items():
            request[1] -= 1
            if request[1] < 0:
                request[0].append(sum(request[0]) % 50)
                assert len(request[0]) <= self.model_config.max_model_len
                result = types.SimpleNamespace(token_ids=request[0])
                found = request[3]
                outputs.append(types.SimpleNamespace(request_id=name, outputs=[result], num_cached_tokens=found))
        self.requests = {n: r for n, r in self.requests.items() if len(r[0]) < r[2]}
        return outputs
class LLM:
    def __init__(self, model, max_model_len, max_num_seqs, enable_prefix_caching, dtype, skip_tokenizer_init,
                 max_num_batched_tokens, **kv):
        if model.endswith("broken"): raise RuntimeError("cannot\\nload")
        if model.endswith("fatal"): os.abort()
        assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1
        self.llm_engine = Engine(max_model_len, max_num_seqs, enable_prefix_caching, **kv)
        print("vllm says hello")
"""
