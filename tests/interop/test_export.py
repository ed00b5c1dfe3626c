"""Runs as folders of transformers, and back: what is written, what is refused, and that nothing is half-written."""

import ast
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src import convert, export
from src.data.tokenizer import train_bpe
from src.errors import CheckpointError, LutMismatchError, WriteError
from src.inference import generate, load_model
from src.interop import export_huggingface, import_exported
from src.interop.remote_folder import OF_TRAINING, PRECISIONS
from src.lut import build_lut, read_manifest
from src.lut.codecs import CODECS, Codec, register_codec
from src.lut.verification import verify_table
from src.model import ModelConfig
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.model.models import CONFIGS, MOLE, build

CODE = Path(__file__).parents[2] / "src" / "interop" / "remote_code"


def write_run(path: Path, config: ModelConfig, dtype: str = "float32") -> RunDirectory:
    """Write a run of random weights, with its table."""
    run = RunDirectory(path)
    path.mkdir()
    run.write_config({"name": path.name, "model": config.to_dict(), "trainer": {"max_steps": 1}})
    run.write_weights(build(config, torch.float32).state_dict())
    if config.architecture == "mole":
        build_lut(path, path / "lut", dtype=dtype)
    return run


def main(run: Path, output: Path, *more: str) -> None:
    export.main(["--run", str(run), "--to", "hf", "--output", str(output), *more])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_comes_back(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CONFIGS[name])
    main(run.path, tmp_path / "folder")
    convert.main(["--from", "hf", "--input", str(tmp_path / "folder"), "--output", str(tmp_path / "back")])
    back = RunDirectory(tmp_path / "back")
    default = {field: getattr(MOLE, field) for field in OF_TRAINING}
    plain = "auto_map" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    assert plain == (name in ("dense-llama", "dense-smollm", "dense-qwen2", "dense-qwen3"))
    assert back.model_config() == replace(run.model_config(), **default)
    assert back.identity() == run.identity()
    found, expected = load_file(back.backbone_path), load_file(run.backbone_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)
    for path in (run.path / "lut").glob("*"):
        assert (back.path / "lut" / path.name).read_bytes() == path.read_bytes()
    ids = torch.arange(13).unsqueeze(0)
    form = "lut" if run.model_config().architecture == "mole" else "ffn"
    with load_model(back.path) as one, load_model(run.path, experts=form) as other:
        assert torch.equal(one(ids), other(ids))


