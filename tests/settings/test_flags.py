"""Every flag of every verb gets values of every kind; whether each is taken or refused is written here."""

import argparse
import importlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from src.train import RunResult
from tests.conftest import CONFIGS
from tests.settings.verdicts import (
    HUGE,
    LARGEST,
    LM_EVAL_WORDS,
    TEXTS,
    RunVerb,
    Verdicts,
    choice,
    number,
    require_refused,
    whole,
)

Main = Callable[[Sequence[str] | None], None]
Parse = Callable[[str, Sequence[str] | None], tuple[argparse.ArgumentParser, argparse.Namespace]]
ROOT = CONFIGS.parent
MOST = str(2**31 - 1)
SWITCH, NOTHING = choice(""), choice("")
"""A switch takes no value, and there is nothing that `NOTHING` of the tried values could name."""
PATH = Verdicts({text: Path(text) for text in TEXTS}, ["x" * 256, "/proc/x/y"])
NAME = Verdicts({text: text for text in TEXTS}, [".", "..", "../x", "x" * 256])
TEXT = Verdicts({text: text for text in (*TEXTS, "a\0")})
COUNT = whole(f"1 {MOST}", str(2**31))
DTYPE = choice("float32 bfloat16 float16 int8 nf4 nf3", "int2")
READER = choice("auto memmap memory pread", "mmap")
SHAPE = choice("small-4e 160m-16e", "small 4e")
DEVICE = choice("cpu", "meta cuda:99 cpu,cuda")
TRAINED = "TRAINED"
"""Stands for the path of a run."""

FORM = {
    "--run": NOTHING,
    "--base": NOTHING,
    "--attach": NOTHING,
    "--lut": NOTHING,
    "--experts": choice("auto lut ffn"),
    "--reader": READER,
    "--device": DEVICE,
}
BENCHMARK_TEXT = {"--corpus": NOTHING, "--tokenizer": NOTHING, "--output": PATH}
BENCHMARK = {**BENCHMARK_TEXT, "--shape": SHAPE, "--dtype": DTYPE, "--directory": PATH}
BUDGET = whole("257 2147483647", "256 2147483648")

