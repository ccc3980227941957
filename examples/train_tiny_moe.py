"""Trains the small Mixture-of-Experts model of the package on the sources of Python's standard library.

The result depends on the arguments, the Python version and the library versions alone: files are read in
sorted order, the held-out files are chosen by a hash of their path, and the order of the training windows is
a function of the seed and the step. Floating-point sums may differ in the last bits between processors.

Examples:
    python examples/train_tiny_moe.py --out /tmp/tiny --steps 20   # a smoke test, two minutes
    python examples/train_tiny_moe.py --out ktcompile/models/tiny  # all 6000 steps, 45 minutes on two idle cores
    python examples/train_tiny_moe.py --out /tmp/tiny --resume     # go on after an interruption

Shapes: B windows, S tokens of a window, N tokens of a corpus, T tokens of a call, E experts,
K experts of a token.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
EVAL_BYTES = 64 * 1024
DEFAULT_STEPS = 6000  # with the default batch, nearly five epochs over the library of Python 3.11
SAMPLE_PROMPT = "def fibonacci(n):"

# Left out: tests, whatever is installed beside the library, tables that are data rather than code, and files
# that the build of the interpreter generates and that therefore differ from machine to machine.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__phello__"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "html/entities.py", "__hello__")

# A line break keeps the indentation that follows it, so that both can become one token; words keep their
# underscores and one leading space or dot; digits come in groups of at most three.
SPLIT_PATTERN = r"\n+ *(?= \S)|\n+|[ .]?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t]+(?= \S)|\s+"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that decides the sequence of parameter updates."""

    steps: int
    seed: int
    batch_size: int
    seq_len: int
    peak_lr: float
    warmup_steps: int
    decay_steps: int
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0

    def learning_rate(self, step: int) -> float:
        """Returns the rate of update `step` (from 0): a linear warm-up, a plateau, a linear decay to zero.

        The plateau makes the length of a run a late decision: resuming with another `--steps` moves only it.
        """
        warmup = (step + 1) / self.warmup_steps
        decay = (self.steps - step) / self.decay_steps
        return self.peak_lr * min(1.0, warmup, decay)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of the standard library, training and held-out, as `(path, text)` pairs."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run keeps its checkpoint, the seconds between two of them, the steps between two reports."""

    checkpoint: Path
    checkpoint_seconds: float
    log_every: int
    eval_every: int


def main() -> None:
    """Trains, reports and writes the model."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    schedule = Schedule(
        steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        peak_lr=args.lr,
        warmup_steps=args.warmup,
        decay_steps=args.decay if args.decay is not None else max(1, args.steps * 3 // 10),
    )
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    run = Run(args.checkpoints / "last.pt", args.checkpoint_seconds, args.log_every, args.eval_every)

    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(corpus)
    train_N = encode(tokenizer, corpus.train)
    held_out_N = encode(tokenizer, corpus.held_out)
    print(
        f"{len(corpus.train)} files, {train_N.numel():,} tokens, "
        f"{train_N.numel() / (args.batch_size * args.seq_len):.0f} steps an epoch; "
        f"held out: {len(corpus.held_out)} files, {held_out_N.numel():,} tokens",
        flush=True,
    )

    model = build_model()
    result = train(model, train_N, held_out_N, schedule, run, resume=args.resume)

    usage = expert_usage(model, held_out_N, schedule.seq_len)
    for layer, shares in enumerate(usage):
        print(f"layer {layer} expert shares in %: " + " ".join(f"{100 * share:4.1f}" for share in shares))
    eval_text = evaluation_text(corpus)
    facts = {
        "data": "the sources of the Python standard library (Python Software Foundation License 2.0)",
        "left_out_folders": sorted(EXCLUDED_FOLDERS),
        "left_out_prefixes": list(EXCLUDED_PREFIXES),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "train_files": len(corpus.train),
        "train_tokens": train_N.numel(),
        "held_out_files": [path for path, _ in corpus.held_out],
        "held_out_tokens": held_out_N.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": schedule.seed,
        "threads": args.threads,
        "steps": schedule.steps,
        "batch_size": schedule.batch_size,
        "seq_len": schedule.seq_len,
        "tokens_seen": schedule.steps * schedule.batch_size * schedule.seq_len,
        "epochs": round(schedule.steps * schedule.batch_size * schedule.seq_len / train_N.numel(), 2),
        "peak_learning_rate": schedule.peak_lr,
        "warmup_steps": schedule.warmup_steps,
        "decay_steps": schedule.decay_steps,
        **result,
        "expert_shares": [[round(share, 4) for share in shares] for shares in usage],
    }
    export(args.out, model, tokenizer, eval_text, facts)
    print(f"sample:\n{sample(args.out, SAMPLE_PROMPT)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="parameter updates (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights and order of the data")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch uses (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in an update (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps (default %(default)s)")
    parser.add_argument("--decay", type=int, help="steps of the final decay (default: three tenths of all)")
    parser.add_argument("--log-every", type=int, default=25, help="steps between progress lines")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between held-out losses")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "train_tiny_moe")
    parser.add_argument("--checkpoint-seconds", type=float, default=240.0, help="time between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    return parser.parse_args()


def read_corpus(root: Path) -> Corpus:
    """Returns the files below `root` in sorted order; a hash of the path holds out about one in fifty."""
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if EXCLUDED_FOLDERS.intersection(relative.parts) or name.startswith(EXCLUDED_PREFIXES):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").strip("\n") + "\n"
        if text == "\n":
            continue
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 50
        (held_out if bucket == 0 else train).append((name, text))
    return Corpus(train, held_out)


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of `VOCAB_SIZE` tokens, trained on the training files.

    Raises `ValueError` if it does not give a held-out file back byte for byte.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in corpus.train), trainer)
    for name, text in corpus.held_out:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise ValueError(f"the tokenizer does not round-trip {name}")
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[tuple[str, str]]) -> torch.Tensor:
    """Returns the tokens of `documents` as int64 [N], each document preceded by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = itertools.chain.from_iterable([end, *tokenizer.encode(text).ids] for _, text in documents)
    return torch.tensor(list(ids), dtype=torch.int64)


