"""Opens exported folders with transformers in a process that cannot import this project, and writes what it finds.

`python opened.py WORK`: WORK/folders holds exported folders, WORK/inputs what each is tried with. The names of the
functions below that begin with `find_` are keys of WORK/found.json; what such a function raises is written there.
"""
# ruff: noqa: E402 - the project is hidden before anything is imported

import copy
import json
import multiprocessing
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

sys.modules["src"] = None  # type: ignore[assignment] - so that importing it fails

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

torch.set_num_threads(1)
WORK = Path(sys.argv[1])
FOLDER = WORK / "folders" / "trained"
PROMPTS = ["import os", "def main(self, name):\n    return", "class A:\n    x = 1\n"]
NEW = {"max_new_tokens": 12, "do_sample": False}


def load(folder: Path | str = FOLDER, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, **options)


def tokenizer_of(folder: Path = FOLDER) -> Any:
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)


def batch() -> Any:
    return tokenizer_of()(PROMPTS, return_tensors="pt", padding=True)


def find_logits() -> None:
    """Write the logits of every folder: whole, with padding on the left, step by step, and in small parts."""
    for folder in sorted((WORK / "folders").iterdir()):
        model, inputs = load(folder), load_file(WORK / "inputs" / f"{folder.name}.safetensors")
        ids, mask = inputs["token_ids"], inputs["mask"]
        with torch.no_grad():
            cache, steps = model(ids[:, :3]).cache, []
            for place in range(3, ids.shape[1]):
                steps.append(model(ids[:, place : place + 1], cache=cache).logits)
            found = {
                "whole": model(ids).logits,
                "padded": model(ids, attention_mask=mask).logits,
                "steps": torch.cat(steps, dim=1),
            }
            if getattr(model, "table", None) is not None:  # not without code
                module = sys.modules[type(model).__module__]
                module.CHUNK_BYTES, before = 2 * model.table.row_bytes, module.CHUNK_BYTES  # type: ignore[attr-defined]
                found["parts"] = model(ids, use_cache=False).logits
                module.CHUNK_BYTES = before  # type: ignore[attr-defined]
                in_memory = load(folder, lut_in_memory=True)
                found["in_memory"] = in_memory(ids).logits
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()},
            WORK / "outputs" / f"{folder.name}.safetensors",
        )


def find_gradients() -> float:
    """Return how far the gradient of the loss, of labels as transformers takes them, is from finite differences."""
    model, ids = load(dtype=torch.float64), torch.arange(1, 21).view(2, 10)
    weight = model.blocks[0].router.weight

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    found = model(ids, labels=ids).loss
    found.backward()
    with torch.no_grad():
        expected = loss()
        weight[0, 0] += 1e-5
        above = loss()
        weight[0, 0] -= 2e-5
        below = loss()
    return max(abs(float((above - below) / 2e-5 - weight.grad[0, 0])), abs(float(found - expected)))


def find_greedy_texts() -> list[list[int]]:
    model, prompts = load(), load_file(WORK / "inputs" / "trained.safetensors")["prompts"]
    return [model.generate(prompt[None], max_new_tokens=16, eos_token_id=None)[0].tolist() for prompt in prompts]


def find_generation() -> dict[str, Any]:
    """Return greedy texts of a padded batch in every way that transformers generates."""
    model, inputs, text = load(), batch(), tokenizer_of()
    ways: dict[str, dict[str, Any]] = {
        "cached": {},
        "without cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "prefill in parts": {"prefill_chunk_size": 2},
    }
    found: dict[str, Any] = {way: model.generate(**inputs, **NEW, **more).tolist() for way, more in ways.items()}
    alone = [text(prompt, return_tensors="pt") for prompt in PROMPTS]
    found["alone"] = [model.generate(**each, **NEW)[0, each.input_ids.shape[1] :].tolist() for each in alone]
    found["new"] = [row[inputs.input_ids.shape[1] :] for row in found["cached"]]
    return found


