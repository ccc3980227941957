"""Who runs a whole model: what each is, whether it is installed, and which of them are in memory at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from ktcompile.bench import roofline
from ktcompile.machine import machine
from ktcompile.plan.architecture import Architecture
from ktcompile.quant import FORMATS, resolve_format

# Beside its weights: a process with its libraries, and what allocators keep of a long prompt's activations.
PROCESS_BYTES = 1 << 30
# For vLLM's blocks of keys and values.
VLLM_CACHE_GIB = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to run a model.

    driver: a module of `drivers`. package: to be imported. formats: the variant is a weight format of ktcompile for
    the experts; else it is one of `variants`, of which the first is meant where none is named. dense: behind a + may be
    the format of linear layers, and behind another that of the head.
    """

    driver: str
    package: str
    what: str
    formats: bool = False
    dense: bool = False
    variants: tuple[str, ...] = ()


KINDS = {
    "kt": Kind("transformers_driver", "ktcompile", 'torch.compile(model, backend="kt")', formats=True, dense=True),
    "kt-eager": Kind("transformers_driver", "ktcompile", "ktcompile.load(model), without a compiler", formats=True),
    "kt-engine": Kind("kt_engine_driver", "ktcompile", "the engine that serves", formats=True, dense=True),
    "transformers": Kind(
        "transformers_driver", "transformers", "as it comes", variants=("grouped_mm", "batched_mm", "eager")
    ),
    "inductor": Kind("transformers_driver", "transformers", "torch.compile(model)"),
    "zentorch": Kind("transformers_driver", "zentorch", 'torch.compile(model, backend="zentorch")'),
    "vllm": Kind("vllm_driver", "vllm", "its engine on the CPU"),
    "llama.cpp": Kind("llama_driver", "llama_cpp", "on a GGUF file of the model", variants=("bf16", "q8_0", "q4_k_m")),
}
DEFAULT = ("kt", "transformers")
ALL = (
    *("kt", "kt:int8", "kt:int4", "kt:int4_dyn+int4_dyn", "kt-eager", "kt-engine"),
    *("transformers", "inductor", "zentorch", "vllm"),
    *("llama.cpp:bf16", "llama.cpp:q8_0", "llama.cpp:q4_k_m"),
)


@dataclass(frozen=True, slots=True)
class ModelContender:
    """A way to run the model.

    name: kind:variant, or the kind. python: the program that has it. arithmetic: the ceiling that bounds it.
    expert_bytes, dense_bytes: of a weight of the routed experts, and of all others that a token's products read.
    """

    name: str
    kind: str
    variant: str
    python: str
    arithmetic: str
    expert_bytes: float
    dense_bytes: float

    @property
    def ours(self) -> bool:
        return KINDS[self.kind].formats

    def weights(self, model: Architecture) -> int:
        """Return the bytes of its weights."""
        dense = model.dense_bytes / model.dtype_bytes
        return round(model.expert_parameters * self.expert_bytes + dense * self.dense_bytes)


def choose(
    names: Sequence[str], pythons: Mapping[str, str], model: Architecture, threads: int
) -> tuple[tuple[ModelContender, ...], dict[str, str]]:
    """Return the contenders that `names` asks for ("all", or names), and why others are left out.

    pythons: by kind, the program that a peer is installed in, if that is another. ValueError: a name is unknown, one
    that is asked for by name is not installed, or a program is none.
    """
    for kind in pythons:
        if kind not in KINDS:
            raise ValueError(f"--peer-python names {kind!r}; there are {', '.join(KINDS)}")
    everyone = list(names) == ["all"]
    chosen, absent = [], {}
    for name in dict.fromkeys(ALL if everyone else names):
        contender = _contender(name, pythons, model, threads)
        if is_installed(contender.python, KINDS[contender.kind].package):
            chosen.append(contender)
        elif everyone:
            absent[name] = f"not installed in {contender.python}"
        else:
            raise ValueError(f"contender {name!r} is not installed in {contender.python}; --peer-python names another")
    return tuple(chosen), absent


