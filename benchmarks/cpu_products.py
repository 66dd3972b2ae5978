"""One product with a 4-bit weight on the processor, by every way that torch, onnxruntime and we have: M rows of x by [N, K].

    python -m benchmarks.cpu_products [--threads 1] [--shapes 576x576 49152x576] [--rows 1 4 16 128]

Groups of 64 with zero points, where a way has them; weights in rotation, 64 MB of them, so that the cache does not answer. A cell is
microseconds of processor time a call, the least of the rounds, in which the ways are timed in turn; and the error relative to the
largest output, against float64.

ours            float32 (in place, or by parts), and with int8 activations
linear          torch's own in float32 and in bf16, from dense weights
int4pack        `_weight_int4pack_mm_for_cpu`, bf16 activations, groups of 64
int8pack        `_weight_int8pack_mm`, bf16 activations, 8 bits, one scale a row
dyn_quant       `_dyn_quant_matmul_4bit`, int8 activations, groups of 64; it takes no zero points, and its error says so
multiply-sum    `(x * (codes - zero) * scale).sum(-1)` by Inductor, one row only
onnxruntime     MatMulNBits in a session of one product, inputs and outputs bound, float32 and int8 activations
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.backends.inductor import packed
from lwcompile.backends.inductor.ways import example
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.manager import relative_error

SPREAD, GROUP = 64 << 20, 64

Run = Callable[[Tensor], Tensor]
Make = Callable[[QuantizedTensor], Run]


def ours(**how: object) -> Make:
    def make(weight: QuantizedTensor) -> Run:
        panels = packed.Panels.of(weight)
        return lambda x: panels.multiply(x, None, **how)  # type: ignore[arg-type]

    return make


def linear(dtype: torch.dtype) -> Make:
    def make(weight: QuantizedTensor) -> Run:
        dense = weight.dequantize().to(dtype)
        return lambda x: F.linear(x.to(dtype), dense).float()

    return make


def int4pack(weight: QuantizedTensor) -> Run:
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    scale, zero = weight.scale.float(), weight.zero
    assert zero is not None
    grid = torch.stack([scale, scale * (8 - zero.float())], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), codes, GROUP, grid).float()


def int8pack(weight: QuantizedTensor) -> Run:
    dense = weight.dequantize()
    scale = dense.abs().amax(1) / 127
    codes, scales = (dense / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes, scales).float()


def dyn_quant(weight: QuantizedTensor) -> Run:
    rows, columns = weight.shape
    codes = (weight.codes[:, 1::2] << 4) | weight.codes[:, ::2]
    scale = weight.scale.float().contiguous()
    stored = torch.ops.aten._dyn_quant_pack_4bit_weight(codes.contiguous(), scale, None, GROUP, columns, rows)
    return lambda x: torch.ops.aten._dyn_quant_matmul_4bit(x, stored, GROUP, columns, rows)


def multiply_sum(weight: QuantizedTensor) -> Run:
    low, high = weight.codes.view(len(weight.codes), -1, 2, GROUP // 2).unbind(2)
    codes, scale = low | (high << 4), weight.scale.float()
    assert weight.zero is not None
    zero = weight.zero.float()

    @torch.compile(dynamic=False)
    def compiled(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        a, b = x.view(1, -1, 2, GROUP // 2).unbind(2)
        z = zero[..., None]
        return ((((codes & 15).float() - z) * a + ((codes >> 4).float() - z) * b) * scale[..., None]).sum((-1, -2))[None]

    return lambda x: compiled(x, codes, scale, zero)


def onnxruntime(level: int, rows: int) -> Make:
    def make(weight: QuantizedTensor) -> Run:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        n, k = weight.shape
        codes = ((weight.codes[:, 1::2] << 4) | weight.codes[:, ::2]).view(n, k // GROUP, GROUP // 2)
        assert weight.zero is not None
        zero = F.pad(weight.zero, (0, weight.zero.shape[1] % 2))
        stored = {"b": codes, "s": weight.scale.float(), "z": (zero[:, 1::2] << 4) | zero[:, ::2]}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "b", "s", "z"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=GROUP,
            accuracy_level=level,
        )
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, size]) for name, size in (("x", k), ("y", n))]
        initial = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in stored.items()]
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], initial)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "product.onnx"
            onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        binding, out = session.io_binding(), torch.empty(rows, n)
        binding.bind_output("y", "cpu", 0, "float32", [rows, n], out.data_ptr())

        def run(x: Tensor) -> Tensor:
            binding.bind_input("x", "cpu", 0, "float32", [rows, k], x.data_ptr())
            session.run_with_iobinding(binding)
            return out

        return run

    return make


def ways(rows: int) -> dict[str, Make]:
    found: dict[str, Make] = {
        "ours, in place": ours(few=1 << 30),
        "ours, by parts": ours(few=0),
        "ours, int8": ours(int8=True),
        "linear, float32": linear(torch.float32),
        "linear, bf16": linear(torch.bfloat16),
        "int4pack, bf16": int4pack,
        "int8pack, bf16": int8pack,
        "dyn_quant, int8": dyn_quant,
        "onnxruntime, float32": onnxruntime(0, rows),
        "onnxruntime, int8": onnxruntime(4, rows),
    }
    return found | ({"multiply-sum": multiply_sum} if rows == 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "192x576", "1536x576", "576x1536", "49152x576", "4096x4096"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if reason := packed.unavailable():
        raise SystemExit(reason)
    names = list(ways(1))
    print(f"| N, K | M | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for shape in options.shapes:
        n, k = map(int, shape.split("x"))
        for rows in options.rows:
            found = measured(n, k, rows, options.rounds)
            print(f"| {n}, {k} | {rows} | {' | '.join(found.get(name, '') for name in names)} |", flush=True)


def measured(n: int, k: int, rows: int, rounds: int) -> dict[str, str]:
    """Microseconds a call and the error, of each way that runs."""
    weight = example(NumericFormat(4, GROUP), (n, k))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(x.double(), weight.dequantize().double())
    found: dict[str, str] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, make in ways(rows).items():
        try:
            copies = [make(weight) for _ in range(1 if name == "multiply-sum" else max(1, min(12, SPREAD // (n * k // 2))))]
            error = relative_error(wanted, copies[0](x))
        except Exception as reason:
            found[name] = f"refused ({type(reason).__name__})"
            continue
        turn = cycle(copies)
        calls[name], found[name] = (lambda turn=turn: next(turn)(x)), f"{error:.0e}"
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], _processor_seconds(call))
    return {name: f"{1e6 * least[name]:.0f} ({text})" if name in least else text for name, text in found.items()}


def _processor_seconds(call: Callable[[], object]) -> float:
    """Of one call: as many as take 20 ms by the clock."""
    call()
    count, started, until = 0, time.process_time(), time.perf_counter() + 0.02
    while count < 2 or time.perf_counter() < until:
        call()
        count += 1
    return (time.process_time() - started) / count


if __name__ == "__main__":
    main()
