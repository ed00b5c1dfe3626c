"""The text of each mistake, and that none leaves a directory behind."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.convert import main
from src.errors import CheckpointError
from src.interop import FAMILIES, Family, export_official, import_official, register_family
from src.interop.official import NAMES_SHOWN
from src.interop.table import Progress
from src.model import ModelConfig
from src.model.config import RopeScaling
from src.run_directory import RunDirectory
from tests.interop.checkpoints import (
    GOLDEN,
    copy_golden,
    golden_config,
    golden_tensors,
    write_checkpoint,
    write_pickle,
    write_sharded,
)
from tests.model.models import MOE, MOLE

Tensors = dict[str, Tensor]


def import_error(checkpoint: Path, tmp_path: Path, top_k: int = 2) -> str:
    """Import what cannot be imported; return the message, and check that nothing was left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        import_official(checkpoint, tmp_path / "run", top_k=top_k)
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value).replace(f"{tmp_path}{os.sep}", "")


CONFIG_MISTAKES: list[tuple[str, dict[str, object], str]] = [
    ("dense", {"num_key_value_heads": 2}, "num_key_value_heads is 2, but only 4 is supported here"),
    ("dense", {"head_dim": 16}, "head_dim is 16, but only 8 is supported here"),
    ("dense", {"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}, but only None is supported"),
    ("dense", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'}, but only rope_"),
    ("dense", {"tie_word_embeddings": True}, "tie_word_embeddings is True, but only False is supported here"),
    ("dense", {"attention_bias": True}, "attention_bias is True, but only False is supported here"),
    ("dense", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, but only 1.0 is supported here"),
    ("dense", {"quantization_config": {}}, "quantization_config is {}, but only None is supported here"),
    ("dense", {"model_type": "mixtral"}, "model_type is 'mixtral', but only 'llama' is supported here"),
    ("dense", {"hidden_size": "32"}, "hidden_size is '32', but it must be an integer"),
    ("dense", {"num_hidden_layers": None}, "num_hidden_layers is None, but it must be an integer"),
    ("dense", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', but it must be a number"),
    ("dense", {"rms_norm_eps": 0}, "model.norm_eps: 0.0, but it must be above 0"),
    ("dense", {"num_experts": 4}, "num_experts is 4, but the weights hold no experts; they are of two models"),
    ("mole", {"num_experts": 0}, "num_experts is 0, but the weights hold experts; they are of two models"),
    ("moe_top2", {"num_experts_per_tok": 4}, "num_experts_per_tok is 4, but top_k is 2; pass --top-k"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONFIG_MISTAKES, ids=str)
def test_config_mistakes(name: str, change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = {**golden_config(name), **change}
    checkpoint = write_checkpoint(tmp_path / "official", golden_tensors(name), config)
    assert import_error(checkpoint, tmp_path).startswith(f"official/config.json: {message}")


def test_top_k_beyond_the_experts(tmp_path: Path) -> None:
    message = import_error(copy_golden("moe_top2", tmp_path / "official"), tmp_path, top_k=11)
    assert message == "official/config.json: model.top_k: 11, but it must be in 1..num_experts (10); null activates all"


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


UP = "model.layers.1.experts.2.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
TABLE = "model.moe_table.weight"
TENSOR_MISTAKES: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("mole", drop(UP), f"its tensors are not those of its config.json; missing: {UP}"),
    ("mole", put("model.extra", torch.ones(1)), "its tensors are not those of its config.json; surplus: model.extra"),
    (
        "mole",
        put(UP, torch.ones(64, 31)),
        f"its tensors are not those of its config.json; misshapen: {UP} (64, 31) ins",
    ),
    ("mole", put(TABLE, torch.ones(97, 384)), "its tensors are not those of its config.json; surplus: model.layers.0."),
    ("mole_rep", put(TABLE, torch.ones(96, 384)), f"its tensors are not those of its config.json; misshapen: {TABLE} "),
    (
        "mole_rep",
        put(TABLE, torch.ones(97, 384).double()),
        f"{TABLE} is torch.float64, but a table is one of float32, ",
    ),
    ("mole", put(QUERY, torch.ones(32, 32).half()), "model.layers.0.self_attn.k_proj.weight is torch.float32, but mod"),
    ("mole", put("model.norm.weight", torch.ones(32).int()), "model.norm.weight is torch.int32, but weights must be f"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSOR_MISTAKES)
def test_tensor_mistakes(name: str, change: Callable[[Tensors], None], message: str, tmp_path: Path) -> None:
    tensors = golden_tensors(name)
    change(tensors)
    checkpoint = write_checkpoint(tmp_path / "official", tensors, golden_config(name))
    assert import_error(checkpoint, tmp_path).startswith(f"official: {message}")


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in golden_tensors("mole").items() if "layers.2." not in name}
    message = import_error(write_checkpoint(tmp_path / "official", tensors, golden_config("mole")), tmp_path)
    assert message.count("model.layers.2.") == NAMES_SHOWN
    assert message.endswith(" and 13 more")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    checkpoint = copy_golden("dense", tmp_path / "official")
    (checkpoint / "model.safetensors").unlink()
    assert import_error(checkpoint, tmp_path).startswith("official: holds no weights; expected model.safetensors, pyt")
    (checkpoint / "config.json").unlink()
    assert import_error(checkpoint, tmp_path).startswith(
        "official/config.json: missing; give a folder of Hugging Face t"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("\ufeff[]", "holds a list, expected an object")],
)
def test_config_that_is_no_object(text: str, message: str, tmp_path: Path) -> None:
    checkpoint = copy_golden("dense", tmp_path / "official")
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    assert import_error(checkpoint, tmp_path).startswith(f"official/config.json: {message}")


def test_damaged_safetensors(tmp_path: Path) -> None:
    checkpoint = copy_golden("dense", tmp_path / "official")
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:-1])
    assert import_error(checkpoint, tmp_path).startswith("official/model.safetensors: not a readable safetensors file")


def test_shards_and_their_index(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "official", golden_tensors("dense"), golden_config("dense"), write_sharded)
    index, shard = checkpoint / "model.safetensors.index.json", checkpoint / "model-00002-of-00003.safetensors"
    (checkpoint / "model-00003-of-00003.safetensors").write_bytes(shard.read_bytes())
    assert "and so does another shard; copy the checkpoint again" in import_error(checkpoint, tmp_path)
    shard.unlink()
    assert import_error(checkpoint, tmp_path) == (
        "official/model-00002-of-00003.safetensors: missing, but model.safetensors.index.json lists it; "
        "copy the checkpoint again"
    )
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}), encoding="utf-8")
    assert "its weight_map must name files of its directory" in import_error(checkpoint, tmp_path)
    index.write_text("{}", encoding="utf-8")
    assert "its weight_map must name files of its directory" in import_error(checkpoint, tmp_path)


