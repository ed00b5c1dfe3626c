"""The README of an exported folder: what the model is, what it was trained on, how well, and how to load it.

It is made from a run's record and states nothing that the record lacks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from src.lut.manifest import Manifest
from src.model import ModelConfig
from src.run_directory import PlugIn

KINDS = {"dense": "Dense model", "moe": "mixture of experts", "mole": "Mixture of Lookup Experts"}
FIGURES = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
"""Of texts, by their names in the record."""


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    record: Mapping[str, Any],
    table: Manifest | None,
    lut: str,
    *,
    remote_code: bool = True,
) -> str:
    """Return the card of the folder `name`; `lut` is what the run calls the table that was exported."""
    scored = record.get("table") or {}
    has_scores_of_table = table is not None and (scored.get("directory"), scored.get("precision")) == (
        lut,
        table.layout.precision,
    )
    parts = [
        _head(name, config, parameters, remote_code),
        _usage(name, remote_code),
        *([] if table is None else [_table(table)]),
        _training(record),
        _scores(record, "lookup_form" if has_scores_of_table else "training_form"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plug_in_card(name: str, plug_in: PlugIn, table: Manifest) -> str:
    """Return the card of a folder that holds a plug-in alone."""
    base = Path(plug_in.base).name
    return f"""---
library_name: mole
base_model: {base}
tags: [mole]
---

# {name}

Routers and a table of expert rows for the model {base}, whose weights (backbone {plug_in.backbone[:12]}) they leave as
they are and do not hold. To use it with a run of that model:

```bash
python -m src.convert --from hf --input {name} --output runs/{name}
python -m src.generate --run runs/{base} --attach runs/{name} --prompt "The"
```

{_table(table)}
"""


def _head(name: str, config: ModelConfig, parameters: int, remote_code: bool) -> str:
    tags = ["mole", *(["custom_code"] if remote_code else [])]
    blocks = f"{config.num_layers} blocks of width {config.hidden_size}"
    places = "each" if config.expert_layers is None else f"{len(config.mixture_layers)} of them"
    experts = f", {config.num_experts} experts in {places}" if config.num_experts else ""
    if config.top_k is not None:
        experts += f", {config.top_k} of them per token"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---

# {name}

A {KINDS[config.architecture]} made with mole: {parameters:,} parameters in memory, {blocks}{experts}, \
{config.vocab_size:,} token ids, context of {config.max_sequence_length:,} tokens."""


def _usage(name: str, remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if remote_code else ""
    note = f" The model's code is in this folder, hence `{trust[2:]}`." if remote_code else ""
    return f"""## How to load

Needs torch and transformers.{note}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # the path of this folder, or its name on the Hugging Face hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))
```"""


def _table(table: Manifest) -> str:
    layout = table.layout
    shape = f"(batch, tokens, {layout.num_layers}, {layout.num_experts * layout.hidden_size})"
    return f"""## The table

`lut/` holds what the experts return for each token id ([arXiv:2503.15798](https://arxiv.org/abs/2503.15798)): \
{layout.num_rows:,} rows in {layout.precision}, {layout.table_bytes:,} bytes. It stays on disk: a forward pass reads \
{layout.row_bytes:,} bytes per distinct token id and checks them. `from_pretrained(..., lut_in_memory=True)` loads it \
instead. `forward(..., per_layer_inputs=rows)` takes rows that were read elsewhere, {shape}."""


def _training(record: Mapping[str, Any]) -> str:
    corpus, code, software = (record.get(key) or {} for key in ("corpus", "code", "software"))
    lines = list(_corpus(corpus))
    if "steps" in record:
        lines.append(f"- trained for {record['steps']:,} steps on {record.get('trained_tokens', 0):,} tokens")
    if code.get("commit"):
        changed = ", with changes that were not committed" if code.get("modified") else ""
        lines.append(f"- by mole {code.get('version')}, commit {code['commit'][:12]}{changed}")
    if software:
        lines.append(f"- with {', '.join(f'{package} {version}' for package, version in software.items())}")
    return "## Training\n\n" + ("\n".join(lines) or "The run that this was exported from has no record of it.")


def _corpus(corpus: Mapping[str, Any]) -> Iterator[str]:
    for source in corpus.get("sources") or ():
        train = source["train"]
        yield (
            f"- data: {source['name']}, {train['documents']:,} documents of {train['bytes']:,} bytes, "
            f"{train['tokens']:,} tokens"
        )
    if held_out := corpus.get("validation"):
        yield f"- held out: {held_out['documents']:,} documents, {held_out['tokens']:,} tokens"
    if "fingerprint" in corpus:
        yield f"- corpus {corpus['fingerprint'][:12]}, tokenizer {str(corpus.get('tokenizer'))[:12]}"


def _scores(record: Mapping[str, Any], form: str) -> str:
    """Return tables of what a form scored at the end of training; empty where nothing is recorded."""
    found = (record.get("evaluation") or {}).get(form) or {}
    texts, tasks = found.get("texts") or {}, found.get("tasks") or {}
    if not texts and not tasks:
        return ""
    source = "rows of this table" if form == "lookup_form" else "experts computed"
    lines = [f"## Scores\n\nAt the end of training, {source}.\n", f"| text | {' | '.join(FIGURES.values())} |"]
    lines.append("|---|" + "---|" * len(FIGURES))
    lines += [f"| {name} | {' | '.join(_figure(text.get(key)) for key in FIGURES)} |" for name, text in texts.items()]
    if tasks:
        lines += ["", "| task | metric | score | standard error | documents |", "|---|---|---|---|---|"]
    for name, task in tasks.items():
        metrics = [key for key, value in task.items() if isinstance(value, float) and not key.endswith("_stderr")]
        for key in metrics:
            error = _figure(task.get(f"{key}_stderr"))
            lines.append(f"| {name} | {key} | {_figure(task[key])} | {error} | {task.get('documents', '')} |")
    return "\n".join(lines)


def _figure(value: object) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else "-"
