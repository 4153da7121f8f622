"""Peak memory of `splaser scan` on a checkpoint ten times as large as it may keep resident, as a table and JSON.

    python tests/benchmarks/scan_memory.py [--small] [--dtype float32] [--json FILE]

Allowed above an import of the model's class, which the scan makes empty to learn its names: four times the largest
matrix in float32, and 200 MB. transformers' module of that class imports more than the class needs (torch's compiler,
accelerate, scipy), which the scan can't avoid; what that takes above torch itself stands beside it. The checkpoint
(8 shards, Llama's names and proportions) is written to a temporary folder and removed; `--experts` makes it one of many
small matrices instead: 5,000 experts of their own and 5,000 in fused parameters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

Shape = tuple[int, ...]

MEGABYTE = 10**6
SHARDS = 8
FIXED_BYTES = 200 * MEGABYTE
LARGEST_FACTOR = 4
TIMES_LARGER = 10

SCAN = """
    import json, sys, torch
    if sys.argv[1:] != ["torch"]:
        from transformers import LlamaForCausalLM
    if len(sys.argv) > 2:
        from splaser_plugin.cli import app
        sys.argv = ["splaser", "scan", sys.argv[1], "-o", sys.argv[2]]
        try:
            app.main()
        except SystemExit as end:
            assert not end.code, end.code
    status = open("/proc/self/status").read().splitlines()
    peak_bytes = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": peak_bytes}))
"""


@dataclass
class Row:
    """One scan: what it read and what it kept resident at most, above imports."""

    name: str
    matrices: int
    checkpoint_bytes: int
    largest_float32_bytes: int
    allowed_bytes: int
    class_bytes: int
    """What importing the model's class takes above torch."""
    peak_bytes: int
    """Above that import."""
    elapsed_s: float
    scan_bytes: int

    @property
    def is_within(self) -> bool:
        return self.peak_bytes <= self.allowed_bytes


def llama_block(hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of one block, the MLP 8/3 as wide as the hidden size, keys and values a quarter of it."""
    wide, narrow = hidden * 8 // 3, hidden // 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for name, shape in shapes.items()}


def allowed_bytes(tensors: dict[str, Tensor]) -> int:
    largest = max(tensor.shape[-1] * tensor.shape[-2] for tensor in tensors.values())
    return LARGEST_FACTOR * 4 * largest + FIXED_BYTES


def write_llama(folder: Path, hidden: int, dtype: torch.dtype, total_bytes: int) -> dict[str, Tensor]:
    """Eight shards of at least `total_bytes` together; returns one block's tensors."""
    block = llama_block(hidden, dtype)
    block_bytes = sum(tensor.nbytes for tensor in block.values())
    per_shard = max(1, -(-total_bytes // (block_bytes * SHARDS)))
    shards = [
        {
            f"model.layers.{shard * per_shard + number}.{name}.weight": tensor
            for number in range(per_shard)
            for name, tensor in block.items()
        }
        for shard in range(SHARDS)
    ]
    write_shards(folder, shards)
    return block


def write_experts(folder: Path, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """10,000 matrices: in each of 8 blocks 5 fused parameters of 125 experts, and 625 experts of their own."""
    generator = torch.Generator().manual_seed(0)
    expert = torch.randn(rows, columns, generator=generator).to(dtype)
    fused = torch.randn(125, rows, columns, generator=generator).to(dtype)
    shards = [
        {f"model.layers.{block}.mlp.experts.fused_{number}": fused for number in range(5)}
        | {f"model.layers.{block}.mlp.experts.{number}.up_proj.weight": expert for number in range(625)}
        for block in range(SHARDS)
    ]
    write_shards(folder, shards)
    return {"expert": expert}


def write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        shard_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(own, folder / shard_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def run_alone(*arguments: Path | str) -> dict[str, int]:
    """What a fresh interpreter says of itself: after an import of torch, or of the model's class, or after a scan."""
    command = [sys.executable, "-c", textwrap.dedent(SCAN), *map(str, arguments)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(name: str, model: Path, tensors: dict[str, Tensor], output: Path) -> Row:
    """Scan the checkpoint in a process of its own. tensors: those of one block, for the largest shape."""
    imported = run_alone()["peak_bytes"]
    start = time.perf_counter()
    after = run_alone(model, output)
    elapsed_s = time.perf_counter() - start
    allowed = allowed_bytes(tensors)
    return Row(
        name=name,
        matrices=len(json.loads(output.read_text(encoding="utf-8"))["matrices"]),
        checkpoint_bytes=sum(shard.stat().st_size for shard in model.glob("*.safetensors")),
        largest_float32_bytes=(allowed - FIXED_BYTES) // LARGEST_FACTOR,
        allowed_bytes=allowed,
        class_bytes=imported - run_alone("torch")["peak_bytes"],
        peak_bytes=after["peak_bytes"] - imported,
        elapsed_s=elapsed_s,
        scan_bytes=output.stat().st_size,
    )


def table(rows: list[Row]) -> str:
    head = ["checkpoint", "matrices", "on disk", "largest in f32", "the class", "allowed", "peak", "within", "time"]
    lines = [
        [
            row.name,
            str(row.matrices),
            *(
                f"{count / MEGABYTE:.0f} MB"
                for count in (
                    row.checkpoint_bytes,
                    row.largest_float32_bytes,
                    row.class_bytes,
                    row.allowed_bytes,
                    row.peak_bytes,
                )
            ),
            "yes" if row.is_within else "NO",
            f"{row.elapsed_s:.0f} s",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def row_of(cells: list[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([row_of(head), rule, *map(row_of, lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of splaser scan on a large checkpoint.")
    parser.add_argument("--hidden", type=int, default=1536, help="hidden size of the checkpoint's blocks")
    parser.add_argument("--small", action="store_true", help="a twentieth of the size: a try, no proof")
    parser.add_argument("--experts", action="store_true", help="10,000 small matrices instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="as stored")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="splaser-scan-memory-") as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        print("writing the checkpoint ...", file=sys.stderr, flush=True)
        if arguments.experts:
            tensors = write_experts(model, 256, 512, dtype)
            name = f"experts, {arguments.dtype}"
        else:
            largest_bytes = 4 * arguments.hidden * (arguments.hidden * 8 // 3)
            total_bytes = TIMES_LARGER * (LARGEST_FACTOR * largest_bytes + FIXED_BYTES)
            tensors = write_llama(model, arguments.hidden, dtype, total_bytes // (20 if arguments.small else 1))
            name = f"llama, {arguments.dtype}"
        row = measure(name, model, tensors, Path(temporary) / "scan.json")
    print(table([row]))
    if arguments.json:
        content = asdict(row) | {"is_within": row.is_within}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not row.is_within:
        sys.exit(1)


if __name__ == "__main__":
    main()