class Sneaky:
    """Runs code when it is unpickled by a careless reader."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("sneaked-in",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Sneaky(), "not a plain state dict that torch.load reads with weights_only=True"),
        ({"step": 3}, "holds more than tensors by name; save the bare state dict"),
    ],
    ids=["code", "not-tensors"],
)
def test_pickles_that_hold_more_than_tensors(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = write_checkpoint(tmp_path / "official", {}, golden_config("dense"), write_pickle)
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert import_error(checkpoint, tmp_path).startswith(f"official/pytorch_model.bin: {message}")
    assert not list((tmp_path / "here").iterdir())


def test_existing_output_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert import_error(GOLDEN / "dense", tmp_path) == "run: exists already; choose another --output, or remove it"
    import_official(GOLDEN / "dense", tmp_path / "good")
    with pytest.raises(CheckpointError, match="run: exists already; choose another --output, or remove it"):
        export_official(tmp_path / "good", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(MOE, intermediate_size=12), "model.intermediate_size is 12, but their MoE has no shared expert"),
        (replace(MOLE, intermediate_size=0), "model.intermediate_size is 0, but their MoLE always has a shared expert"),
        (MOLE, "model.expert_intermediate_size is 10, but theirs equals model.intermediate_size (12)"),
        (
            replace(MOLE, expert_intermediate_size=12, top_k=2),
            "model.top_k is 2, but their MoLE mixes all experts",
        ),
        (replace(MOE, num_kv_heads=1), "model.num_kv_heads is 1, but their code computes null"),
        (replace(MOE, head_dim=6), "model.head_dim is 6, but their code computes null"),
        (replace(MOE, activation="swiglu"), "model.activation is swiglu, but their code computes gelu"),
        (replace(MOE, tie_embeddings=True), "model.tie_embeddings is True, but their code computes False"),
        (replace(MOE, attention_bias=True), "model.attention_bias is True, but their code computes False"),
        (replace(MOE, qk_norm=True), "model.qk_norm is True, but their code computes False"),
        (
            replace(MOE, rope_scaling=RopeScaling()),
            f"model.rope_scaling is {RopeScaling()}, but their code computes null",
        ),
    ],
)
def test_models_that_their_code_cannot_express(config: ModelConfig, reason: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.write_config({"name": "run", "model": config.to_dict(), "trainer": {"max_steps": 1}})
    with pytest.raises(CheckpointError) as caught:
        export_official(run.path, tmp_path / "back")
    assert str(caught.value) == f"the authors' code cannot express this model: {reason}; keep it as a run"
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --from --to is required"),
        (["--from", "official", "--to", "official"], "not allowed with argument --from"),
        (["--from", "elsewhere"], "invalid choice: 'elsewhere'"),
        (["--to", "official", "--top-k", "2"], "--top-k and --tokenizer belong to --from; a run knows both"),
    ],
)
def test_command_line_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--input", "a", "--output", "b"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_family_is_registered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def import_toy(
        checkpoint_dir: Path, run_dir: Path, *, top_k: int, tokenizer: Path | None, progress: Progress
    ) -> None:
        with progress("toys", 1) as advance:
            run_dir.write_text(f"{checkpoint_dir.name} {top_k} {tokenizer}")
            advance(1)

    register_family(Family(name="toy", help="of wood", import_checkpoint=import_toy))
    try:
        main(["--from", "toy", "--input", "a", "--output", str(tmp_path / "run")])
        assert (tmp_path / "run").read_text() == "a 2 None"
        with pytest.raises(SystemExit):
            main(["--to", "toy", "--input", "a", "--output", "b"])
        assert "invalid choice: toy (choose from official, hf)" in capsys.readouterr().err.replace("'", "")
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "toy: of wood" in capsys.readouterr().out
        with pytest.raises(ValueError, match="toy: a family of that name is registered already"):
            register_family(FAMILIES["toy"])
    finally:
        del FAMILIES["toy"]