def build_model() -> Qwen3MoeForCausalLM:
    """Returns the untrained model, about 8 M parameters in float32; the caller seeds torch."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,  # type: ignore[call-arg]
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config)


def windows(tokens_N: torch.Tensor, schedule: Schedule, first_step: int) -> Iterator[torch.Tensor]:
    """Yields the int64 [B, S] batch of each step from `first_step` on; every epoch has its own order."""
    span = schedule.seq_len
    per_epoch = (tokens_N.numel() - span) // (span * schedule.batch_size)
    if per_epoch < 1:
        raise ValueError(f"{tokens_N.numel()} tokens do not fill one batch of {schedule.batch_size} x {span}")
    for epoch in itertools.count(first_step // per_epoch):
        generator = torch.Generator().manual_seed(1_000_003 * schedule.seed + epoch)
        offset = int(torch.randint(span, (1,), generator=generator))
        count = (tokens_N.numel() - offset) // span
        order = torch.randperm(count, generator=generator)[: per_epoch * schedule.batch_size]
        chunks = tokens_N[offset : offset + count * span].view(count, span)
        begin = first_step % per_epoch if epoch == first_step // per_epoch else 0
        for index in range(begin, per_epoch):
            yield chunks[order[index * schedule.batch_size : (index + 1) * schedule.batch_size]]


def train(
    model: Qwen3MoeForCausalLM,
    train_N: torch.Tensor,
    held_out_N: torch.Tensor,
    schedule: Schedule,
    run: Run,
    *,
    resume: bool,
) -> dict[str, float]:
    """Trains `model` in place and returns its train loss, held-out loss, perplexity and the seconds taken."""
    optimizer = build_optimizer(model, schedule)
    step, earlier_seconds, smooth = 0, 0.0, math.nan
    if resume and run.checkpoint.exists():
        state = torch.load(run.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, earlier_seconds, smooth = state["step"], state["seconds"], state["smooth"]
        print(f"resumed at step {step}", flush=True)

    started = saved = reported = time.monotonic()
    reported_step = step
    batches = windows(train_N, schedule, step)
    forward = torch.compile(model)
    model.train(True)
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        loss, aux = update(model, forward, optimizer, next(batches), schedule.grad_clip)
        step += 1
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        now = time.monotonic()
        if step % run.log_every == 0:
            seconds = (now - reported) / (step - reported_step)
            print(
                f"step {step:5d}/{schedule.steps} loss {smooth:.4f} balance {aux:.3f} "
                f"{schedule.batch_size * schedule.seq_len / seconds:5.0f} tokens/s, "
                f"{(schedule.steps - step) * seconds / 60:.1f} min left",
                flush=True,
            )
            reported, reported_step = now, step
        if step % run.eval_every == 0 and step < schedule.steps:
            print(f"held-out loss {held_out_loss(model, held_out_N, 512):.4f}", flush=True)
        if now - saved > run.checkpoint_seconds or step == schedule.steps:
            saved, elapsed = now, earlier_seconds + now - started
            save_checkpoint(run.checkpoint, model, optimizer, step=step, seconds=elapsed, smooth=smooth)
    final = held_out_loss(model, held_out_N, 512)
    print(f"held-out loss {final:.4f}, perplexity {math.exp(final):.3f}", flush=True)
    return {
        "train_loss": round(smooth, 4),
        "held_out_loss": round(final, 4),
        "held_out_perplexity": round(math.exp(final), 4),
        "wall_seconds": round(earlier_seconds + time.monotonic() - started),
    }


def build_optimizer(model: Qwen3MoeForCausalLM, schedule: Schedule) -> torch.optim.AdamW:
    """Returns AdamW over all parameters of `model`; norm weights do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=schedule.peak_lr,
        betas=schedule.betas,
        fused=True,
    )


