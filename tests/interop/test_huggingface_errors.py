"""What of a folder cannot be expressed is refused by the name of its setting, and leaves nothing behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.errors import CheckpointError, DataError
from src.interop import import_huggingface
from tests.interop.folders import LLAMA3, random_model, words, write_folder


def import_error(folder: Path, tmp_path: Path) -> str:
    before = sorted(tmp_path.iterdir())
    with pytest.raises((CheckpointError, DataError)) as caught:
        import_huggingface(folder, tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value).replace(f"{tmp_path}{os.sep}", "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("folders")
    return {name: write_folder(path / name, random_model(name)) for name in ("llama", "mistral", "qwen2", "qwen3")}


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"model_type": "mixtral"},
        "model_type is 'mixtral', but only llama, mistral, mole, qwen2, qwen3 are supported",
    ),
    ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', but only llama, "),
    ("llama", {"model_type": None}, "model_type is None, but only llama, "),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8, but only None is supported here"),
    ("llama", {"num_experts": 4}, "num_experts is 4, but only None is supported here"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu' is supported here"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act is 'relu', but only 'silu' is supported here"),
    ("llama", {"attention_bias": True}, "attention_bias is True, but only False is supported here"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True, but only False is supported here"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, but only False is supported here"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, but only None is supported"),
    ("llama", {"auto_map": {"AutoModel": "a.B"}}, "auto_map is {'AutoModel': 'a.B'}, but only None is supported here"),
    ("llama", {"architectures": ["LlamaModel"]}, "architectures is ['LlamaModel'], but only ['LlamaForCausalLM'] is"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1.0 is supported here"),
    (
        "llama",
        {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25, but only 1.0 is supported here",
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear', but only"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has rope_type 'yarn', but only"),
    ("qwen2", {"rope_parameters": {"full_attention": {}}}, "rope_parameters has full_attention {}, which is not supp"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling is [1], but it must be an object"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "rope_parameters: low_freq_factor is missing, but it must be a number",
    ),
    (
        "llama",
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        "model.rope_scaling.low_freq_factor: 4, but it must be below",
    ),
    ("mistral", {"sliding_window": 32}, "sliding_window is 32, and max_position_embeddings is 64, but only sequences"),
    ("mistral", {"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention'], but only None is"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
        "use_sliding_window is True, with sliding_window 32 in some layers, but only sequences within one window",
    ),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": None, "max_window_layers": 2},
        "use_sliding_window is True, with sliding_window 32 in some layers, but only sequences within one window",
    ),
    ("qwen3", {"layer_types": ["chunked_attention"]}, "layer_types has 'chunked_attention', but only full attention"),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64', but it must be an integer"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers is None, but it must be an integer"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True, but it must be an integer"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', but it must be true or false"),
    ("llama", {"rms_norm_eps": 0}, "model.norm_eps: 0.0, but it must be above 0"),
    ("llama", {"num_key_value_heads": 3}, "model.num_kv_heads: 3 heads of keys and values do not divide"),
    ("llama", {"head_dim": 7}, "model.head_dim: 7, but the rotary embedding needs an even number"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES, ids=str)
def test_settings_that_cannot_be_expressed(
    name: str, change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    values = json.loads((folders[name] / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**values, **change}), encoding="utf-8")
    (folder / "model.safetensors").symlink_to(folders[name] / "model.safetensors")
    assert import_error(folder, tmp_path).startswith(f"folder/config.json: {message}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": None, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"]}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}),
    ],
)
def test_windows_that_hide_nothing_are_no_obstacle(
    name: str, change: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    values = json.loads((folders[name] / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**values, **change}), encoding="utf-8")
    (folder / "model.safetensors").symlink_to(folders[name] / "model.safetensors")
    import_huggingface(folder, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_that_cannot_be_read_is_refused_unless_another_is_given(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(folders["llama"] / file)
    (folder / name).write_bytes(b"\n\x0e")
    message = import_error(folder, tmp_path)
    assert message.startswith(f"folder/{name}: only tokenizer.json can be read, and the folder has none; let transform")
    words().save(str(tmp_path / "words.json"))
    import_huggingface(folder, tmp_path / "run", tokenizer=tmp_path / "words.json")
    assert (tmp_path / "run" / "tokenizer.json").is_file()


def test_a_tokenizer_with_more_ids_than_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(folders["llama"] / file)
    tokenizer = words()
    tokenizer.add_tokens([f"<more{number}>" for number in range(300)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "ids, but the model's vocabulary has 300; pass the tokenizer" in import_error(folder, tmp_path)


def edited(source: Path, folder: Path, **tensors: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").symlink_to(source / "config.json")
    found = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        found[name.replace("__", ".")] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.extra.weight": torch.ones(2)}, "its tensors are not those of its config.json; surplus: model.extra.w"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 63)},
            "its tensors are not those of its config.json; misshapen: model.layers.0.mlp.up_proj.weight (96, 63) inst",
        ),
        ({"model.norm.weight": torch.ones(64).half()}, "model.norm.weight is torch.float16, but model.embed_tokens"),
        ({"model.norm.weight": torch.ones(64).int()}, "model.norm.weight is torch.int32, but weights must be"),
        (
            {"model.layers.1.self_attn.q_proj.weight": torch.ones(48, 64).half()},
            "model.layers.1.self_attn.k_proj.weight is torch.float32, but model.layers.1.self_attn.q_proj.weight is",
        ),
    ],
    ids=["surplus", "misshapen", "another precision", "integers", "parts in two precisions"],
)
def test_tensors_that_are_not_the_models(
    tensors: dict[str, torch.Tensor], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(folders["llama"], tmp_path / "folder", **tensors)
    found = import_error(folder, tmp_path)
    assert found.startswith("folder: ")
    assert message in found


def test_a_tied_head_that_differs_from_the_embedding(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", random_model("llama-tied"))
    folder = edited(source, tmp_path / "folder", **{"lm_head.weight": torch.ones(300, 64)})
    assert import_error(folder, tmp_path).startswith(
        "folder/config.json: tie_word_embeddings is True, but lm_head.weight differs from model.embed_tokens.weight"
    )


def test_a_missing_shard_and_a_run_that_exists(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", random_model("qwen2"), shard_size="40KB")
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    assert import_error(folder, tmp_path).startswith(f"folder/{shard.name}: missing, but model.safetensors.index.json")
    (tmp_path / "run").mkdir()
    assert import_error(folders["llama"], tmp_path) == "run: exists already; choose another --output, or remove it"
