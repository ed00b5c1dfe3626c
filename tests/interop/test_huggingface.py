"""Models of transformers, imported: the same logits, the same text, every weight bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.config import load_run_config
from src.convert import main
from src.data.tokenizer import load_run_rule
from src.generate import main as generate_verb
from src.inference import generate, left_pad, load_model
from src.interop.huggingface import BLOCK_FAMILIES, import_huggingface
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory
from tests.interop.checkpoints import read_checkpoint
from tests.interop.folders import FAMILIES, logits_of, padded_batch, random_model, transformers, write_folder

BATCHES = [padded_batch(seed) for seed in range(3)]


def convert(folder: Path, run: Path) -> RunDirectory:
    main(["--from", "hf", "--input", str(folder), "--output", str(run)])
    return RunDirectory(run)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunDirectory]:
    """A model of transformers and the run that its folder became."""
    path = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param)
    return model, convert(write_folder(path / "folder", model), path / "run")


def difference(model: Any, ours: Transformer) -> float:
    """Return the largest difference of logits at positions that are no padding."""
    worst = 0.0
    for token_ids, mask in BATCHES:
        with torch.no_grad():
            found = ours(token_ids, attention_mask=mask)
        worst = max(worst, (found - logits_of(model, token_ids, mask))[mask].abs().max().item())
    return worst


def test_logits_are_those_of_transformers(pair: tuple[Any, RunDirectory]) -> None:
    with load_model(pair[1].path) as ours:
        assert difference(pair[0], ours) < 2e-5


def twins(config: ModelConfig) -> dict[str, ModelConfig]:
    """Return configs with one wrong setting each, under which the same weights load."""
    found = {"theta": replace(config, rope_theta=config.rope_theta / 10), "eps": replace(config, norm_eps=1e-4)}
    if config.rope_scaling is not None:
        found["scaling"] = replace(config, rope_scaling=None)
    return found


def test_one_wrong_setting_shows(pair: tuple[Any, RunDirectory]) -> None:
    model, run = pair
    with load_model(run.path) as right:
        weights = right.state_dict()
    for name, config in twins(run.model_config()).items():
        wrong = Transformer(config)
        wrong.load_state_dict(weights)
        assert difference(model, wrong) > 1e-4, name
    without = [name for name in weights if name.endswith(("query_norm.weight", "key_norm.weight", "qkv.bias"))]
    for name in without[:2]:
        wrong = Transformer(run.model_config())
        wrong.load_state_dict({**weights, name: torch.full_like(weights[name], 0.0 if "bias" in name else 1.0)})
        assert difference(model, wrong) > 1e-4, name


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_grouped_the_other_way_show(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    run = convert(write_folder(tmp_path / "folder", model), tmp_path / "run")
    wrong, width = Transformer(run.model_config()), run.model_config().attention_head_dim
    wrong.load_state_dict(load_file(run.backbone_path))
    with torch.no_grad():
        for parameter_name, parameter in wrong.named_parameters():
            if ".qkv." in parameter_name:  # heads 0 and 2 share keys, as if groups were strided
                parameter[: 4 * width] = parameter[: 4 * width].unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
            if parameter_name.endswith("attention.out.weight"):
                parameter.copy_(parameter.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1))
    assert difference(model, wrong) > 1e-4


def test_greedy_text_and_cached_decoding_are_those_of_transformers(pair: tuple[Any, RunDirectory]) -> None:
    model, run = pair
    token_ids, mask = left_pad([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]])
    expected = model.generate(
        token_ids, attention_mask=mask.long(), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with load_model(run.path) as ours, torch.no_grad():
        found = generate(ours, token_ids, max_new_tokens=20, attention_mask=mask)
        assert torch.equal(found, expected)
        whole = torch.cat([mask, mask.new_ones(2, 20)], dim=1)
        best = ours(found, attention_mask=whole).argmax(dim=-1)
    assert torch.equal(best[:, 6:-1], found[:, 7:])


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3"])
def test_every_weight_is_the_folders_bit_for_bit_in_its_precision(name: str, tmp_path: Path) -> None:
    model = random_model(name, torch.bfloat16)
    folder = write_folder(tmp_path / "folder", model, shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    run = convert(folder, tmp_path / "run")
    config, weights = run.model_config(), load_file(run.backbone_path)
    theirs = read_checkpoint(folder)
    for entry in BLOCK_FAMILIES[FAMILIES[name][0]].correspondences(config):
        for part, tensor in zip(entry.theirs, entry.split(weights.pop(entry.ours)), strict=True):
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs.pop(part)), part
    assert not weights and not theirs
    with load_model(run.path) as ours:
        assert ours.head.weight.dtype == torch.bfloat16
        assert (ours.head.weight is ours.embedding.weight) == config.tie_embeddings
    assert convert(write_folder(tmp_path / "whole", model), tmp_path / "again").identity() == run.identity()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_of_a_run_is_read_by_transformers_as_the_same_model(name: str, tmp_path: Path) -> None:
    model_type, _ = FAMILIES[name]
    family, model = BLOCK_FAMILIES[model_type], random_model(name)
    model.save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = family.read_config(json.loads(path.read_text(encoding="utf-8")), "here")
    written = family.write_config(config)
    assert written is not None
    path.write_text(json.dumps(written), encoding="utf-8")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    token_ids, mask = BATCHES[0]
    assert torch.equal(logits_of(again, token_ids, mask), logits_of(model, token_ids, mask))
    assert family.read_config(written, "here") == config


def test_the_settings_of_older_versions_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    model = random_model("llama")
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": values.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with load_model(convert(folder, tmp_path / "run").path) as ours:
        assert difference(model, ours) < 2e-5


def test_a_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_model("llama-tied"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = convert(folder, tmp_path / "run")
    assert "head.weight" not in load_file(run.backbone_path)


class TestTexts:
    @pytest.mark.parametrize("begins_with", [None, "<s>"])
    def test_a_text_begins_as_it_does_in_transformers(self, begins_with: str | None, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "folder", random_model("llama"), begins_with=begins_with)
        run = convert(folder, tmp_path / "run")
        rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
        own = transformers.AutoTokenizer.from_pretrained(folder)
        assert rule.prompt("words of a table") == own("words of a table")["input_ids"]
        assert len(rule.before) == (begins_with is not None)
        assert rule.separator == own.eos_token_id

    @pytest.mark.parametrize("asked_for", [True, False])
    def test_the_template_decides_what_begins_a_text(self, asked_for: bool, tmp_path: Path) -> None:
        begins_with = None if asked_for else "<s>"
        folder = write_folder(tmp_path / "folder", random_model("llama"), begins_with=begins_with)
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": asked_for, "bos_token": "words"}
        path.write_text(json.dumps(values), encoding="utf-8")
        run = convert(folder, tmp_path / "run")
        rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
        own = transformers.AutoTokenizer.from_pretrained(folder)
        assert rule.prompt("a table") == own("a table")["input_ids"]

    def test_every_end_of_text_of_the_folder_ends_a_text(self, tmp_path: Path) -> None:
        model = random_model("llama")
        model.generation_config.eos_token_id = [7, 5, 7]
        model.config.eos_token_id = 5
        run = convert(write_folder(tmp_path / "folder", model), tmp_path / "run")
        rule = load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())
        assert rule.stop_ids == (5, 7)
        assert rule.after == (5,)

    def test_files_of_the_folder_are_kept_as_they_are(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "folder", random_model("llama"), chat_template="{{ messages[0].content }}")
        run = convert(folder, tmp_path / "run")
        kept = {path.name for path in (run.path / "huggingface").iterdir()}
        names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert kept == {*names, "chat_template.jinja"}
        for name in kept:
            assert (run.path / "huggingface" / name).read_bytes() == (folder / name).read_bytes()

    def test_generate_writes_the_text_of_transformers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = random_model("qwen3")
        folder = write_folder(tmp_path / "folder", model, begins_with="<s>")
        run = convert(folder, tmp_path / "run")
        capsys.readouterr()
        generate_verb(["--run", str(run.path), "--prompt", "words of a", "--max-new-tokens", "8"])
        own = transformers.AutoTokenizer.from_pretrained(folder)
        ids = own("words of a", return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert capsys.readouterr().out == own.decode(expected[0], skip_special_tokens=True) + "\n"


def test_an_import_is_a_run_like_any_other(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_model("qwen2"))
    import_huggingface(folder, tmp_path / "run")
    config = load_run_config(RunDirectory(tmp_path / "run"))
    assert (config.name, config.data.sequence_length) == ("run", 64)
