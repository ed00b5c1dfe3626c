"""Dense runs with the block of Llama or Qwen as folders without code, in transformers: the way in and out again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src import convert, export
from src.data.tokenizer import load_run_rule, load_tokenizer, num_ids
from src.inference import generate, load_model
from src.model import ModelConfig
from src.run_directory import RunDirectory
from tests.interop.checkpoints import read_checkpoint
from tests.interop.folders import FAMILIES, padded_batch, random_model, transformers, words, write_folder
from tests.model.models import BLOCKS, build

SIZES = ModelConfig(vocab_size=300, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=32, init_std=0.1)


def through(folder: Path, place: Path) -> Path:
    """Import a folder and export the run."""
    convert.main(["--from", "hf", "--input", str(folder), "--output", str(place / "run")])
    export.main(["--run", str(place / "run"), "--to", "hf", "--output", str(place / "out")])
    return place / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_comes_out_as_it_went_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", random_model(name, dtype), shard_size="60KB")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    out = through(folder, tmp_path)
    found, expected = read_checkpoint(out), read_checkpoint(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == dtype for key in expected)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(out.glob("*.py"))
    configs = [transformers.AutoConfig.from_pretrained(str(path)).to_dict() for path in (out, folder)]
    assert all(config.pop("_name_or_path") for config in configs)
    assert configs[0] == configs[1]


def test_a_model_that_was_trained_on_keeps_what_else_its_config_says(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", random_model("qwen3-tied", torch.bfloat16))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "of_the_owner": 7}))
    convert.main(["--from", "hf", "--input", str(folder), "--output", str(tmp_path / "run")])
    run = RunDirectory(tmp_path / "run")
    run.write_weights({name: tensor.float() + 1e-3 for name, tensor in load_file(run.backbone_path).items()})
    export.main(["--run", str(run.path), "--to", "hf", "--output", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["of_the_owner"], written["dtype"], written["model_type"]) == (7, "float32", "qwen3")
    require_same_logits(run, tmp_path / "out")


def require_same_logits(run: RunDirectory, folder: Path) -> Any:
    """Compare a run with its folder in transformers, which is returned."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    token_ids, mask = padded_batch(0)
    with load_model(run.path) as ours, torch.no_grad():
        expected = ours(token_ids, attention_mask=mask)
        found = model(token_ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=2e-5)
        greedy = model.generate(token_ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
        known = None if not run.tokenizer_path.is_file() else num_ids(load_tokenizer(run.tokenizer_path))
        assert torch.equal(greedy, generate(ours, token_ids[:1], max_new_tokens=12, num_ids=known))
    return model


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "everything"])
def test_a_run_with_such_a_block_needs_no_code(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    config = replace(SIZES, **BLOCKS[name])
    rule = {"separator": "<|endoftext|>", "before": [], "after": ["<|endoftext|>"]}
    run.write_config({"name": "run", "model": config.to_dict(), "trainer": {"max_steps": 1}}, rule)
    run.write_weights(build(config, torch.float32).state_dict())
    words().save(str(run.tokenizer_path))
    export.main(["--run", str(run.path), "--to", "hf", "--output", str(tmp_path / "out")])
    assert require_same_logits(run, tmp_path / "out").config.model_type == name.replace("smollm", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ours = load_run_rule(run.tokenizer_path, {}, run.text_rule())
    for text in ("a table", "the words <|endoftext|> of", "\n\n", " x"):
        assert tokenizer(text).input_ids == ours.prompt(text)
    assert tokenizer.eos_token_id == ours.separator
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in card and "custom_code" not in card


def test_files_of_another_tokenizer_stay_behind(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", random_model("llama"))
    words(270).save(str(tmp_path / "other.json"))
    given = ["--output", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "other.json")]
    convert.main(["--from", "hf", "--input", str(folder), *given])
    export.main(["--run", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "out")])
    found = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert len(found) == 270
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    shutil.rmtree(tmp_path / "run" / "huggingface")
    export.main(["--run", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "bare")])
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["model_type"] == "llama"