def find_samples() -> list[Any]:
    model, inputs = load(), batch()
    found: list[Any] = []
    for seed in (0, 0, 1):
        set_seed(seed)
        found.append(model.generate(**inputs, max_new_tokens=12, do_sample=True).tolist())
    found.append(model.generate(**inputs, max_new_tokens=4, num_beams=3).shape[0])
    return found


def find_bfloat16() -> dict[str, Any]:
    model, wide = load(dtype=torch.bfloat16), load()
    with torch.no_grad():
        ids = torch.arange(40)[None]
        distance = (model(ids).logits.float() - wide(ids).logits).abs().max()
    return {"dtype": str(model.dtype), "distance": float(distance), "new": model.generate(**batch(), **NEW).tolist()}


def find_pipeline() -> list[str]:
    writer = pipeline("text-generation", model=str(FOLDER), trust_remote_code=True)
    return [each[0]["generated_text"] for each in writer(PROMPTS, batch_size=3, **NEW)]


def find_devices() -> dict[str, Any]:
    """Return greedy texts of a model that accelerate places, and of one whose blocks it keeps on disk."""
    if not importable("accelerate"):
        return {}
    layers = load().config.num_hidden_layers
    places = {"embedding": "cpu", "norm": "cpu", "head": "disk"}
    places |= {f"blocks.{layer}": "disk" if layer % 2 else "cpu" for layer in range(layers)}
    kinds: dict[str, Any] = {"auto": "auto", "disk": places}
    return {
        name: load(device_map=kind, offload_folder=str(WORK / "offload")).generate(**batch(), **NEW).tolist()
        for name, kind in kinds.items()
    }


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def find_saved() -> dict[str, Any]:
    """Return what a saved copy, and a copy of it, write; and what saving shares with the folder."""
    model, texts = load(), tokenizer_of()
    for folder in (WORK / "saved", WORK / "saved-again", WORK / "saved"):
        model.save_pretrained(folder, max_shard_size="100KB")
        texts.save_pretrained(folder)
        model = load(folder)
    shard = next((WORK / "saved" / "lut").glob("rows-*"))
    return {
        "files": sorted(path.name for path in (WORK / "saved").iterdir() if not path.name.startswith("model-")),
        "table": sorted(path.name for path in (WORK / "saved" / "lut").iterdir()),
        "index": sorted(json.loads((WORK / "saved" / "model.safetensors.index.json").read_text())["weight_map"]),
        "links": shard.stat().st_nlink,
        "new": model.generate(**batch(), **NEW).tolist(),
        "texts": tokenizer_of(WORK / "saved")(PROMPTS).input_ids == texts(PROMPTS).input_ids,
    }


def find_names() -> dict[str, list[str]]:
    """Return the names of all parameters and buffers, which the table must not be among."""
    model = load(lut_in_memory=True)
    return {"state": sorted(model.state_dict()), "buffers": [name for name, _ in model.named_buffers()]}


def find_relative_path() -> list[Any]:
    os.chdir(FOLDER.parent)
    model = load("trained")
    os.chdir("/")
    return model.generate(**batch(), **NEW).tolist()


def find_hub() -> dict[str, Any]:
    """Load by a hub's name: code and weights from a cache as the hub leaves it, the table by a download."""
    hub = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--lookup"
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    for path in FOLDER.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append([name, {key: str(value) for key, value in options.items()}])
        (snapshot / "lut").symlink_to(FOLDER / "lut")
        return str(snapshot)

    huggingface_hub.snapshot_download = download  # type: ignore[assignment]
    model = load("someone/lookup", revision="main")
    return {"asked": asked, "new": model.generate(**batch(), **NEW).tolist()}


def find_copies() -> dict[str, Any]:
    """Return greedy texts of copies: pickled, deep and in a forked process."""
    model = load()
    expected = model.generate(**batch(), **NEW)
    pickled, deep = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    in_memory = pickle.loads(pickle.dumps(load(lut_in_memory=True)))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        forked = pool.map(lines_of, range(4))
    return {
        "same": [torch.equal(each.generate(**batch(), **NEW), expected) for each in (pickled, deep, in_memory)],
        "forked": [line == model.table.read([token])[0].sum().item() for token, line in enumerate(forked)],
    }