FLAGS: dict[str, tuple[str, dict[str, Verdicts]]] = {
    "train": (
        f"--dry-run --config {CONFIGS}/quickstart.yaml",
        {
            "--config": NOTHING,
            "--resume": NOTHING,
            "--print-config": SWITCH,
            "--dry-run": SWITCH,
            "--unique-ids": whole("1 4096", "4097"),
            "--json": PATH,
        },
    ),
    "prepare_data": (f"--config {CONFIGS}/quickstart.yaml", {"--config": NOTHING, "--json": PATH}),
    "generate": (
        f"--run {TRAINED} --prompt x --max-new-tokens 1",
        {
            **FORM,
            "--prompt": TEXT,
            "--prompt-file": NOTHING,
            "--interactive": SWITCH,
            "--max-new-tokens": whole(f"1 {LARGEST}"),
            "--temperature": number(f"0 1 1.5 {LARGEST} {HUGE}"),
            "--top-k": whole(f"1 {LARGEST}"),
            "--top-p": number("1 0.5", "1.1"),
            "--seed": whole(f"-1 0 1 {LARGEST}"),
            "--window": SWITCH,
            "--cache-mb": number("0 1 1.5", LARGEST),
        },
    ),
    "evaluate": (
        f"--run {TRAINED}",
        {
            **FORM,
            "--tasks": Verdicts(
                {"": [], "next_passage": ["next_passage"]}, ["next_passage,next_pasage"], LM_EVAL_WORDS
            ),
            "--num-fewshot": whole(f"0 1 {LARGEST}"),
            "--local-data": NOTHING,
            "--limit": whole(f"1 {LARGEST}"),
            "--batch-size": whole(f"1 {LARGEST}"),
            "--corpus": choice("", "=x a= a=no-file held_out=x"),
            "--compare": choice("lut ffn"),
            "--json": PATH,
        },
    ),
    "study": (
        f"--study {CONFIGS}/studies/family-code/study.yaml --dry-run",
        {
            "--study": NOTHING,
            "--arms": Verdicts({"": [], "dense,mole-4e": ["dense", "mole-4e"]}, ["dense,x"]),
            "--seeds": Verdicts({"0": [0], "1": [1], "": [], "0,2": [0, 2]}, ["0,x", "3"]),
            "--jobs": whole("1 1024", "1025"),
            "--dry-run": SWITCH,
            "--rerun": SWITCH,
            "--report": SWITCH,
        },
    ),
    "verify": (
        f"--run {TRAINED}",
        {"--run": NOTHING, "--base": NOTHING, "--lut": NOTHING, "--device": DEVICE, "--json": PATH, "--plot": PATH},
    ),
    "reparameterize": (
        f"--run {TRAINED} --lut other --dry-run",
        {
            "--run": NOTHING,
            "--base": NOTHING,
            "--lut": NAME,
            "--checkpoint": choice("last best", "config.yaml"),
            "--from-lut": choice("lut"),
            "--dtype": choice("float32 bfloat16 float16 int8 nf4", "int2 nf3"),
            "--compute-dtype": choice("float32 bfloat16", "float8"),
            "--device": DEVICE,
            "--memory-mb": whole("1", LARGEST),
            "--resume": SWITCH,
            "--overwrite": SWITCH,
            "--dry-run": SWITCH,
        },
    ),
    "inspect_lut": (
        f"--run {TRAINED} --token e",
        {
            "--run": NOTHING,
            "--base": NOTHING,
            "--lut": NOTHING,
            "--device": DEVICE,
            "--token": choice("0 1 e"),
            "--layer": whole("0 1", "2"),
            "--neighbors": whole(f"1 {LARGEST}"),
            "--json": PATH,
        },
    ),
    "convert": (
        f"--to official --input {TRAINED} --output out",
        {
            "--from": choice(""),
            "--to": choice("official hf"),
            "--input": NOTHING,
            "--output": PATH,
            "--top-k": whole(""),
            "--tokenizer": NOTHING,
            "--lut": NAME,
        },
    ),
    "export": (
        f"--run {TRAINED} --to hf --output out",
        {
            "--run": NOTHING,
            "--base": NOTHING,
            "--lut": NOTHING,
            "--to": choice("official hf"),
            "--output": PATH,
            "--plug-in-only": SWITCH,
        },
    ),
    "benchmarks.build": (
        "",
        {
            "--shape": SHAPE,
            "--layers": whole("1 4096", "4097"),
            "--dtype": DTYPE,
            "--compute-dtype": choice("float32 bfloat16", "float8"),
            "--from": choice("run model", "table"),
            "--directory": PATH,
            "--json": PATH,
        },
    ),
    "benchmarks.data": (
        f"--config {CONFIGS}/quickstart.yaml",
        {
            "--megabytes": COUNT,
            "--raw-megabytes": COUNT,
            "--files": NOTHING,
            "--tokenizer": NOTHING,
            "--vocab-size": BUDGET,
            "--config": NOTHING,
            "--directory": PATH,
            "--json": PATH,
        },
    ),
    "benchmarks.decode": (
        "",
        {
            **BENCHMARK,
            "--batches": COUNT,
            "--rounds": COUNT,
            "--prefill-rounds": COUNT,
            "--routing": NOTHING,
            "--reader": READER,
        },
    ),
    "benchmarks.imported": (
        f"--folder {TRAINED} --run {TRAINED}",
        {**BENCHMARK_TEXT, "--folder": NOTHING, "--run": NOTHING, "--batches": COUNT, "--rounds": COUNT},
    ),
    "benchmarks.lora": ("--rank 1", {"--rank": COUNT}),
    "benchmarks.plugin": (
        f"--base {TRAINED} --no-training",
        {
            **BENCHMARK_TEXT,
            "--base": NOTHING,
            "--attach": NOTHING,
            "--batches": COUNT,
            "--rounds": COUNT,
            "--decode-rounds": COUNT,
            "--no-training": SWITCH,
        },
    ),
    "benchmarks.figure": (
        "",
        {
            **BENCHMARK_TEXT,
            "--shape": SHAPE,
            "--batches": COUNT,
            "--rounds": COUNT,
            "--directory": PATH,
            "--routing": NOTHING,
            "--draw": SWITCH,
        },
    ),
    "benchmarks.routing": (f"--run {TRAINED}", {"--run": NOTHING, "--tokens": COUNT, "--output": PATH}),
    "benchmarks.gpu": (
        "--device cpu",
        {
            **BENCHMARK_TEXT,
            "--minutes": number("1 1.5 0.01", "1441"),
            "--shape": choice("small 160m", "small-4e"),
            "--layers": whole("1 4096", "4097"),
            "--experts": COUNT,
            "--windows": COUNT,
            "--sequence-length": COUNT,
            "--batches": COUNT,
            "--directory": PATH,
            "--device": DEVICE,
        },
    ),
    "benchmarks.lookup": ("", {**BENCHMARK, "--rounds": COUNT, "--reader": READER}),
    "benchmarks.loss": (
        "",
        {**BENCHMARK_TEXT, "--tokens": COUNT, "--hidden-size": COUNT, "--vocab-size": BUDGET, "--rounds": COUNT},
    ),
    "benchmarks.train": (
        "",
        {
            "--shape": choice("small 160m", "small-4e"),
            "--layers": whole("1 4096", "4097"),
            "--experts": COUNT,
            "--windows": COUNT,
            "--sequence-length": COUNT,
            "--rounds": COUNT,
            "--files": NOTHING,
            "--tokenizer": NOTHING,
            "--vocab-size": BUDGET,
            "--cache-dir": PATH,
            "--device": DEVICE,
            "--json": PATH,
            "--plot": PATH,
        },
    ),
}


