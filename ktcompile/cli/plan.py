"""`ktc plan`: what a model takes on a machine, and how fast it may run, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ktcompile.cli.sizes import size
from ktcompile.config import DEVICES
from ktcompile.quant import ALIASES, FORMATS, check_format, full_name

if TYPE_CHECKING:
    from ktcompile.plan.architecture import Architecture, RoutedExperts
    from ktcompile.plan.estimate import Estimate, Plan, Tier, Workload
    from ktcompile.plan.facts import ModelFacts
    from ktcompile.plan.hardware import Hardware

_EXAMPLES = """\
examples:
  ktc plan                                     # the small model of the package on this machine
  ktc plan ~/models/Qwen3-30B-A3B --weight-format int4
  ktc plan deepseek-ai/DeepSeek-V3 --hardware h100-xeon-amx --ram 1TB
  ktc plan openai/gpt-oss-120b --gpu-memory 24GB --ram 128GB --context 32768 --batch 4
  ktc plan config.json --hardware laptop --json > plan.json

Only the configuration and the headers of the weights are read; of a hub model, only these are fetched. Speeds are
predicted, not measured. The exit status is 0 if the model fits, 1 if it does not (what to do is printed), 2 if the
question cannot be answered.
"""

_HARDWARE_HELP = "this (measured in about a second; the default), or a preset: 4090-ddr5, h100-xeon-amx, laptop"
_FRACTION_HELP = "of each layer's experts on the GPU, 0 to 1 (default: the fastest that fits)"

# Where the machine has no GPU and a memory of one is named: its speeds are those of this preset.
_ASSUMED_GPU = "4090-ddr5"
# What `ktc generate` calls it.
_GPU = "cuda"
_WITHOUT_GPU = (
    "'ktc generate' of this version knows no GPU: the command has all experts on the CPU, and speeds with a device are "
    "those of the design; '--device stand-in' tries the placement without its speed"
)
_COMPARED = ("bf16", "int8", "fp8", "int4_g32", "int4_g128", "mxfp4")


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """How the model would do in another format. decode_tokens_per_second: of the batch; None: it does not fit."""

    weight_format: str
    expert_bytes: int
    fits: bool
    decode_tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """All that `ktc plan` finds.

    command: that runs the model; None: it does not fit, must be stored anew, or has no weights.
    """

    model: Architecture
    hardware: Hardware
    weight_format: str
    workload: Workload
    expert_bytes: int
    estimate: Estimate
    formats: tuple[FormatChoice, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    command: str | None

    @property
    def share(self) -> float:
        """The part of all experts that is on the device."""
        return device_share(self.model, self.estimate)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="tell whether a model fits and how fast it may run",
        description="Tell what a model takes on a machine and how fast it may run, without loading it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ", ".join(("auto", *ALIASES, *FORMATS))
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a folder, a config.json or a hub id (default: the embedded model)")
    add("--hardware", default="this", metavar="NAME", help=_HARDWARE_HELP)
    add("--gpu-memory", type=size, metavar="SIZE", help="instead of the hardware's, as 24GB; 0 is without a GPU")
    add("--ram", type=size, metavar="SIZE", help="instead of the hardware's")
    add("--disk", type=size, metavar="SIZE", help="room for checkpoints (default: not checked)")
    add(
        "--weight-format", default="auto", metavar="NAME", help=f"how experts are stored: {formats} (auto: as they are)"
    )
    add("--device-expert-fraction", type=float, metavar="F", help=_FRACTION_HELP)
    add("--context", type=int, default=4096, metavar="N", help="tokens of a sequence (default: %(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads that 'this' is measured with (default: physical cores)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the answer and return 1 if the model does not fit."""
    found = answer(args)
    if args.json:
        print(json.dumps(record(found), indent=2))
    else:
        from ktcompile.cli.plan_tables import print_answer

        print_answer(found)
    return 0 if found.estimate.fits else 1


