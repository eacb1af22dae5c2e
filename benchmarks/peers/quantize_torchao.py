"""Quantize weights with torchao: its own choice of codes, or its AWQ where there are activations.

Run by `benchmarks.torchao_peer`, with torchao on the path. Tensors: `w.NAME` [N, K], and `x` [tokens, K] for AWQ. Results:
`w.NAME`, what torchao computes with, in float32, and `s.NAME`, AWQ's scales.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.awq.core import AWQObserver
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType


def main() -> None:
    """Read the files that the arguments name, write the results."""
    source, settings_file, result = sys.argv[1:4]
    given, settings = load_file(source), SimpleNamespace(**json.loads(Path(settings_file).read_text()))
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{settings.bits}"),
        granularity=PerGroup(settings.group),
        mapping_type=MappingType.SYMMETRIC if settings.symmetric else MappingType.ASYMMETRIC,
    )
    made = {}
    for name, weight in given.items():
        if name == "x":
            continue
        scales = torch.ones(weight.shape[1])
        if "x" in given:
            observer = AWQObserver(weight, None, config)
            observer(given["x"], None)
            scales = observer.calculate_qparams()
            made[name.replace("w.", "s.", 1)] = scales.contiguous()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight * scales, requires_grad=False)
        quantize_(linear, config)
        made[name] = (linear.weight.dequantize() / scales).contiguous()
    save_file(made, result)


if __name__ == "__main__":
    with torch.no_grad():
        main()