def main_of(verb: str) -> Main:
    return importlib.import_module(f"src.{verb}").main


class ParsedError(Exception):
    """Carries a parser, and what it made of the arguments, out of a verb before its work."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Return a verb's parser, and what it makes of arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, given: Sequence[str] | None) -> None:
        raise ParsedError(self, parse_args(self, given) if given is not None else argparse.Namespace())

    def parsed(verb: str, arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
        with monkeypatch.context() as patch, pytest.raises(ParsedError) as left:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            main_of(verb)(arguments)
        return left.value.args[0], left.value.args[1]

    return parsed


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the parser's flags."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    return {name: action for name, action in actions.items() if name not in ("-h", "--help")}


def test_every_verb_is_here() -> None:
    modules = [*(ROOT / "src").glob("*.py"), *(ROOT / "src" / "benchmarks").glob("*.py")]
    verbs = {path.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".") for path in modules}
    ours = {verb for verb in verbs if "run_verb(main)" in (ROOT / "src" / f"{verb.replace('.', '/')}.py").read_text()}
    assert ours - {"cli"} == set(FLAGS), "write in FLAGS of this file which values its flags take"


@pytest.mark.parametrize("verb", FLAGS)
def test_every_flag_has_verdicts(verb: str, parse: Parse) -> None:
    options = options_of(parse(verb, None)[0])
    hint = f"write in FLAGS of this file which values a flag of {verb} takes, and which it refuses"
    assert set(options) == set(FLAGS[verb][1]), hint


def arguments_with(verb: str, flag: str, run: Path) -> list[str]:
    """Return what a verb needs besides a flag."""
    words = FLAGS[verb][0].replace(TRAINED, str(run)).split()
    instead = {"--prompt-file": "--prompt", "--interactive": "--prompt", "--from": "--to"}
    for replaced in (flag, instead.get(flag, flag) if verb in ("generate", "convert") else flag):
        if replaced in words:
            at = words.index(replaced)
            del words[at : at + (1 if replaced == "--dry-run" else 2)]
    return words


def state_of(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in directory.rglob("*"))


@pytest.mark.parametrize("verb", FLAGS)
def test_a_flag_refuses_in_one_line_before_any_work(
    verb: str, trained: RunResult, untouched: Path, run_in_process: RunVerb
) -> None:
    before = state_of(trained.run_dir)
    for flag, verdicts in FLAGS[verb][1].items():
        needed = arguments_with(verb, flag, trained.run_dir)
        for value in verdicts.all_refused:
            require_refused(run_in_process(main_of(verb), *needed, f"{flag}={value}"), flag, f"{flag}={value}")
            assert not list(untouched.iterdir()), f"{flag}={value}"
    assert state_of(trained.run_dir) == before


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("verb", FLAGS)
def test_a_flag_keeps_an_accepted_value(verb: str, trained: RunResult, parse: Parse) -> None:
    options = options_of(parse(verb, None)[0])
    for flag, verdicts in FLAGS[verb][1].items():
        needed, option = arguments_with(verb, flag, trained.run_dir), options[flag]
        for value, expected in verdicts.accepted.items():
            found = getattr(parse(verb, [*needed, f"{flag}={value}"])[1], option.dest)
            assert found == (expected if option.nargs is None else [expected]), f"{flag}={value}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", [verb for verb in FLAGS if "." not in verb and verb not in ("verify", "study")]
)  # minutes
def test_a_verb_does_its_work_with_an_accepted_value(
    verb: str, trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_in_process: RunVerb
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    small = ["data.files=run/config.yaml", "data.cache_dir=cache", "data.tokenizer.vocab_size=300"]
    for flag, verdicts in FLAGS[verb][1].items():
        accepted = list(verdicts.accepted)
        for value in dict.fromkeys([*accepted[:1], *accepted[-1:]]):  # such as the smallest and the largest
            more = small if verb == "prepare_data" else []
            shutil.rmtree("out", ignore_errors=True)
            found = run_in_process(main_of(verb), *arguments_with(verb, flag, run), f"{flag}={value}", *more)
            assert found.code == 0, (flag, value, found)
            if flag in ("--json", "--plot"):
                Path(value).unlink()


@pytest.mark.slow
def test_a_task_that_lm_eval_does_not_have_is_refused_in_one_line(trained: RunResult, run_in_process: RunVerb) -> None:
    for task in ("word", "true"):
        found = run_in_process(main_of("evaluate"), "--run", str(trained.run_dir), f"--tasks={task}")
        require_refused(found, "--tasks", task)
