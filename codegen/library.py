"""Ops that are left to torch on purpose, and the reasons that the coverage table shows."""

from __future__ import annotations

from ..ir import Node

#: Ops for which torch's own kernel is the best known way here: name -> why.
LIBRARY: dict[str, str] = {
    "aten.convolution.default": "oneDNN's convolution",
    "aten.convolution_backward.default": "oneDNN's convolution",
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "torch's blocked attention",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": "torch's blocked attention",
    "aten.scaled_dot_product_attention.default": "torch's attention",
    "aten._scaled_dot_product_attention_math.default": "torch's attention",
    "aten.mm.default": "MKL's matmul",
    "aten.addmm.default": "MKL's matmul",
    "aten.bmm.default": "MKL's matmul",
    "aten.baddbmm.default": "MKL's matmul",
    "aten.linear.default": "MKL's matmul",
    "aten.sort.stable": "torch's sort",
    "aten.sort.default": "torch's sort",
    "aten.topk.default": "torch's selection",
    "aten.embedding_dense_backward.default": "torch's scatter",
    "aten.native_dropout.default": "torch's generator, so that seeds give eager's numbers",
    "aten.bernoulli.p": "torch's generator, so that seeds give eager's numbers",
    "aten.rand.default": "torch's generator, so that seeds give eager's numbers",
    "aten.randn.default": "torch's generator, so that seeds give eager's numbers",
    "aten.rand_like.default": "torch's generator, so that seeds give eager's numbers",
    "aten.randn_like.default": "torch's generator, so that seeds give eager's numbers",
    "aten.max_pool2d_with_indices.default": "torch's pooling",
    "aten.max_pool2d_with_indices_backward.default": "torch's pooling",
    "aten.avg_pool2d.default": "torch's pooling",
    "aten._adaptive_avg_pool2d.default": "torch's pooling",
}


_ATTENTION = dict.fromkeys(
    (
        *("aten._scaled_dot_product_flash_attention.default", "aten._scaled_dot_product_flash_attention_backward.default"),
        *("aten._scaled_dot_product_cudnn_attention.default", "aten._scaled_dot_product_cudnn_attention_backward.default"),
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_efficient_attention_backward.default",
    ),
    "torch's fused attention",
)

#: The same on CUDA devices.
CUDA_LIBRARY: dict[str, str] = {
    **LIBRARY,
    **_ATTENTION,
    "aten.convolution.default": "cuDNN's convolution",
    "aten.convolution_backward.default": "cuDNN's convolution",
    **dict.fromkeys(("aten.mm.default", "aten.addmm.default", "aten.linear.default"), "cuBLAS's matmul"),
    **dict.fromkeys(("aten.bmm.default", "aten.baddbmm.default"), "cuBLAS's matmul"),
}

_LIBRARIES = {"cpu": LIBRARY, "cuda": CUDA_LIBRARY}


def kind_of(node: Node, why: str, device: str = "cpu") -> tuple[str, str]:
    """(kind, reason) of a node that no kernel is generated for on a kind of device; see `CallItem`."""
    if node.op.has("scalar") or node.op.name in ("aten.sym_size.int", "aten._local_scalar_dense.default"):
        return "internal", "a number, not a tensor"
    found = _LIBRARIES[device].get(node.op.name)
    return ("library", found) if found is not None else ("fallback", why)


def refusal(node: Node) -> str | None:
    """Why this application of an op that has a lowering is still left to torch; None for most."""
    name = node.op.name
    if name == "aten.index.Tensor":
        indices = [t for t in node["indices"] if t is not None]
        if any(str(t.tensor.dtype) in ("torch.bool", "torch.uint8") for t in indices):
            return "a mask as index gives a size that is known only at run time"
    if name in ("aten.cat.default", "aten.stack.default") and len(node["tensors"]) > 16:
        return "more than 16 tensors to join"
    if name == "aten.gather.default" and 0 < node["self"].tensor.rank != node["index"].tensor.rank > 0:
        return "an index of another rank than the source"
    if name == "aten.constant_pad_nd.default" and any(not isinstance(p, int) or p < 0 for p in node["pad"]):
        return "negative padding"
    if name == "aten.pow.Tensor_Tensor" and not node.out.tensor.dtype.is_floating_point:
        return "integer powers"
    if name == "aten.pow.Scalar" and not node.out.tensor.dtype.is_floating_point:
        return "integer powers"
    if (
        name == "aten.pow.Tensor_Scalar"
        and not node.out.tensor.dtype.is_floating_point
        and node["exponent"] not in (1, 2, 3)
    ):
        return "integer powers"
    return None
