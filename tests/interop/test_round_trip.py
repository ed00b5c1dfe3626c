"""Import, then export: every tensor bit for bit, under the same names, and a run that the rest of the project reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from src.config import load_run_config
from src.convert import main
from src.data.tokenizer import fingerprint, train_bpe
from src.errors import CheckpointError, DataError, LutError, LutMismatchError, RunError
from src.inference import load_model
from src.interop import export_official, import_official
from src.interop.names import official_shapes, to_official
from src.lut import LutStore, build_lut, read_manifest
from src.model import ModelConfig, Transformer
from src.run_directory import RunDirectory
from tests.interop.checkpoints import (
    GOLDEN,
    NAMES,
    golden_config,
    golden_tensors,
    read_checkpoint,
    write_checkpoint,
    write_pickle,
    write_sharded,
)
from tests.model.models import CONFIGS, DENSE, MOE, MOLE, build


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_import_then_export_gives_every_tensor_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in golden_tensors(name).items()}
    checkpoint = write_checkpoint(tmp_path / "official", tensors, golden_config(name))
    main(["--from", "official", "--input", str(checkpoint), "--output", str(tmp_path / "run")])
    main(["--to", "official", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "back")])
    same_tensors(read_checkpoint(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert golden_config(name).items() <= config.items()
    import_official(tmp_path / "back", tmp_path / "again")
    assert RunDirectory(tmp_path / "again").identity() == RunDirectory(tmp_path / "run").identity()


@pytest.mark.parametrize("name", NAMES)
def test_every_form_on_disk_makes_the_same_run(name: str, tmp_path: Path) -> None:
    import_official(GOLDEN / name, tmp_path / "run")
    expected = RunDirectory(tmp_path / "run").identity()
    for write in (write_sharded, write_pickle):
        checkpoint = write_checkpoint(tmp_path / write.__name__, golden_tensors(name), golden_config(name), write)
        import_official(checkpoint, tmp_path / f"run-{write.__name__}")
        assert RunDirectory(tmp_path / f"run-{write.__name__}").identity() == expected


@pytest.mark.parametrize("name", ["dense", "moe", "moe-full", "mole"])
def test_a_model_of_ours_survives_the_way_out_and_in(name: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], intermediate_size=CONFIGS[name].intermediate_size and 12)
    config = replace(config, expert_intermediate_size=12 if config.num_experts else 0, rope_theta=500.0, norm_eps=1e-3)
    model, run = build(config, torch.float32), RunDirectory(tmp_path / "run")
    run.write_config({"name": "run", "model": config.to_dict(), "trainer": {"max_steps": 1}})
    run.write_weights(model.state_dict())
    export_official(run.path, tmp_path / "official")
    top_k = config.active_experts if config.architecture == "moe" else 2
    import_official(tmp_path / "official", tmp_path / "again", top_k=top_k)
    ids = torch.arange(13).unsqueeze(0)
    with load_model(tmp_path / "again") as again:
        torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-5)
    assert RunDirectory(tmp_path / "again").identity() == run.identity()


@pytest.mark.parametrize("config", [DENSE, MOE, MOLE], ids=["dense", "moe", "mole"])
def test_names_map_one_to_one(config: ModelConfig) -> None:
    weights = Transformer(config).state_dict()
    theirs = to_official(weights, config)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == official_shapes(config, with_table=False)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in weights.values())


def test_a_table_of_another_name_is_exported(tmp_path: Path) -> None:
    import_official(GOLDEN / "mole_rep", tmp_path / "run")
    (tmp_path / "run" / "lut").rename(tmp_path / "run" / "other")
    arguments = ["--to", "official", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "back")]
    with pytest.raises(CheckpointError, match=r"holds neither experts.safetensors nor a finished table lut.*; nothing"):
        main(arguments)
    main([*arguments, "--lut", "other"])
    same_tensors(read_checkpoint(tmp_path / "back"), golden_tensors("mole_rep"))


def test_a_packed_table_is_exported_as_the_numbers_it_decodes_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_official(GOLDEN / "mole", run)
    build_lut(run, run / "lut", dtype="int8")
    (run / "experts.safetensors").unlink()
    export_official(run, tmp_path / "back")
    import_official(tmp_path / "back", tmp_path / "again")
    every_id = torch.arange(97)
    with LutStore.open(run / "lut") as packed, LutStore.open(tmp_path / "again" / "lut") as plain:
        assert torch.equal(packed.gather(every_id), plain.gather(every_id))


@pytest.mark.parametrize("name", NAMES)
def test_the_run_config_is_whole(name: str, tmp_path: Path) -> None:
    import_official(GOLDEN / name, tmp_path / "some-run")
    config = load_run_config(RunDirectory(tmp_path / "some-run"))
    assert config.name == "some-run"
    assert config.model == RunDirectory(tmp_path / "some-run").model_config()
    assert config.data.sequence_length == 64


def test_config_fields_are_honoured(tmp_path: Path) -> None:
    fields = {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "initializer_range": 0.01, "max_position_embeddings": 33}
    checkpoint = write_checkpoint(
        tmp_path / "official", golden_tensors("moe_top2"), {**golden_config("moe_top2"), **fields}
    )
    import_official(checkpoint, tmp_path / "run", top_k=3)
    config = RunDirectory(tmp_path / "run").model_config()
    assert (config.rope_theta, config.norm_eps, config.init_std) == (5e5, 1e-3, 0.01)
    assert (config.max_sequence_length, config.top_k, config.intermediate_size) == (33, 3, 0)


def test_rope_parameters_of_newer_transformers(tmp_path: Path) -> None:
    config = golden_config("dense")
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e4}
    import_official(write_checkpoint(tmp_path / "official", golden_tensors("dense"), config), tmp_path / "run")
    assert RunDirectory(tmp_path / "run").model_config().rope_theta == 2e4


def test_what_needs_the_training_form_says_so(tmp_path: Path) -> None:
    import_official(GOLDEN / "mole_rep", tmp_path / "run")
    with pytest.raises(RunError, match=r"experts.safetensors: missing, so this run has no training form"):
        load_model(tmp_path / "run", experts="ffn")
    with pytest.raises(LutError, match=r"experts.safetensors: missing, so this run holds no training form"):
        build_lut(tmp_path / "run", tmp_path / "run" / "again")


@pytest.mark.parametrize(("name", "what"), [("dense", "no routed experts"), ("moe_top2", "read hidden states")])
def test_a_model_without_a_lookup_form_says_so(name: str, what: str, tmp_path: Path) -> None:
    import_official(GOLDEN / name, tmp_path / "run")
    with pytest.raises(LutError, match=what):
        build_lut(tmp_path / "run", tmp_path / "run" / "lut")
    with pytest.raises(LutError, match=what):
        load_model(tmp_path / "run", experts="lut")


def test_a_table_of_another_model_is_not_exported(tmp_path: Path) -> None:
    import_official(GOLDEN / "mole_rep", tmp_path / "run")
    tensors = golden_tensors("mole_rep")
    tensors["model.norm.weight"] += 1
    import_official(write_checkpoint(tmp_path / "official", tensors, golden_config("mole_rep")), tmp_path / "other")
    (tmp_path / "other" / "lut").rename(tmp_path / "run" / "foreign")
    with pytest.raises(LutMismatchError, match="was built for backbone"):
        export_official(tmp_path / "run", tmp_path / "back", lut="foreign")
    assert not (tmp_path / "back").exists()


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Tokenizer:
        tokenizer = train_bpe(iter(["a table of words, and the words of a table"]), 260)
        tokenizer.save(str(tmp_path / "words.json"))
        return tokenizer

    def checkpoint(self, tmp_path: Path, vocab_size: int) -> Path:
        config = golden_config("mole_rep")
        tensors = golden_tensors("mole_rep")
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.moe_table.weight"):
            tensors[name] = tensors[name].repeat(3, 1)[:vocab_size].clone()
        return write_checkpoint(tmp_path / "official", tensors, {**config, "vocab_size": vocab_size})

    def test_a_larger_vocabulary_is_padding(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        checkpoint, run = self.checkpoint(tmp_path, 280), tmp_path / "run"
        words = str(tmp_path / "words.json")
        main(["--from", "official", "--input", str(checkpoint), "--output", str(run), "--tokenizer", words])
        assert read_manifest(run / "lut").tokenizer == fingerprint(tokenizer)
        main(["--to", "official", "--input", str(run), "--output", str(tmp_path / "back")])
        assert Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json")).to_str() == tokenizer.to_str()
        config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
        assert config["eos_token_id"] == 0

    def test_the_checkpoints_own_is_found(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(tmp_path, 280)
        (tmp_path / "words.json").rename(checkpoint / "tokenizer.json")
        import_official(checkpoint, tmp_path / "run")
        assert Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json")).to_str() == tokenizer.to_str()

    @pytest.mark.usefixtures("tokenizer")
    def test_a_smaller_vocabulary_is_an_error(self, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(tmp_path, 200)
        with pytest.raises(DataError, match=r"words.json: has 260 ids, but the model's vocabulary has 200; pass the"):
            import_official(checkpoint, tmp_path / "run", tokenizer=tmp_path / "words.json")
        assert not (tmp_path / "run").exists()
