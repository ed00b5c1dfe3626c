"""Exported folders in transformers, in a process that cannot import this project: logits, texts, copies and damage.

The process runs `opened.py` once; each test reads a part of what it found.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.data.tokenizer import load_run_rule
from src.inference import generate, load_model
from src.interop import export_huggingface
from src.interop.remote_folder import PRECISIONS
from src.lut import build_lut, read_manifest
from src.lut.codecs import NF3, NF4
from src.lut.layout import ALIGNMENT, SHARD_BYTES
from src.model import ModelConfig
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.conftest import STDLIB
from tests.inference.test_plug_in import write_plug_in
from tests.model.models import CONFIGS, MOLE, build, token_ids
from tests.training.test_added_experts import BASES, with_experts

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("remote code")]  # one process opens all folders

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
WIDE = replace(MOLE, hidden_size=128, num_heads=4, init_std=0.05)  # which NF3 can pack
PROMPTS = 32


def write_run(path: Path, config: ModelConfig, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a run of random weights, with its table."""
    run = RunDirectory(path)
    path.mkdir()
    run.write_config({"name": path.name, "model": config.to_dict(), "trainer": {"max_steps": 1}})
    run.write_weights(build(config, torch.float32).state_dict())
    if config.architecture == "mole":
        build_lut(path, path / "lut", dtype=dtype, shard_bytes=shard_bytes)
    return path


