"""Serves many requests at once: schedule a step, run the model, choose tokens, pass on their text."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ktcompile.cache.key import child, root
from ktcompile.cache.rates import Rates
from ktcompile.cache.transfer import BlockMemory
from ktcompile.engine import kept_step
from ktcompile.engine.answers import Answer, Delta, ServedRequest
from ktcompile.engine.completion import Completion, with_texts
from ktcompile.engine.generate import end_tokens
from ktcompile.engine.namespace import namespace_of, weights_of
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.outputs import FinishReason, Logprobs
from ktcompile.engine.receipt import receipt_of
from ktcompile.engine.runner import ModelRunner
from ktcompile.engine.sampler import NotFiniteError, Sampled, SamplingState, sample
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.summary import ModelSummary
from ktcompile.engine.tiers import open_tiers
from ktcompile.kv.block_pool import BlockPool
from ktcompile.log import logger, tell
from ktcompile.models.load import load, locate
from ktcompile.models.packed_cache import AUTO
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.ops.experts import PackedExperts
from ktcompile.runtime.placing import without_new_profile
from ktcompile.scheduler.batch import Step
from ktcompile.scheduler.behind import Behind
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError
from ktcompile.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Delta", "Engine", "EngineStats"]

# Seconds that a step may wait for a load where there is nothing to compute.
_MOMENT = 0.01


class EngineStats(NamedTuple):
    """How an engine is, and what it did since it began.

    num_running, num_waiting: sequences, each answer of a request being one. kv_usage: the part of all blocks that is
    held, 0 to 1. prompt_tokens, generated_tokens: of answers that began to come, and of all answers.
    prefix_cache_queries, prefix_cache_hits: tokens of prompts that began to run, and those that were not computed then.
    prefix_cache_evictions: blocks that could be found and were handed out again.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    kv_usage: float
    num_preemptions: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prefix_cache_evictions: int = 0


