"""Native kernels of ktcompile."""

from collections.abc import Sequence
import enum


class DType(enum.Enum):
    f32 = 0

    f16 = 1

    bf16 = 2

class Activation(enum.Enum):
    silu = 0

    gelu_tanh = 1

    gelu_erf = 2

    relu = 3

    relu2 = 4

    swigluoai = 5

def isas() -> list[str]:
    """Names of the instruction sets of this build, best first."""

def isas_for(features: Sequence[str]) -> list[str]:
    """
    Names of the instruction sets that run on a CPU with these features, best first.
    """

def select_isa(features: Sequence[str]) -> str:
    """
    Name of the instruction set to use; among those that give the same bits the faster, measured.
    """

def cpu_features() -> list[str]:
    """Features that this CPU reports."""

def executes(features: Sequence[str]) -> bool:
    """
    Whether this CPU executes features that it may not report; tried in a child process.
    """

def map_nan(bytes: int, type: DType) -> int:
    """
    Address of memory that reads as NaN and takes no room until it is written.
    """

def unmap_nan(address: int, bytes: int) -> None: ...

class Experts:
    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, format: DType, activation: Activation, gated: bool, interleaved: bool, alpha: float, limit: float) -> None: ...

    def pack(self, expert: int, gate_up: int, gate_up_strides: tuple[int, int, int], down: int, down_strides: tuple[int, int, int], type: DType) -> None: ...

    def pack_bias(self, gate_up: int, gate_up_strides: tuple[int, int], down: int, down_strides: tuple[int, int], type: DType) -> None: ...

    def unpack(self, expert: int, gate_up: int, gate_up_strides: tuple[int, int, int], down: int, down_strides: tuple[int, int, int], type: DType) -> None: ...

    @property
    def nbytes(self) -> int: ...

class Context:
    def __init__(self, threads: int) -> None: ...

    @property
    def threads(self) -> int: ...

    def moe(self, arg0: Experts, arg1: str, arg2: int, arg3: int, arg4: int, arg5: DType, arg6: int, arg7: int, arg8: bool, arg9: int, arg10: DType, arg11: int, arg12: int, /) -> None: ...

    def read_bandwidth(self, isa: str, bytes: int, repeats: int) -> float: ...

    def arithmetic(self, isa: str, repeats: int) -> float: ...