def groups(
    contenders: Sequence[ModelContender], model: Architecture, free: int
) -> tuple[tuple[tuple[ModelContender, ...], ...], dict[str, str]]:
    """Return those that are in memory together, each time with the first of all, and why others do not fit.

    What is compared with the first was then measured in turns with it. free: bytes that may be used.
    """
    needed = {c.name: c.weights(model) + PROCESS_BYTES + _cache_bytes(c) for c in contenders}
    first, *others = contenders
    made: list[list[ModelContender]] = [[first]]
    skipped = {}
    for contender in others:
        beside = sum(needed[c.name] for c in made[-1])
        if beside + needed[contender.name] > free and len(made[-1]) > 1:
            made.append([first])
            beside = needed[first.name]
        if beside + needed[contender.name] > free:
            gib = [f"{size / 2**30:.1f}" for size in (needed[contender.name], beside, free)]
            skipped[contender.name] = f"it needs about {gib[0]} GiB beside {gib[1]} of others; {gib[2]} may be used"
            continue
        made[-1].append(contender)
    kept = [group for group in made if len(group) > 1] or made[:1]
    return tuple(tuple(group) for group in kept), skipped


def _contender(name: str, pythons: Mapping[str, str], model: Architecture, threads: int) -> ModelContender:
    kind, _, variant = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"contender {name!r} is unknown; there are all, {', '.join(_choices())}")
    known = KINDS[kind]
    if variant and not known.formats and variant not in known.variants:
        choices = f"{', '.join(known.variants)}" if known.variants else "no variants"
        raise ValueError(f"contender {name!r} is unknown; of {kind} there are {choices}")
    if known.variants:
        variant = variant or known.variants[0]
        name = name if name == kind and kind != "llama.cpp" else f"{kind}:{variant}"
    stored = FORMATS[model.stored_format]
    experts, *others = variant.split("+") if known.formats else [""]
    if others and not known.dense:
        raise ValueError(f"contender {name!r} has a format of linear layers, which need a compiler: kt:{variant}")
    if len(others) > 2:
        raise ValueError(f"contender {name!r} has {len(others) + 1} formats; they are of experts, linear layers, head")
    weights = resolve_format(experts, torch.bfloat16) if experts else stored
    rest = [resolve_format(other, torch.bfloat16) for other in others]
    rest_bytes = [f.bytes_per_weight for f in rest] or [float(model.dtype_bytes)]
    head = model.hidden_size * model.vocab_size / (model.dense_read_bytes / model.dtype_bytes)
    result = ModelContender(
        name=name,
        kind=kind,
        variant="+".join(f.name for f in (weights, *rest)) if experts else variant,
        python=pythons.get(kind, sys.executable),
        arithmetic=_arithmetic(known, weights.name, variant, threads),
        expert_bytes=weights.bytes_per_weight,
        dense_bytes=rest_bytes[0] * (1 - head) + rest_bytes[-1] * head,
    )
    if kind == "llama.cpp":  # until its file is there
        bits = {"bf16": 16, "q8_0": 8.5, "q4_k_m": 4.9}[variant]
        result = replace(result, expert_bytes=bits / 8, dense_bytes=bits / 8)
    return result


def _choices() -> Iterable[str]:
    for name, kind in KINDS.items():
        yield name
        yield from (
            [f"{name}:FORMAT{'[+FORMAT[+FORMAT]]' if kind.dense else ''}"]
            if kind.formats
            else (f"{name}:{variant}" for variant in kind.variants)
        )


def _arithmetic(kind: Kind, weight_format: str, variant: str, threads: int) -> str:
    if kind.formats:
        return roofline.arithmetic_of(weight_format, machine().isa)
    return _fastest("int8" if variant in ("q8_0", "q4_k_m") else "float", threads)


@cache
def _fastest(kind: str, threads: int) -> str:
    return roofline.fastest_arithmetic(kind, threads)


@cache
def is_installed(python: str, package: str) -> bool:
    """Return whether a Python has a package. ValueError: it is no Python."""
    code = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 3)"
    try:
        status = subprocess.run([python, "-c", code, package], capture_output=True, check=False).returncode
    except OSError as error:
        raise ValueError(f"--peer-python: {python} cannot be run: {error.strerror}") from error
    if status not in (0, 3):
        raise ValueError(f"--peer-python: {python} is no Python: it returned {status}")
    return status == 0


def _cache_bytes(contender: ModelContender) -> int:
    return VLLM_CACHE_GIB << 30 if contender.kind == "vllm" else 0
