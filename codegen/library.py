"""Ops that are left to torch on purpose, and the reasons that the coverage table shows."""

from __future__ import annotations

from ..ir import Node

NO_KERNEL = "no kernel lowering"

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
    "aten._int_mm.default": "oneDNN's matmul of bytes",
    "aten.sort.stable": "torch's sort",
    "aten.sort.default": "torch's sort",
    "aten.topk.default": "torch's selection",
    "aten.embedding_dense_backward.default": "torch's scatter",
}

#: The same by what runs them, for every overload and for the backward op of that name.
_BY_LIBRARY: dict[str, str] = {
    "torch's generator, so that seeds give eager's numbers": """
        native_dropout bernoulli rand randn rand_like randn_like randint randint_like randperm random normal
        normal_functional uniform exponential geometric cauchy log_normal multinomial poisson binomial
        rrelu_with_noise_functional _standard_gamma _sample_dirichlet""",
    "torch's selection, linear in the length": "kthvalue median nanmedian",
    # windows: kernels with channels in SIMD lanes
    "torch's pooling": """
        max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
        adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d""",
    "torch's windows as columns": "im2col col2im",
    "torch's sampling": "grid_sampler_2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    # blocked over the same BLAS that multiplies matrices
    "LAPACK": """
        _linalg_svd _linalg_eigh _linalg_eigvals linalg_eig linalg_eigvals linalg_qr geqrf ormqr linalg_lu
        linalg_lu_factor_ex linalg_lu_solve linalg_ldl_factor_ex linalg_ldl_solve linalg_cholesky_ex cholesky
        cholesky_solve cholesky_inverse linalg_inv_ex linalg_pinv _linalg_solve_ex _linalg_det _linalg_slogdet
        linalg_lstsq linalg_solve_triangular triangular_solve linalg_householder_product""",
    "MKL's matmul": "addbmm",
    "MKL's Fourier transform": "_fft_r2c _fft_c2r _fft_c2c",
}

#: Why other ops run in torch, correct and unfused: neither a kernel nor a library that one would choose.
_UNSUPPORTED: dict[str, str] = {
    "complex numbers: kernels hold real ones": """
        complex polar _conj _conj_physical view_as_complex view_as_real _neg_view real imag""",
    "the size of its result depends on what it finds": """
        nonzero masked_select masked_scatter _unique2 unique_dim unique_consecutive repeat_interleave nonzero_static""",
    "it counts equal elements": """
        mode histc histogram _histogramdd_from_bin_cts _histogramdd_from_bin_tensors _histogramdd_bin_edges""",
    "a scan of pairs: kernels scan sums and products": "cummax cummin logcumsumexp",
    "a search whose steps depend on the data": "searchsorted bucketize",
    "a series whose length depends on the data": "igamma igammac special_zeta",
    "a recurrence whose length, the degree, is data": """
        special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
        special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_hermite_polynomial_h
        special_hermite_polynomial_he special_laguerre_polynomial_l special_legendre_polynomial_p""",
    "eight taps at positions that are data": "grid_sampler_3d",
    "a Taylor polynomial whose degree depends on the norm": "linalg_matrix_exp",
    "it changes only the rows that it finds too long": "embedding_renorm",
    "rows of lengths that are known only at run time": "segment_reduce _embedding_bag _embedding_bag_forward_only",
    "all pairs of rows: as a broadcast they would not fit the cache": "_cdist_forward _pdist_forward",
    "pivots applied one after the other": "lu_unpack",
    "it addresses memory that it was not given as a value": "as_strided_copy as_strided_scatter",
    "a sum over products of three tensors, contracted in an order of its own": "_trilinear",
    "an exclusive or over all bits": "hash_tensor",
}

#: Ops that raise or do nothing.
_CHECKS = frozenset(("_assert_scalar", "_assert_async", "_linalg_check_errors"))


def _inverted(table: dict[str, str]) -> dict[str, str]:
    return {name: why for why, names in table.items() for name in names.split()}


_LIBRARY_OF, _WHY_NOT = _inverted(_BY_LIBRARY), _inverted(_UNSUPPORTED)


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
    "aten._int_mm.default": "cuBLAS's matmul of bytes",
    **dict.fromkeys(("plait.expert_mm.default", "plait.expert_mm_weight.default"), "cuBLAS's matmul of whole buffers"),
    "plait.moe_keep.default": "torch's stable sort",
    "plait.moe_slots.default": "torch's stable sort",
    "plait.moe_encode.default": "copies of whole rows",
    "plait.moe_decode.default": "copies of whole rows",
    "plait.moe_decode_weight.default": "products of whole rows",
    "plait.moe_join.default": "copies of whole rows",
}

_CUDA_NAMES = {"LAPACK": "cuSOLVER", "MKL's matmul": "cuBLAS's matmul", "MKL's Fourier transform": "cuFFT"}


def kind_of(node: Node, why: str, device: str = "cpu") -> tuple[str, str]:
    """(kind, reason) of a node that no kernel is generated for on a kind of device; see `CallItem`."""
    if node.op.has("scalar") or node.op.name in ("aten.sym_size.int", "aten._local_scalar_dense.default"):
        return "internal", "a number, not a tensor"
    name = node.op.name
    packet = name.split(".")[1].removesuffix("_backward")
    if packet in _CHECKS:
        return "internal", "a check, which computes nothing"
    if node.op.effect == "collective":
        return "library", "a collective"
    found = (LIBRARY if device == "cpu" else CUDA_LIBRARY).get(name)
    if found is None and (found := _LIBRARY_OF.get(packet)) is not None and device != "cpu":
        found = _CUDA_NAMES.get(found, found)
    if found is not None:
        told = why != NO_KERNEL and ("attention" in found or name == "aten.convolution.default")  # templates take most
        told = told and why != "not on a CPU"
        return "library", f"{found}: {why}" if told else found
    return "fallback", _WHY_NOT.get(packet, why) if why == NO_KERNEL else why


def refusal(node: Node) -> str | None:
    """Why this application of an op that has a lowering is still left to torch; None for most."""
    name = node.op.name
    if name == "aten.index.Tensor":
        indices = [t for t in node["indices"] if t is not None]
        if any(str(t.tensor.dtype) in ("torch.bool", "torch.uint8") for t in indices):
            return "a mask as index gives a size that is known only at run time"
    if name in ("aten.cat.default", "aten.stack.default") and len(node["tensors"]) > 16:
        return "more than 16 tensors to join"
    ranks = (node["self"].tensor.rank, node["index"].tensor.rank) if name == "aten.gather.default" else (0, 0)
    if all(ranks) and ranks[0] != ranks[1] and node.out.tensor.numel != 0:
        return "an index of another rank than the source"
    if name == "aten.constant_pad_nd.default" and not all(isinstance(p, int) for p in node["pad"]):
        return "padding by a size that is known only at run time"
    if name in ("aten.polygamma.default", "aten.special_polygamma.default") and node["n"] > 6:
        return "a derivative of high order, whose terms overflow"
    if name == "aten.nextafter.default" and node.out.tensor.dtype.itemsize == 2:
        return "the next number of a 16-bit type, which kernels compute in float32"
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
