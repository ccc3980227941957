"""Native kernels of ktcompile."""

from collections.abc import Callable, Sequence
import enum
from typing import Any


class DType(enum.Enum):
    f32 = 0

    f16 = 1

    bf16 = 2

class Layout(enum.Enum):
    f32 = 0

    f16 = 1

    bf16 = 2

    int8 = 3

    int8_dyn = 4

    int4 = 5

    fp8 = 6

    mxfp4 = 7

    int4_dyn = 8

class ScaleType(enum.Enum):
    none = 0

    f32 = 1

    f16 = 2

    bf16 = 3

    e8m0 = 4

class Format:
    def __init__(self, layout: Layout, group: int, scale: ScaleType, zero_points: bool) -> None: ...

    @property
    def scale(self) -> ScaleType: ...

class MaskType(enum.Enum):
    none = 0

    boolean = 1

    f32 = 2

    f16 = 3

    bf16 = 4

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

def sums_on_tiles(isa: str) -> bool:
    """
    Whether floats are summed in the order of AMX, which rounds otherwise than all other instruction sets.
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

LAYOUT_VERSION: int = 1

def numa_nodes(sys_root: str = '/sys') -> list[int]:
    """
    Ids of the NUMA nodes with memory and CPUs of this process; -1 where there is but one.
    """

class Experts:
    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, format: Format, activation: Activation, gated: bool, interleaved: bool, alpha: float, limit: float, nodes: Sequence[int]) -> None: ...

    def pack(self, expert: int, gate_up: int, gate_up_strides: tuple[int, int, int], down: int, down_strides: tuple[int, int, int], type: DType) -> None: ...

    def pack_quantized(self, expert: int, gate_up: tuple[int, tuple[int, int, int], int, int, tuple[int, int, int]], down: tuple[int, tuple[int, int, int], int, int, tuple[int, int, int]]) -> None:
        """
        Each is (codes, strides of (expert, n, k), scales, zero points or 0, strides of (expert, n, group)).
        """

    def pack_bias(self, gate_up: int, gate_up_strides: tuple[int, int], down: int, down_strides: tuple[int, int], type: DType) -> None: ...

    def unpack(self, expert: int, gate_up: int, gate_up_strides: tuple[int, int, int], down: int, down_strides: tuple[int, int, int], type: DType) -> None: ...

    @property
    def tokens(self) -> list[int]: ...

    @property
    def slices(self) -> list[int]: ...

    def copy(self, expert: int, source: Experts, source_expert: int) -> None:
        """Takes over an expert from a layer of the same shape and format."""

    @property
    def format(self) -> Format: ...

    @property
    def parts(self) -> list[int]:
        """
        Bytes of an expert as `read` writes them: of each slice gate_up, its bias, down, its bias.
        """

    def read(self, expert: int, to: int) -> None:
        """
        Writes an expert's bytes to an address, where there is room for all `parts`.
        """

    def write(self, expert: int, source: int) -> None:
        """
        Takes over an expert's weights from the bytes that `read` wrote; its bias stays.
        """

    @property
    def memory(self) -> list[tuple[int, int]]:
        """
        (address, bytes) of all experts: of each slice gate_up, its bias, down, its bias; (0, 0) for none.
        """

    def map(self, memory: Sequence[tuple[int, int]], owner: object) -> None:
        """
        Reads weights from memory as `memory` returned it, which `owner` holds, and never writes to it.
        """

    @property
    def mapped(self) -> bool:
        """Whether weights lie in memory of another and cannot be written to."""

    def fill(self, expert: int, byte: int) -> None:
        """Overwrites an expert's weights."""

    def release(self, expert: int) -> None:
        """Gives an expert's memory back until it is packed or copied to again."""

    @property
    def expert_nbytes(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

class Linear:
    def __init__(self, format: Format, out_features: int, in_features: int, heads: int = 1) -> None: ...

    def pack(self, weight: int, strides: tuple[int, int], type: DType, head: int = 0) -> None: ...

    def pack_quantized(self, weight: tuple[int, tuple[int, int, int], int, int, tuple[int, int, int]], head: int = 0) -> None: ...

    def pack_bias(self, bias: int, stride: int, type: DType) -> None: ...

    def unpack(self, weight: int, strides: tuple[int, int], type: DType, head: int = 0) -> None: ...

    @property
    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of the weight and of its bias; (0, 0) for none."""

    def map(self, memory: Sequence[tuple[int, int]], owner: object) -> None:
        """
        Reads the weight from memory as `memory` returned it, which `owner` holds, and never writes to it.
        """

    @property
    def format(self) -> Format: ...

    @property
    def nbytes(self) -> int: ...

def use_openmp(parallel: int, thread: int, threads: int, most_threads: int) -> None: ...

def use_openmp_here(allowed: bool) -> None: ...

class Context:
    def __init__(self, threads: int, sys_root: str = '/sys') -> None: ...

    @property
    def threads(self) -> int: ...

    def moe(self, arg0: Experts, arg1: str, arg2: int, arg3: int, arg4: int, arg5: DType, arg6: int, arg7: int, arg8: bool, arg9: int, arg10: DType, arg11: int, arg12: int, /) -> None: ...

    def linear(self, arg0: Linear, arg1: str, arg2: int, arg3: DType, arg4: tuple[int, int, int], arg5: tuple[int, int, int], /) -> None: ...

    def norm(self, isa: str, shape: tuple[int, int, int], type: DType, rows: tuple[int, int, int], out: tuple[int, int, int], weight: tuple[int, DType, float, float, bool], addition: tuple[int, int]) -> None:
        """
        Root-mean-square normalisation. shape: (groups, rows of each, elements of a row). rows, out: (address, stride of groups, of rows), in elements. weight: (address, type, offset, epsilon, round_first). addition: addresses of what is added first, lying as `rows`, and of where the sums go, lying as `out`, or zeros.
        """

    def rotary(self, isa: str, shape: tuple[int, int, int, int, int], type: DType, heads: tuple[int, int, int, int], out: tuple[int, int, int, int], cos: int, sin: int, angle_strides: tuple[int, int], norm: tuple[int, DType, float, float, bool]) -> None:
        """
        Rotary embedding. shape: (sequences, positions, heads, elements of a head, how many of them are rotated). heads, out: (address, strides of sequence, position and head). cos, sin: addresses, of the type of heads. angle_strides: of sequence and position. norm: as of `norm`, or address 0.
        """

    def attention(self, isa: str, heads: tuple[int, int, int], sizes: tuple[int, int], type: DType, kv_type: DType, query: tuple[int, int, int, int], key: tuple[int, int, int, int], value: tuple[int, int, int, int], out: tuple[int, int, int, int], counts: tuple[int, int, int, int, int], table: tuple[int, int, int], mask: tuple[tuple[int, int, int, int], MaskType], rule: tuple[bool, int, float, float, int], key_scales: tuple[tuple[int, int, int, int], int], value_scales: tuple[tuple[int, int, int, int], int]) -> None:
        """
        Softmax attention. heads: (sequences, query heads, heads of keys). sizes: of a key, of a value. query, key, value, out: (address, strides of sequence, head and position). counts: (queries and positions of each sequence, position of the first query or -1, addresses or 0 of int64 query starts and lengths). table: (address or 0, stride, block size). mask: (as query, kind). rule: (causal, window, scale, softcap, address of sinks). key_scales, value_scales: (as query, elements that share a scale, 0 where there are none); where there are, keys or values are int8, and kv_type says nothing.
        """

    def store_kv(self, isa: str, shape: tuple[int, int, int, int], type: DType, rows: tuple[int, int, int], slots: int, block_size: int, codes: tuple[int, int, int, int], scales: tuple[int, int, int, int]) -> None:
        """
        Quantises rows to int8. shape: (tokens, heads, elements of a row, elements that share a scale). rows: (address, stride of tokens, of heads). slots: address of int64, negative ones are left out. codes, scales: (address, strides of block, head and position).
        """

    def read_bandwidth(self, isa: str, bytes: int, repeats: int) -> float:
        """
        Bytes per second, the best of `repeats` reads of `bytes`, which are kept until a call with more.
        """

    def arithmetic(self, isa: str, int8: bool, seconds: float) -> float:
        """
        Operations per second of the products that the kernels use, of floats or of int8, in `seconds`.
        """

class Element(enum.Enum):
    f32 = 0

    f16 = 1

    bf16 = 2

    i64 = 3

    boolean = 4

    i32 = 5

    i8 = 6

class ElementOp(enum.Enum):
    copy = 0

    add = 1

    sub = 2

    mul = 3

    div = 4

    silu = 5

    sigmoid = 6

    gelu_tanh = 7

    gelu_erf = 8

    cos = 9

    sin = 10

class IntegerOp(enum.Enum):
    add = 0

    sub = 1

    mul = 2

    le = 3

    lt = 4

    ge = 5

    gt = 6

    conjunction = 7

class Opcode(enum.Enum):
    reshape = 0

    transpose = 1

    unsqueeze = 2

    squeeze = 3

    select = 4

    slice = 5

    expand = 6

    contiguous = 7

    linear = 8

    head_linear = 9

    moe = 10

    norm = 11

    add_norm = 12

    rotary = 13

    attention = 14

    cached_attention = 15

    elementwise = 16

    integers = 17

    add_number = 18

    arange = 19

    embedding = 20

    softmax = 21

    top_k = 22

    row_sum = 23

    concat = 24

    index_select = 25

    index_copy = 26

class Program:
    """Operations that run without Python, native/include/kt/program.h."""

    def __init__(self, tensors: Sequence[Element], whole: int, real: int) -> None: ...

    def add(self, op: Opcode, arrays: Sequence[int], outs: int, whole: Sequence[tuple[int, int]], real: Sequence[tuple[float, int]], packed: int) -> int:
        """
        Return the first of the numbers of the arrays that it gives. Numbers are (value, -1) or (0, which argument).
        """

    def finish(self, results: Sequence[int]) -> None: ...

    def set_linear(self, packed: int, weight: Linear, isa: str) -> None:
        """The weight must outlive calls that follow."""

    def set_experts(self, packed: int, experts: Experts, isa: str) -> None:
        """The experts must outlive calls that follow."""

    def run(self, context: Context, isa: str, arguments: tuple[Any, ...], allocate: Callable[[Element, Sequence[int]], int]) -> list[tuple[int, int, list[int], list[int]]]:
        """
        Arguments: tensors, whole and real numbers, and what the steps do not read. Return (where, offset, shape, strides) of each result; where: which of what `allocate(type, shape)` gave, or -1 - the number of an argument.
        """

class Watch:
    """
    Tensors as they were: the same ones, in the same memory, not written to.
    """

    def __init__(self) -> None: ...

    def add(self, position: int, tensor: object, storage: int) -> None:
        """
        Begin to watch an argument. storage: the address of its storage, which must be kept from having another tensor's.
        """

    def holds(self, arguments: tuple[Any, ...]) -> bool:
        """Return whether those of a call are as they were."""