class Engine:
    """A model that serves many requests. One thread calls `add`, `abort` and `step`.

    model: as of `ktcompile.LLM`; `Engine.of_model` takes one in memory. packed_cache: as of `ktcompile.load`, where
    also the step is kept that a start has traced, for the next one. note: is told what happens while it starts,
    which takes some seconds. UnsupportedModelError: the model cannot run over blocks. Other errors are those of
    `ktcompile.load`, and ValueError: an option cannot be used.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        options: EngineOptions | None = None,
        *,
        packed_cache: str | Path | None = AUTO,
        note: Callable[[str], None] = tell,
    ) -> None:
        options = options or EngineOptions()
        name = locate(model)
        tokenizer = load_tokenizer(name)
        weights = weights_of(name, options)
        runner = _continued(name, options, packed_cache, note)
        if runner is None:
            device = without_new_profile(options).device_options()
            note("loading the model")
            loaded = load(name, weight_format=options.weight_format, packed_cache=packed_cache, **device)
            runner = ModelRunner(loaded, options, note)
            kept_step.keep(runner, name, options, packed_cache)
        self._begin(runner, tokenizer, name, options, time.monotonic, weights, note)

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        options: EngineOptions | None = None,
        *,
        name: str = "model",
        clock: Callable[[], float] = time.monotonic,
        weights: str | None = None,
        note: Callable[[str], None] = tell,
    ) -> Engine:
        """Return an engine of a model in memory, whose weights it takes. clock: what deadlines are by, in seconds.
        weights: what names them, and no other model's; None: what is kept on disk is of no use to other engines."""
        self = cls.__new__(cls)
        options = options or EngineOptions()
        self._begin(ModelRunner(model, options, note), tokenizer, name, options, clock, weights, note)
        return self

    @classmethod
    def continued(
        cls,
        name: str,
        tokenizer: Any,
        options: EngineOptions,
        packed_cache: str | Path | None = AUTO,
        note: Callable[[str], None] = tell,
    ) -> Engine | None:
        """Return an engine of the step that an earlier start of a model kept, None if none did. name: as of
        `ktcompile.models.load.locate`."""
        runner = _continued(name, options, packed_cache, note)
        if runner is None:
            return None
        self = cls.__new__(cls)
        self._begin(runner, tokenizer, name, options, time.monotonic, weights_of(name, options), note)
        return self

    def keep(self, options: EngineOptions, packed_cache: str | Path | None = AUTO) -> None:
        """Keep the step for `continued`. The model is as `ktcompile.load` returned it but for what the engine did."""
        kept_step.keep(self._runner, self.model_name, options, packed_cache)

    def _begin(
        self,
        runner: ModelRunner,
        tokenizer: Any,
        name: str,
        options: EngineOptions,
        clock: Callable[[], float],
        weights: str | None,
        note: Callable[[str], None],
    ) -> None:
        self.model_name = name
        self.tokenizer = tokenizer
        self.vocab_size = runner.summary.vocab_size
        self._runner = runner
        self.max_model_len = self._runner.max_model_len
        self.namespace = namespace_of(
            runner.summary,
            tokenizer,
            options,
            self._runner.kv_format.name,
            self._runner.layers,
            weights=weights or secrets.token_hex(),  # nobody else's
        )
        self._caches, self.block_size = options.enable_prefix_caching, options.block_size
        self._pool = BlockPool(self._runner.num_blocks)
        memory = BlockMemory(self._runner.storage)
        opened = open_tiers(options, memory, self._runner.kv_bytes, clock)
        self._tiers = None if opened is None else opened.tiers
        self._secret = secrets.token_bytes() if opened is None else opened.secret
        behind = None
        if self._tiers is not None:
            rates = Rates(options.block_size, memory.block_bytes)
            behind = Behind(self._tiers, self._pool, rates, options.block_size)
        self._scheduler = Scheduler(options.scheduler_options(self.max_model_len), self._pool, clock, behind)
        self._requests: dict[str, ServedRequest] = {}
        self._answers: dict[str, Answer] = {}  # by the name that the scheduler knows
        self._ended: list[Delta] = []  # between steps
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self.last_step: Step | None = None  # what the last `step` computed

    @property
    def model(self) -> PreTrainedModel | None:
        """The model; None where the step of an earlier start is run."""
        return self._runner.model

    @property
    def summary(self) -> ModelSummary:
        """What is known of the model."""
        return self._runner.summary

    @property
    def experts(self) -> list[list[PackedExperts]]:
        """The packed forms of each layer of experts."""
        return self._runner.experts

    @property
    def has_requests(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._requests or self._ended)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> None:
        """Let a request wait for its turn; `params.n` answers are computed side by side.

        Answers are at most as long as positions are left. prompt: its text, for messages. deadline: by the engine's
        clock, time.monotonic; what has not ended then ends with "timeout". cache_salt: keys and values are shared only
        with requests of the same one. QueueFullError: too much waits.
        RequestTooLongError: there are no positions or blocks for it. ValueError: the prompt is empty or has tokens that
        the model lacks, params do, or the id is in use.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is served already; give each its own id")
        prompt_ids = [int(token) for token in prompt_token_ids]
        limit = self._limit(prompt_ids, params)
        parent = root(self.namespace, cache_salt, self._secret) if self._caches else None
        ends = self.summary.end_tokens if self.model is None else end_tokens(self.model)
        request = ServedRequest(request_id, prompt_ids, params)
        for index in range(params.n):
            completion = Completion(params, self.tokenizer, prompt_ids, ends, limit, index)
            name = f"{request_id}/{index}"
            asked = params.prompt_logprobs is not None and index == 0
            request.answers[name] = Answer(request, name, completion, index, asked)
        added: list[str] = []
        try:
            for name, answer in request.answers.items():
                self._scheduler.add(
                    name,
                    prompt_ids,
                    limit,
                    deadline=deadline,
                    prompt_logits=answer.asks_prompt,
                    root=parent,
                )
                added.append(name)
        except (QueueFullError, ValueError):
            for name in added:
                self._scheduler.finish(name)
            raise
        self._requests[request_id] = request
        self._answers.update(request.answers)

    def abort(self, request_id: str) -> None:
        """End a request, whatever it does; `step` tells so once. One that is unknown or has ended stays as it is."""
        request = self._requests.get(request_id)
        for name in list(request.answers) if request else ():
            self._ended.append(self._end(name, "abort"))

    def step(self) -> list[Delta]:
        """Run one step of the model, and return what answers have become; [] where there is nothing to do.

        Requests whose logits are not finite, and all of a step that fails, end with "error". Where all that could go on
        are being loaded from a tier, it waits for that, a moment at most.
        """
        for name in self._scheduler.expire():
            self._ended.append(self._close(name, "timeout"))
        deltas, self._ended = self._ended, []
        step = self.last_step = self._scheduler.schedule()
        if step is not None:
            self._run(step, deltas)
            self._steps += 1
        elif not deltas:
            self._scheduler.wait(_MOMENT)
        return deltas

    def tier_counters(self) -> dict[str, int]:
        """Return what happened in the tiers behind the device, by the names of `ktcompile.cache.counters`; nothing
        where there are none. Any thread may call."""
        return {} if self._tiers is None else self._tiers.counters

    def watch_tiers(self, watch: Callable[[str, int], None]) -> None:
        """Have a function told of what happens in the tiers behind the device, by the names of `tier_counters`. Any
        thread may call it, and it must be quick."""
        if self._tiers is not None:
            self._tiers.watch(watch)

    def kept_tokens(self, prompt_token_ids: Sequence[int], cache_salt: str = "", seconds: float = 0.0) -> int:
        """Return how many tokens of a prompt the tiers behind the device have, in whole blocks from the first on. What
        they were given is waited for, until it is kept or refused, for `seconds` at most."""
        if self._tiers is None:
            return 0
        self._tiers.settle(seconds)
        key, size = root(self.namespace, cache_salt, self._secret), self.block_size
        whole = len(prompt_token_ids) // size * size
        for begin in range(0, whole, size):
            key = child(key, prompt_token_ids[begin : begin + size])
            if not self._tiers.has(key):
                return begin
        return whole

    def close(self) -> None:
        """Write to disk what only the host has, and end the threads of the tiers; they are used no more. It takes some
        seconds at most."""
        if self._tiers is not None and not self._tiers.close():
            logger.warning("a disk does not answer; not all keys and values were written to it")

    def stats(self) -> EngineStats:
        """Return how the engine is now."""
        self._scheduler.give_back()
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            kv_usage=self._pool.num_held / self._pool.num_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            prefix_cache_queries=self._scheduler.prefix_cache_queries,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
            prefix_cache_evictions=self._pool.num_evicted,
        )

    def _run(self, step: Step, deltas: list[Delta]) -> None:
        """Run a step and add to `deltas`. Whatever happens, the scheduler learns that the step is over."""
        for start in step.started:
            answer = self._answers[start.request_id]
            answer.num_cached_tokens = start.num_cached_tokens
            prompt_tokens = len(answer.request.prompt_ids)
            answer.receipt = receipt_of(start, prompt_tokens, self.block_size, self._scheduler.recompute)
        sampled: dict[str, int] = {}
        try:
            self._compute(step, sampled, deltas)
        except Exception:
            logger.exception("a step of the model failed; its requests end")
            deltas += [
                self._end(chunk.request_id, "error") for chunk in step.chunks if chunk.request_id in self._answers
            ]
        except BaseException:  # nobody gets the deltas
            for chunk in step.chunks:
                if chunk.request_id in self._answers:
                    self._end(chunk.request_id, "abort")
            raise
        finally:
            self._scheduler.update(sampled)

    def _compute(self, step: Step, sampled: dict[str, int], deltas: list[Delta]) -> None:
        logits, places = self._runner.run(step)
        chosen: list[Answer] = []
        rows: list[int] = []
        for i, chunk in enumerate(step.chunks):
            answer = self._answers[chunk.request_id]
            if answer.asks_prompt:
                answer.note_prompt(chunk, logits[places[i] : places[i + 1]])
            if chunk.samples:
                chosen.append(answer)
                rows.append(places[i + 1] - 1)
        if not chosen:
            return
        wanted = logits if len(rows) == logits.shape[0] else logits[rows]
        tokens = _sample(wanted, [answer.completion.state for answer in chosen])
        for answer, token in zip(chosen, tokens, strict=True):
            if token is None:
                deltas.append(self._end(answer.name, "error"))
            else:
                sampled[answer.name] = token.token_id
                deltas.append(self._take(answer, token))

    def _take(self, answer: Answer, token: Sampled) -> Delta:
        """Add a token to an answer, and return what it becomes."""
        completion = answer.completion
        text = completion.add(token)
        self._generated_tokens += 1
        of_prompt = None if answer.began else self._first(answer)
        if completion.finish_reason is not None:
            self._scheduler.finish(answer.name)
            self._forget(answer.name)
        return answer.delta(text, (token.token_id,), completion.last_logprobs, of_prompt)

    def _first(self, answer: Answer) -> list[Logprobs | None] | None:
        """Note that an answer has its first token, and return what is asked for of the prompt's tokens."""
        answer.began = True
        self._prompt_tokens += len(answer.request.prompt_ids)
        if not answer.asks_prompt:
            return None
        answer.asks_prompt = False
        return [None, *(with_texts(self.tokenizer, found) for found in answer.of_prompt)]

    def _end(self, name: str, reason: FinishReason) -> Delta:
        """End an answer that the scheduler still has."""
        if reason == "error":
            self._scheduler.discard(name)
        else:
            self._scheduler.finish(name)
        return self._close(name, reason)

    def _close(self, name: str, reason: FinishReason) -> Delta:
        answer = self._answers[name]
        text = answer.completion.end(reason)
        self._forget(name)
        return answer.delta(text, (), [] if answer.request.params.logprobs is not None else None)

    def _forget(self, name: str) -> None:
        request = self._answers.pop(name).request
        del request.answers[name]
        if not request.answers:
            del self._requests[request.request_id]

    def _limit(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Return the tokens that an answer may have."""
        params.check_vocabulary(self.vocab_size)
        wrong = [token for token in prompt_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise ValueError(f"prompt_token_ids has {wrong[0]}; the model's tokens are 0 to {self.vocab_size - 1}")
        left = self.max_model_len - len(prompt_ids)
        if left < 1:
            raise RequestTooLongError(
                f"the prompt has {len(prompt_ids)} tokens; the model has {self.max_model_len} positions"
            )
        return left if params.max_tokens is None else min(left, params.max_tokens)


def _continued(
    name: str, options: EngineOptions, packed_cache: str | Path | None, note: Callable[[str], None]
) -> ModelRunner | None:
    """Return what runs the step that an earlier start kept, None if there is none, with a warning if it is no good."""
    kept = kept_step.find(name, options, packed_cache)
    if kept is None:
        return None
    note("going on with the step that an earlier start traced")
    try:
        return ModelRunner.of_kept(kept, options, note)
    except kept_step.KeptStepError as error:
        logger.warning("the kept step of %s is not used, and replaced: %s", name, error)
        return None


def _sample(logits: Tensor, states: Sequence[SamplingState]) -> Sequence[Sampled | None]:
    """Return the next token of each row; None where logits are not finite."""
    try:
        return sample(logits, states)
    except NotFiniteError as error:
        bad = set(error.rows)
        good = [i for i in range(len(states)) if i not in bad]
        found: Iterable[Sampled] = sample(logits[good], [states[i] for i in good]) if good else ()
        chosen = dict(zip(good, found, strict=True))
        return [chosen.get(i) for i in range(len(states))]
