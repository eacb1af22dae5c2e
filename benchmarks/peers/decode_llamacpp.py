"""Generate tokens one by one with llama.cpp, greedily, and time them.

Run by `benchmarks.llamacpp_peer`, with llama_cpp on the path. Tensors: `prompt` [n]. Settings: file, threads, tokens, runs.
Results: tokens per second of each run, without the prompt, and the tokens themselves.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from llama_cpp import Llama
from safetensors.numpy import load_file


def main() -> None:
    """Read the files that the arguments name, write the results."""
    source, settings_file, _, result = sys.argv[1:5]
    settings = SimpleNamespace(**json.loads(Path(settings_file).read_text()))
    prompt = load_file(source)["prompt"].tolist()
    model = Llama(
        settings.file,
        n_ctx=len(prompt) + settings.tokens + 8,
        n_threads=settings.threads,
        n_threads_batch=settings.threads,
        verbose=False,
    )
    speeds, found = [], []
    for _ in range(settings.runs):
        model.reset()
        tokens = model.generate(prompt, temp=0.0)
        found = [next(tokens)]  # has read the prompt
        start = time.perf_counter()
        found += [next(tokens) for _ in range(settings.tokens)]
        speeds.append(settings.tokens / (time.perf_counter() - start))
    Path(result).write_text(json.dumps({"tokens_per_second": speeds, "tokens": [int(t) for t in found]}))


if __name__ == "__main__":
    main()