SHARED: list[Any] = []


def lines_of(token_id: int) -> int:
    return int(SHARED[0].table.read([token_id])[0].sum())


def find_given_rows() -> dict[str, Any]:
    """Return how logits of rows that are given differ from those of rows that are read."""
    model, ids = load(), torch.arange(1, 31).view(2, 15)
    codes = model.table.read(list(range(1, 31)))
    rows = torch.stack([model.table.layer(codes, layer) for layer in range(model.config.num_hidden_layers)], dim=1)
    given = rows.flatten(2).view(2, 15, model.config.num_hidden_layers, -1)  # (B, T, L, E * D)
    with torch.no_grad():
        expected = model(ids).logits
        found = model(ids, per_layer_inputs=given).logits
        model.table, embeddings = None, model.embedding(ids)
        alone = model(inputs_embeds=embeddings, per_layer_inputs=given).logits
        other = model(ids, per_layer_inputs=given.roll(1, dims=1)).logits
    distances = [float((each - expected).abs().max()) for each in (found, alone, other)]
    return {"distances": distances, "errors": [error_of(model, ids), error_of(model, ids, per_layer_inputs=rows)]}


def error_of(call: Any, *arguments: Any, **options: Any) -> str:
    try:
        call(*arguments, **options)
    except Exception as error:  # noqa: BLE001 - any of them is the result
        return f"{type(error).__name__}: {error}"
    return "none"


def find_outputs() -> dict[str, Any]:
    model, ids = load(), torch.arange(20).view(2, 10)
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
        states = [tuple(state.shape) for state in whole.hidden_states]
        last = model.head(whole.hidden_states[-1])
        kept = [model(ids, logits_to_keep=2), model(ids, logits_to_keep=torch.tensor([8, 9]))]
        return {
            "states": states,
            "last": torch.equal(last, whole.logits),
            "kept": [torch.allclose(each.logits, whole.logits[:, -2:], atol=1e-6) for each in kept],
            "tuple": len(model(ids, return_dict=False)),
            "no cache": model(ids, use_cache=False).cache is None,
            "embeds": torch.equal(model.get_input_embeddings().weight, model.embedding.weight),
        }


def find_errors() -> dict[str, str]:
    """Return what damaged, missing and foreign tables say, and ids outside of the vocabulary."""
    model = load()
    found = {
        "id": error_of(model, torch.tensor([[3, model.config.vocab_size]])),
        "negative": error_of(model, -batch().input_ids),
    }
    for kind in ("flipped", "header", "manifest", "absent", "short", "foreign", "row ids"):
        folder = WORK / "damaged" / kind
        found[kind] = error_of(lambda folder=folder: load(folder)(torch.tensor([[1, 2, 3]])))
    config = AutoConfig.from_pretrained(str(FOLDER), trust_remote_code=True)
    found["no table"] = error_of(AutoModelForCausalLM.from_config(config, trust_remote_code=True), batch().input_ids)
    return found


def find_texts() -> dict[str, Any]:
    """Return the ids of texts, and what the tokenizer calls its tokens."""
    texts = tokenizer_of()
    lines = json.loads((WORK / "inputs" / "texts.json").read_text(encoding="utf-8"))
    return {
        "ids": [texts(line).input_ids for line in lines],
        "names": [texts.bos_token, texts.eos_token, texts.pad_token],
        "side": texts.padding_side,
        "length": texts.model_max_length,
    }


def main() -> None:
    SHARED.append(load())
    found: dict[str, Any] = {}
    for name, function in list(globals().items()):
        if name.startswith("find_"):
            try:
                found[name.removeprefix("find_")] = function()
            except Exception:  # noqa: BLE001 - the test that asks for it fails with it
                found[name.removeprefix("find_")] = {"raised": traceback.format_exc()}
    (WORK / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
