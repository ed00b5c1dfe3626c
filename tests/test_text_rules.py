"""Every verb encodes text by the rule of the run: trained here, imported, or made before runs recorded one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from src import convert, evaluate, generate, inspect_lut
from src.config import load_run_config
from src.data.text_rule import SEPARATORS
from src.data.tokenizer import load_run_rule, num_ids, train_bpe
from src.evaluation.held_out import held_out_of_run
from src.evaluation.likelihood import Request, TextModel
from src.inference import generate as continue_ids
from src.inference import load_model
from src.run_directory import RunDirectory
from src.train import RunResult, resumed_config, train
from tests.conftest import small_config
from tests.data.corpora import sentences
from tests.interop.checkpoints import copy_golden


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<s>", "</s>")])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_overrides: Sequence[str]) -> RunDirectory:
    """A run whose separator is no special token, and whose tokenizer has a template that training never used."""
    folder = tmp_path_factory.mktemp("runs")
    with_template(train_bpe(iter(sentences(50)), 300, "[PAD]")).save(str(folder / "tokenizer.json"))
    more = (
        "trainer.max_steps=2",
        "data.document_mask=true",
        "evaluation.sample_temperature=0",
        "checkpoint.every_steps=1",
    )
    path = f"data.tokenizer.path={folder}/tokenizer.json"
    return RunDirectory(train(small_config(small_overrides, folder, path, *more)).run_dir)


def rule_of(run: RunDirectory) -> Any:
    return load_run_rule(run.tokenizer_path, run.recorded_tokenizers(), run.text_rule())


def continuation(run: RunDirectory, ids: Sequence[int], new_tokens: int) -> str:
    rule = rule_of(run)
    with load_model(run.path, experts="ffn") as model:
        found = continue_ids(
            model,
            torch.tensor([ids]),
            max_new_tokens=new_tokens,
            stop_ids=[rule.separator],
            num_ids=num_ids(rule.tokenizer),
        )
    return rule.plain.decode(found[0].tolist())


def test_a_run_records_its_rule_and_all_its_text_follows_it(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {"separator": "</s>", "before": [], "after": ["</s>"]}
    assert yaml.safe_load(run.config_path.read_text())["text_rule"] == expected
    assert run.record()["corpus"]["text_rule"] == expected
    rule = rule_of(run)
    text, _ = held_out_of_run(run, load_run_config(run).data)
    assert text.document_separator == rule.separator == rule.tokenizer.token_to_id("</s>")
    assert rule.tokenizer.token_to_id("<s>") not in text.windows
    assert text.byte_lengths[rule.separator] == 0
    assert "</s>" not in text.text
    plain = rule.plain.encode("def ").ids
    assert rule.prompt("def ") == plain != rule.tokenizer.encode("def ").ids
    moved = tmp_path / "moved"  # the four things that inference needs
    moved.mkdir()
    for name in ("config.yaml", "tokenizer.json", "backbone.safetensors"):
        shutil.copy(run.path / name, moved)
    shutil.copytree(run.path / "lut", moved / "lut")
    for place in (run.path, moved):
        generate.main(["--run", str(place), "--prompt", "def ", "--max-new-tokens", "16"])
        assert capsys.readouterr().out.removesuffix("\n") == continuation(run, plain, 16) == run.record()["sample"]


def test_a_separator_in_a_prompt_or_a_scored_text_is_text(run: RunDirectory, tmp_path: Path) -> None:
    rule = rule_of(run)
    with load_model(run.path, experts="ffn") as model:
        texts = TextModel(model, rule, max_length=128)
        request = texts.encode_pair("a </s> b", " </s>")
        assert rule.separator not in (*request.context, *request.continuation)
        assert texts.encode_pair("", "a") == Request([rule.separator], rule.encode("a"))
    (tmp_path / "a.txt").write_text("x </s><|endoftext|> y " * 40)
    evaluate.main(["--run", str(run.path), "--corpus", f"a={tmp_path}/a.txt", "--tasks", ""])
    inspect_lut.main(["--run", str(run.path), "--token", "</s>"])


def test_generation_ends_at_the_separator(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    rule = rule_of(run)
    sampling = generate._sampling(0.0, None, None, 0, 300)
    with load_model(run.path, experts="ffn") as model, torch.inference_mode():
        last = model.hidden_states(torch.tensor([rule.prompt("def ")]))[0, -1]
        model.head.weight.zero_()
        model.head.weight[rule.separator] = last
        generate.print_continuation(model, rule, 9, sampling, False, "def ")
    assert capsys.readouterr().out == "def \n"


def test_a_run_is_resumed_with_its_rule(run: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / run.path.name)
    shutil.copytree(run.path, copy.path)
    rule = dict(run.text_rule() or {})
    values = yaml.safe_load(copy.config_path.read_text())
    del values["text_rule"]
    values["output_dir"] = str(tmp_path)
    copy.config_path.write_text(yaml.safe_dump(values))  # as it was before runs recorded their rule
    assert copy.text_rule() == {}
    train(resumed_config(copy, None, ["trainer.max_steps=3", "trainer.max_time=null"]), copy)
    assert copy.text_rule() == rule


def test_a_run_without_a_record_encodes_as_before(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "import <|endoftext|>", "--max-new-tokens", "12"]
    generate.main(["--run", str(trained.run_dir), *arguments])
    shutil.copytree(trained.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    assert values.pop("text_rule") == {"separator": SEPARATORS[0], "before": [], "after": [SEPARATORS[0]]}
    path.write_text(yaml.safe_dump(values))
    generate.main(["--run", str(tmp_path / "run"), *arguments])
    first, second = capsys.readouterr().out.split("import <|endoftext|>")[1:]
    assert first == second


@pytest.mark.parametrize("recorded", [True, False])
def test_an_import_follows_its_template(recorded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = copy_golden("dense", tmp_path / "official")
    characters = {character: number for number, character in enumerate("</>abcs ")}
    tokenizer = with_template(Tokenizer(models.BPE(characters, [])))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "words.json"))
    given = ["--input", str(checkpoint), "--output", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "words.json")]
    convert.main(["--from", "official", *given])
    run = RunDirectory(tmp_path / "run")
    assert run.text_rule() == {"separator": "</s>", "before": ["<s>"], "after": ["</s>"]}
    if not recorded:
        values = yaml.safe_load(run.config_path.read_text())
        del values["text_rule"]
        run.config_path.write_text(yaml.safe_dump(values))
    rule = rule_of(run)
    start, end = (rule.tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
    assert [*rule.document("ab")] == [start, *rule.encode("ab"), end]
    assert rule.prompt("<s>ab</s>").count(start) == 1
    generate.main(["--run", str(run.path), "--prompt", "ab", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.removesuffix("\n") == continuation(run, [start, *rule.encode("ab")], 4)
    with load_model(run.path) as model:
        assert TextModel(model, rule, max_length=8).encode_pair("", "a") == Request((start,), rule.encode("a"))