def test_the_folder_of_a_trained_run(trained: RunResult, tmp_path: Path) -> None:
    folder, run = tmp_path / "folder", RunDirectory(trained.run_dir)
    main(run.path, folder)
    code = {path.name for path in CODE.glob("*.py")}
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == {*code, *settings, "model.safetensors", "lut"}
    for path in (folder / "lut").iterdir():
        assert path.samefile(run.lut_path() / path.name)  # a link
    assert verify_table(folder / "lut") == []
    assert not (folder / "model.safetensors").samefile(run.backbone_path)  # saving a model would change the run
    assert (folder / "model.safetensors").read_bytes() == run.backbone_path.read_bytes()
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith(("lut", "experts"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mole"
    assert config["backbone"] == run.identity().backbone
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mole.MoleForCausalLM"
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    import_exported(folder, tmp_path / "back")
    back = RunDirectory(tmp_path / "back")
    assert back.tokenizer_path.read_text() == run.tokenizer_path.read_text()
    assert back.text_rule() == run.text_rule()
    prompt = torch.tensor([[5, 6, 7]])
    with load_model(back.path) as one, load_model(run.path) as other:
        found, expected = (generate(model, prompt, max_new_tokens=20) for model in (one, other))
    assert torch.equal(found, expected)


def test_the_card_states_what_the_record_has(trained: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(trained.run_dir)
    main(run.path, tmp_path / "folder")
    card, record = (tmp_path / "folder" / "README.md").read_text(), run.record()
    layout, score = read_manifest(run.lut_path()).layout, record["evaluation"]["lookup_form"]["texts"]["held_out"]
    assert f"reads {layout.row_bytes:,} bytes per distinct token id" in card
    assert f"| held_out | {score['loss']:,.4f} | {score['perplexity']:,.4f} | {score['bits_per_byte']:,.4f} |" in card
    assert f"trained for {record['steps']:,} steps on {record['trained_tokens']:,} tokens" in card
    assert f"{record['corpus']['sources'][0]['train']['documents']:,} documents" in card
    assert "rows of this table" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(program)
    assert "trust_remote_code=True" in program
    build_lut(run.path / "lut", tmp_path / "int8", dtype="int8")
    shutil.copytree(run.path, tmp_path / "copy")
    (tmp_path / "int8").rename(tmp_path / "copy" / "lut-int8")
    main(tmp_path / "copy", tmp_path / "small", "--lut", "lut-int8")
    other = (tmp_path / "small" / "README.md").read_text()
    assert "experts computed" in other and "rows in int8" in other
    bare = write_run(tmp_path / "bare", CONFIGS["dense"])
    main(bare.path, tmp_path / "dense")
    assert "has no record of it" in (tmp_path / "dense" / "README.md").read_text()


def test_convert_writes_the_same(trained: RunResult, tmp_path: Path) -> None:
    main(trained.run_dir, tmp_path / "same" / "folder")
    convert.main(["--to", "hf", "--input", str(trained.run_dir), "--output", str(tmp_path / "folder")])
    files = sorted(path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "same/folder") for path in (tmp_path / "same/folder").rglob("*"))
    for name in files:
        if (tmp_path / "folder" / name).is_file():
            assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "same" / "folder" / name).read_bytes()


def test_what_stands_before_a_text_is_what_the_run_puts_there(tmp_path: Path) -> None:
    """The template of a tokenizer that a run was trained with is not the run's rule; it comes back with the run."""
    from tokenizers import Tokenizer, processors

    own = train_bpe(iter(["words and words"] * 9), 270)
    own.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    template = json.loads(own.to_str())["post_processor"]
    for name, before in (("trained", []), ("imported", ["<|endoftext|>"])):
        run = write_run(tmp_path / name, replace(CONFIGS["mole"], vocab_size=280))
        own.save(str(run.tokenizer_path))
        rule = {"separator": "<|endoftext|>", "before": before, "after": ["<|endoftext|>"]}
        run.write_config(run.config_values(), rule)
        main(run.path, tmp_path / f"{name}-folder")
        written = Tokenizer.from_file(str(tmp_path / f"{name}-folder" / "tokenizer.json"))
        assert written.encode("words").ids == [0] * len(before) + own.encode("words").ids[1:-1]
        ids = json.loads((tmp_path / f"{name}-folder" / "generation_config.json").read_text())["suppress_tokens"]
        assert ids == list(range(own.get_vocab_size(), 280))
        import_exported(tmp_path / f"{name}-folder", tmp_path / f"{name}-back")
        back = RunDirectory(tmp_path / f"{name}-back")
        assert back.text_rule() == rule
        assert json.loads(back.tokenizer_path.read_text())["post_processor"] == template


def test_the_code_imports_nothing_of_this_project() -> None:
    modules: set[str] = set()
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.add((node.module or "").partition(".")[0])
    assert modules == {
        *("torch", "transformers", "huggingface_hub"),  # the last is part of transformers' installation
        *("collections", "hashlib", "json", "math", "os", "pathlib", "shutil", "typing", "zlib"),
    }
    assert set(PRECISIONS) == set(CODECS)


def test_mistakes_are_named_and_write_nothing(trained: RunResult, tmp_path: Path) -> None:
    def error(run: Path, *more: str, output: str = "out") -> str:
        with pytest.raises(ValueError) as caught:
            main(run, tmp_path / output, *more)
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
        return str(caught.value)

    (tmp_path / "there").mkdir()
    assert "there: exists already; choose another --output, or remove it" in error(trained.run_dir, output="there")
    assert "no such run directory" in error(tmp_path / "no-run")
    assert error(trained.run_dir, "--lut", "lut-x").startswith("--lut: ")
    run = write_run(tmp_path / "run", MOLE)
    shutil.rmtree(run.lut_path())
    assert "no such table; `python -m src.reparameterize --run RUN` builds one" in error(run.path)
    other = write_run(tmp_path / "other", MOLE)
    other.backbone_path.unlink()
    assert "backbone.safetensors: missing" in error(other.path)


def test_tables_of_other_weights_and_unknown_precisions_are_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", MOLE), write_run(tmp_path / "other", replace(MOLE, init_std=0.2))
    shutil.rmtree(one.lut_path())
    shutil.copytree(other.lut_path(), one.lut_path())
    with pytest.raises(LutMismatchError, match="was built for backbone"):
        export_huggingface(one.path, tmp_path / "folder")

    class Halves(Codec):
        def vector_bytes(self, hidden_size: int) -> int:
            return 2 * hidden_size

        def encode(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors.half().contiguous().view(torch.uint8)

        def decode(self, codes: torch.Tensor, hidden_size: int) -> torch.Tensor:
            return codes.contiguous().view(torch.float16).float()

    register_codec(Halves(name="halves", help="for a test", loss_limit=1.0))
    try:
        build_lut(other.path, other.lut_path("lut-halves"), dtype="halves")
        with pytest.raises(
            CheckpointError, match=r"lut-halves: holds rows in halves, but the exported code reads float"
        ):
            export_huggingface(other.path, tmp_path / "folder", lut="lut-halves")
    finally:
        del CODECS["halves"]
    assert not (tmp_path / "folder").exists()


def test_an_export_that_fails_leaves_nothing(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_paths: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / ".folder"))

    monkeypatch.setattr(Path, "hardlink_to", full)
    monkeypatch.setattr("src.system.files.copy_file", full)
    with pytest.raises(WriteError, match="folder: cannot be written"):
        main(trained.run_dir, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_tables_are_copied_where_there_are_no_links(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Path, _target: Path) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    main(trained.run_dir, tmp_path / "folder")
    assert verify_table(tmp_path / "folder" / "lut") == []
    assert not (tmp_path / "folder/lut/manifest.json").samefile(trained.run_dir / "lut" / "manifest.json")


def test_folders_that_cannot_be_read_back(trained: RunResult, tmp_path: Path) -> None:
    main(trained.run_dir, tmp_path / "folder")

    def error() -> str:
        with pytest.raises(ValueError) as caught:
            import_exported(tmp_path / "folder", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        return str(caught.value)

    config = tmp_path / "folder" / "config.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"num_experts": "four"}, "config.json: "),
        ({"intermediate_size": 64}, "its tensors are not those of its config.json; misshapen: blocks.0.shared_expert"),
        ({"vocab_size": 500}, "misshapen: "),
    ):
        config.write_text(json.dumps({**values, **change}))
        assert message in error()
    config.write_text(json.dumps(values))
    weights = tmp_path / "folder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "they were changed since they were exported" in error()