def answer(args: argparse.Namespace) -> Answer:
    """Return what there is to tell. ValueError, FileNotFoundError: the question cannot be answered, and why."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    from ktcompile.models import tiny_model
    from ktcompile.models.facts import architecture
    from ktcompile.models.source import describe_source
    from ktcompile.plan.advice import warnings
    from ktcompile.plan.estimate import ASSUMPTIONS, Plan, Workload, estimate

    hf_logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    workload = Workload(args.context, args.batch)
    check_format(args.weight_format)
    source = describe_source(args.model or tiny_model.path())
    model = architecture(source)
    hardware, notes = _hardware(args)
    name = full_name(model.stored_format if args.weight_format == "auto" else args.weight_format)
    quantized = FORMATS[model.stored_format].codec is not None and name == model.stored_format
    facts = {f: model.facts(_packed(f)) for f in dict.fromkeys((name, *_COMPARED))}
    plan = Plan(model, facts[name], hardware, workload, quantized, args.device_expert_fraction, args.disk)
    result = estimate(plan)
    stored_anew = FORMATS[model.stored_format].codec is not None and not quantized
    if stored_anew:
        notes += (
            f"the checkpoint is quantised as {model.stored_format}; {name} needs one that is not, or is in {name}",
        )
    runs = result.fits and source.loadable and not stored_anew
    if result.device is not None and _GPU not in DEVICES:
        notes += (_WITHOUT_GPU,)
        alone = replace(plan, hardware=replace(hardware, device=None, link=None), fraction=None)
        runs = runs and estimate(alone).fits
    return Answer(
        model,
        hardware,
        name,
        workload,
        facts[name].expert_bytes,
        result,
        tuple(_choice(replace(plan, facts=facts[f]), f) for f in _COMPARED if f in facts),
        warnings(plan, result, {f: facts[f] for f in _COMPARED}),
        (*model.notes, *notes),
        ASSUMPTIONS,
        _command(args, device_share(model, result)) if runs else None,
    )


def record(found: Answer) -> dict[str, object]:
    """Return the answer as JSON has it."""
    model, result = found.model, found.estimate
    tiers: Mapping[str, Tier | None] = {"device": result.device, "ram": result.ram, "disk": result.disk}
    memory = {
        name: None if t is None else {**asdict(t), "used": t.used, "free": t.free, "fits": t.fits}
        for name, t in tiers.items()
    }
    return {
        "fits": result.fits,
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "parameters": model.parameters,
            "active_parameters": model.active_parameters,
            "layers": model.num_layers,
            "moe_layers": [asdict(e) for e in model.experts],
            "cache": [asdict(c) for c in model.cache],
            "dense_bytes": model.dense_bytes,
            "dense_flops_per_token": model.dense_flops_per_token,
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "stored_format": model.stored_format,
            "stored_bytes": model.stored_bytes,
        },
        "hardware": asdict(found.hardware),
        "weight_format": found.weight_format,
        "context": found.workload.context,
        "batch": found.workload.batch,
        "expert_bytes": found.expert_bytes,
        "memory": memory,
        "load_peak_bytes": result.load_peak,
        "device_expert_fraction": found.share,
        "device_experts_per_layer": list(result.resident),
        "kv_capacity_tokens": result.cache_tokens,
        "simulated": True,
        "predictions": [{**asdict(p), "tokens_per_second": p.tokens_per_second} for p in result.predictions],
        "formats": [asdict(f) for f in found.formats],
        "warnings": list(found.warnings),
        "notes": list(found.notes),
        "assumptions": list(found.assumptions),
        "command": found.command,
    }


def device_share(model: Architecture, found: Estimate) -> float:
    """Return the part of all experts that is on the device."""
    experts = sum(e.num_experts for e in model.experts)
    return sum(found.resident) / experts if experts else 0.0


def _hardware(args: argparse.Namespace) -> tuple[Hardware, tuple[str, ...]]:
    """Return the machine with what the arguments say of it, and notes on what was assumed."""
    from ktcompile import get_num_threads
    from ktcompile.bench.this_machine import this_machine
    from ktcompile.plan.hardware import preset

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads is {args.threads}; it must be at least 1")
    hardware = this_machine(args.threads or get_num_threads()) if args.hardware == "this" else _preset(args.hardware)
    notes: tuple[str, ...] = ()
    if args.ram is not None:
        if args.ram == 0:
            raise ValueError("--ram is 0; name the memory of the CPU, as 64GB")
        hardware = replace(hardware, cpu=replace(hardware.cpu, memory_bytes=args.ram))
    if args.gpu_memory == 0:
        return replace(hardware, device=None, link=None), notes
    if args.gpu_memory is not None:
        if hardware.device is None:
            other = preset(_ASSUMED_GPU)
            notes = (f"{hardware.name} has no GPU: speeds of the GPU and its link are those of {_ASSUMED_GPU}",)
            hardware = replace(hardware, device=other.device, link=other.link)
        assert hardware.device is not None
        hardware = replace(hardware, device=replace(hardware.device, memory_bytes=args.gpu_memory))
    return hardware, notes


def _preset(name: str) -> Hardware:
    from ktcompile.plan.hardware import PRESETS, preset

    if name not in PRESETS:
        raise ValueError(f"--hardware is {name!r}; it must be this or one of {', '.join(PRESETS)}")
    return preset(name)


def _packed(name: str) -> Callable[[RoutedExperts], int]:
    """Return what computes the bytes of one packed expert in a format."""
    from ktcompile.quant.packed_size import ExpertShape, expert_bytes

    def compute(experts: RoutedExperts) -> int:
        shape = ExpertShape(experts.hidden_size, experts.intermediate_size, experts.gated, experts.biased)
        return expert_bytes(FORMATS[name], shape)

    return compute


def _choice(plan: Plan, name: str) -> FormatChoice:
    from ktcompile.plan.estimate import estimate

    result = estimate(plan)
    decode = [p for p in result.predictions if p.kind == "decode" and p.tokens == plan.workload.batch]
    facts: ModelFacts = plan.facts
    return FormatChoice(name, facts.expert_bytes, result.fits, decode[0].tokens_per_second if decode else None)


def _command(args: argparse.Namespace, share: float) -> str:
    words = ["ktc", "generate"]
    words += ["--model", args.model] if args.model else []
    words += ["--weight-format", args.weight_format] if args.weight_format != "auto" else []
    if share and _GPU in DEVICES:
        # Rounded down, so that it fits.
        words += ["--device", _GPU, "--device-expert-fraction", f"{math.floor(100 * share) / 100:.2f}"]
    return shlex.join([*words, "Once upon a time"])