def damage(folder: Path, copy: Path) -> dict[str, Path]:
    """Copy a folder once for each kind of damage to its table."""
    places: dict[str, Path] = {}
    for kind in ("flipped", "header", "manifest", "absent", "short", "foreign"):
        places[kind] = copy / kind
        shutil.copytree(folder, places[kind])
    rows = "lut/rows-00000.safetensors"
    flip(places["flipped"] / rows, ALIGNMENT + 2 * read_manifest(folder / "lut").layout.row_bytes + 5)  # of id 2
    flip(places["header"] / rows, 30)
    flip(places["manifest"] / "lut" / "manifest.json", 30)
    shutil.rmtree(places["absent"] / "lut")
    (places["short"] / rows).write_bytes((folder / rows).read_bytes()[:-1])
    config = places["foreign"] / "config.json"
    config.write_text(config.read_text().replace('"backbone": "', '"backbone": "0'))
    places["row ids"] = copy / "row ids"
    shutil.copytree(folder.with_name("mole-seen"), places["row ids"])
    flip(places["row ids"] / "lut" / "row_ids.safetensors", -8)
    return places


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def runs(trained: RunResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of every architecture and block, and of every precision; and a trained one."""
    place = tmp_path_factory.mktemp("runs")
    runs = {name: write_run(place / name, config) for name, config in CONFIGS.items()}
    runs |= {dtype: write_run(place / dtype, WIDE, dtype) for dtype in PRECISIONS}
    runs["shards"] = write_run(place / "shards", MOLE, shard_bytes=3 * 240)
    base = RunDirectory(write_run(place / "base", BASES["tied"]))
    runs["plug-in"] = write_plug_in(place / "plug-in", base, with_experts(BASES["tied"])).path
    return {**runs, "trained": trained.run_dir}


@pytest.fixture(scope="module")
def work(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the runs and open the folders; return where the results are."""
    work = tmp_path_factory.mktemp("work")
    for name in ("inputs", "outputs"):
        (work / name).mkdir()
    for name, run in runs.items():
        export_huggingface(run, work / "folders" / name)
        vocab_size = RunDirectory(run).model_config().vocab_size
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
        inputs = {"token_ids": token_ids(RunDirectory(run).model_config()), "mask": mask}
        if name == "trained":
            inputs["prompts"] = torch.randint(vocab_size, (PROMPTS, 8), generator=torch.Generator().manual_seed(0))
        save_file(inputs, work / "inputs" / f"{name}.safetensors")
    (work / "inputs" / "texts.json").write_text(json.dumps(texts()), encoding="utf-8")
    damage(work / "folders" / "trained", work / "damaged")
    environment = {**os.environ, "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-I", str(Path(__file__).with_name("opened.py")), str(work)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work


def texts() -> list[str]:
    """Return texts of several kinds, also with what stands for more than its characters."""
    source = (STDLIB / "json" / "decoder.py").read_text(encoding="utf-8")
    odd = [
        "",
        " ",
        "\n\n",
        "<|endoftext|>",
        "a<|endoftext|>b",
        "\u00fc\u4e2d\U0001f600",
        "x" * 1000,
        "A" + " " * 300 + "B",
    ]
    return [*odd, source, *source.splitlines(keepends=True)[:40]]


Found = Callable[[str], Any]


@pytest.fixture(scope="module")
def found(work: Path) -> Found:
    values = json.loads((work / "found.json").read_text())

    def find(name: str) -> Any:
        assert not (isinstance(values[name], dict) and "raised" in values[name]), values[name]["raised"]
        return values[name]

    return find


FOLDERS = [*CONFIGS, *PRECISIONS, "shards", "plug-in", "trained"]


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_the_run(name: str, runs: dict[str, Path], work: Path, found: Found) -> None:
    found("logits")
    inputs = load_file(work / "inputs" / f"{name}.safetensors")
    outputs = load_file(work / "outputs" / f"{name}.safetensors")
    ids, mask = inputs["token_ids"], inputs["mask"].bool()
    with load_model(runs[name]) as model, torch.no_grad():
        whole, padded = model(ids), model(ids, attention_mask=mask)
    expected = {"whole": whole, "steps": whole[:, 3:], "parts": whole, "in_memory": whole}
    for way in outputs.keys() - {"padded"}:
        torch.testing.assert_close(outputs[way], expected[way], rtol=0, atol=TOLERANCE, msg=way)
    torch.testing.assert_close(outputs["padded"][mask], padded[mask], rtol=0, atol=TOLERANCE)
    assert ("parts" in outputs) == (RunDirectory(runs[name]).model_config().architecture == "mole")


def test_greedy_texts_are_those_of_the_run(runs: dict[str, Path], work: Path, found: Found) -> None:
    prompts = load_file(work / "inputs" / "trained.safetensors")["prompts"]
    with load_model(runs["trained"]) as model:
        expected = [generate(model, prompt[None], max_new_tokens=16)[0].tolist() for prompt in prompts]
    assert found("greedy_texts") == expected
    assert len({tuple(text[8:]) for text in expected}) > 8


def test_every_way_of_generating_writes_the_same(found: Found) -> None:
    texts = found("generation")
    expected = texts["cached"]
    assert all(texts[way] == expected for way in ("without cache", "static", "prefill in parts"))
    assert texts["alone"] == texts["new"]  # padding changes nothing
    assert found("relative_path") == found("hub")["new"] == found("saved")["new"] == expected
    if devices := found("devices"):
        assert devices["auto"] == devices["disk"] == expected


def test_samples_follow_the_seed(found: Found) -> None:
    first, again, other, beams = found("samples")
    assert first == again != other
    assert beams == 3


def test_half_precision(found: Found) -> None:
    half = found("bfloat16")
    assert half["dtype"] == "torch.bfloat16"
    assert 0 < half["distance"] < 0.5
    assert len(half["new"]) == 3


def test_pipeline(found: Found) -> None:
    texts = found("pipeline")
    assert len(texts) == 3
    assert all(
        text.startswith(prompt) for text, prompt in zip(texts, ("import os", "def main", "class A"), strict=True)
    )


def test_a_saved_copy_has_everything(found: Found) -> None:
    saved = found("saved")
    code = ["configuration_mole.py", "lookup_table.py", "modeling_mole.py"]
    settings = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert set(saved["files"]) >= {*code, *settings, "lut", "tokenizer.json", "tokenizer_config.json"}
    assert saved["table"] == ["manifest.json", "rows-00000.safetensors", "token_counts.safetensors"]
    assert saved["links"] >= 4  # of the run, the folder, and both copies
    assert saved["texts"]
    assert not [name for name in saved["index"] if "lut" in name or "table" in name]


def test_the_table_is_no_tensor_of_the_model(work: Path, found: Found) -> None:
    names = found("names")
    assert names["buffers"] == []
    assert names["state"] == sorted(load_file(work / "folders" / "trained" / "model.safetensors"))


def test_the_table_of_a_hubs_model_is_downloaded(found: Found) -> None:
    (asked,) = found("hub")["asked"]
    assert asked[0] == "someone/lookup"
    assert asked[1]["allow_patterns"] == "lut/*"


def test_copies_and_forks(found: Found) -> None:
    assert found("copies") == {"same": [True] * 3, "forked": [True] * 4}


def test_rows_can_be_given(found: Found) -> None:
    rows = found("given_rows")
    same, alone, rolled = rows["distances"]
    assert same <= 1e-6 and alone <= 1e-6
    assert rolled > 1e-2
    assert rows["errors"][0].startswith("ValueError: the experts' rows need a table")
    assert "per_layer_inputs has shape (30, 2, 4, 64), expected (B, T, L, E * D) = (2, 15, 2, 256)" in rows["errors"][1]


def test_outputs_are_those_of_other_models(found: Found) -> None:
    outputs = found("outputs")
    assert outputs["states"] == [[2, 10, 64]] * 3
    assert outputs["last"] and all(outputs["kept"]) and outputs["no cache"] and outputs["embeds"]
    assert outputs["tuple"] == 2
    assert found("gradients") < 1e-6


ERRORS = {
    "id": "IndexError: token id 512 is outside of the vocabulary [0, 512)",
    "negative": "IndexError: token id -",
    "flipped": "the row of token id 2 is damaged; copy the table again",
    "header": "rows-00000.safetensors: its header is damaged; copy the table again",
    "manifest": "manifest.json: damaged or edited; copy the table again",
    "row ids": "row_ids.safetensors: missing or damaged; copy the table again",
    "absent": "manifest.json: missing, so there is no table; copy the folder lut/",
    "short": "rows-00000.safetensors: missing or not of ",
    "foreign": "belongs to other weights than config.json says; copy this model's table",
    "no table": "ValueError: the experts' rows need a table: load it by from_pretrained or open_table",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_damage_and_mistakes_are_named(kind: str, found: Found) -> None:
    assert ERRORS[kind] in found("errors")[kind]


def test_texts_become_the_ids_of_the_run(runs: dict[str, Path], found: Found) -> None:
    run = RunDirectory(runs["trained"])
    rule = load_run_rule(run.tokenizer_path, {}, run.text_rule())
    tokenizer = found("texts")
    for text, ids in zip(texts(), tokenizer["ids"], strict=True):
        assert ids == rule.prompt(text), text[:40]
    assert tokenizer["names"] == ["<|endoftext|>"] * 3
    assert (tokenizer["side"], tokenizer["length"]) == ("left", 128)


def test_normal_floats_are_those_of_the_codecs() -> None:
    source = (ROOT / "src/interop/remote_code/lookup_table.py").read_text(encoding="utf-8")
    (value,) = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NORMAL_FLOATS"
    ]
    assert eval(ast.unparse(value)) == {"nf4": NF4, "nf3": NF3}