def update(
    model: Qwen3MoeForCausalLM,
    forward: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    ids_BS: torch.Tensor,
    grad_clip: float,
) -> tuple[float, float]:
    """Makes one update with `forward`, the compiled `model`; returns cross-entropy and balance loss."""
    output = forward(input_ids=ids_BS, labels=ids_BS, output_router_logits=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    aux = float(output.aux_loss.detach())
    return float(output.loss.detach()) - model.config.router_aux_loss_coef * aux, aux


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, tokens_N: torch.Tensor, window: int) -> float:
    """Returns the mean cross-entropy in nats per predicted token, over consecutive windows."""
    model.train(False)
    total, count = 0.0, 0
    for begin in range(0, tokens_N.numel() - 1, window):
        ids_BS = tokens_N[begin : begin + window].unsqueeze(0)
        predicted = ids_BS.numel() - 1
        if predicted:
            total += float(model(input_ids=ids_BS, labels=ids_BS).loss) * predicted
            count += predicted
    model.train(True)
    return total / count


@torch.no_grad()
def expert_usage(model: Qwen3MoeForCausalLM, tokens_N: torch.Tensor, window: int) -> list[list[float]]:
    """Returns, for every layer, the share of routed token slots of each expert; a layer sums to one."""
    model.train(False)
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for begin in range(0, tokens_N.numel(), window):
        ids_BS = tokens_N[begin : begin + window].unsqueeze(0)
        router_logits = model(input_ids=ids_BS, output_router_logits=True).router_logits
        for layer, logits_TE in enumerate(router_logits):
            ids_TK = logits_TE.topk(config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(ids_TK.flatten(), minlength=config.num_experts)
    shares: list[list[float]] = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    return shares


def evaluation_text(corpus: Corpus) -> str:
    """Returns about `EVAL_BYTES` of held-out text: short files whole, the first lines of the others."""
    parts: list[str] = []
    room = EVAL_BYTES
    for index, (_, text) in enumerate(sorted(corpus.held_out, key=lambda document: len(document[1]))):
        share = room // (len(corpus.held_out) - index)
        kept = text.encode()[:share].decode("utf-8", errors="ignore")
        parts.append(kept[: kept.rfind("\n") + 1])
        room -= len(parts[-1].encode())
    return "".join(parts)


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **progress: float) -> None:
    """Replaces the checkpoint at `path` in one step; an interruption leaves the previous one intact."""
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress}, partial)
    partial.replace(path)


def export(out: Path, model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, eval_text: str, facts: dict[str, Any]) -> None:
    """Writes the bfloat16 model, its tokenizer, `eval.txt` and `training.json` to `out`, each whole."""
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        model.bfloat16()
        model.config.use_cache = True
        model.config.output_router_logits = False
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
        model.save_pretrained(staging)
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=model.config.max_position_embeddings,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(staging)
        (staging / "eval.txt").write_text(eval_text, encoding="utf-8", newline="\n")
        (staging / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in sorted(staging.iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)
    finally:
        shutil.rmtree(staging)


def sample(folder: Path, prompt: str) -> str:
    """Returns the greedy continuation of `prompt` by the model saved in `folder`, the prompt included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(END_OF_TEXT + prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
