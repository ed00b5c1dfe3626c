"""The verbs, as a user meets them: what they print, and one clear line with exit code 2 for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from src import convert, evaluate, generate, inspect_lut, prepare_data, reparameterize, train, verify
from src.benchmarks import build, data, decode, figure, gpu, lookup, loss, routing
from src.benchmarks import train as benchmark_train
from src.cli import run_verb
from src.data.tokenizer import fingerprint, load_tokenizer
from src.errors import LutError, RunError, UserError
from src.lut import LutStore, build_lut, read_manifest
from src.lut.scan import read_token_counts
from src.run_directory import RunDirectory
from src.train import RunResult
from tests.conftest import CONFIGS, open_files_limited

VERBS = ("train", "evaluate", "generate", "reparameterize", "verify")
ROOT = CONFIGS.parent


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def test_verbs_start_without_what_only_training_or_drawing_needs() -> None:
    verbs = ", ".join(f"src.{verb}" for verb in (*VERBS, "convert", "export", "inspect_lut", "prepare_data"))
    unwanted = ("lightning", "torchmetrics", "matplotlib", "wandb", "datasets", "lm_eval", "scipy")
    code = f"import sys, {verbs}; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["src.train", "trainer.max_step=1"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        (["src.train", "--config", "no.yaml"], "no.yaml: no such config file"),
        (["src.generate", "--run", "no-run", "--prompt", "x"], "no-run: no such run directory"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(arguments: list[str], message: str) -> None:
    done = run_python(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("options", [["trainer.devices=3"], ["trainer.devices=0,1", "data.global_batch_size=15"]])
def test_devices_that_cannot_share_a_batch_are_refused_before_any_work(options: list[str], tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache"]
    with pytest.raises(UserError, match=r"data\.global_batch_size: 1[56] windows cannot be shared equally by [23] dev"):
        train.main([*places, *options])
    assert list(tmp_path.iterdir()) == []


def test_training_says_where_a_device_takes_less_at_a_time_than_it_may(
    small_overrides: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["trainer.max_steps=1", "evaluation.at_fit_end=false", "evaluation.dashboard=false", "lut.at_fit_end=false"]
    for micro, is_told in ((3, True), (16, False)):
        train.main([*small_overrides, *short, f"data.micro_batch_size={micro}", f"output_dir={tmp_path}"])
        told = "data.micro_batch_size: 3 does not divide the 8 windows that each device takes in a step, so it takes 2"
        assert (told in capsys.readouterr().err) == is_told


def test_training_prints_nothing_of_lightnings_own_remarks(small_overrides: Sequence[str], tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "trainer.enable_progress_bar=false", "evaluation.at_fit_end=false"]
    done = run_python("src.train", *small_overrides, *short, f"output_dir={tmp_path}", "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "━" not in line and line.strip()] == []  # bars alone


def test_missing_arguments_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in ((generate.main, ["--run", "x"]), (evaluate.main, []), (verify.main, ["--rum", "x"])):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "--prompt --prompt-file" in capsys.readouterr().err


def test_generate_needs_only_config_tokenizer_backbone_and_table(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("config.yaml", "tokenizer.json", "backbone.safetensors"):
        shutil.copy(trained.run_dir / name, moved / name)
    shutil.copytree(trained.run_dir / "lut", moved / "lut")
    texts: list[str] = []
    for run, experts in ((trained.run_dir, "ffn"), (moved, "lut"), (moved, "auto")):
        for sampling in (["--temperature", "0"], ["--temperature", "0.8", "--seed", "3", "--top-p", "0.9"]):
            arguments = ["--run", str(run), "--experts", experts, "--prompt", "import os", "--max-new-tokens", "40"]
            generate.main([*arguments, *sampling])
            texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] == texts[4]
    assert texts[1] == texts[3] == texts[5]
    assert texts[0].startswith("import os")
    with pytest.raises(UserError, match=r"experts.safetensors: missing, so this run has no training form"):
        generate.main(["--run", str(moved), "--experts", "ffn", "--prompt", "x"])


def test_a_run_without_a_manifest_or_with_another_models_table_is_refused(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    manifest = run / "lut" / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest.json: missing, so the table is unfinished"):
        generate.main(["--run", str(run), "--experts", "lut", "--prompt", "x"])
    manifest.write_text(text)
    weights = RunDirectory(run)
    state = {**load_file(weights.backbone_path), **load_file(weights.experts_path)}
    state["norm.weight"] = state["norm.weight"] + 1
    weights.write_weights(state)
    with pytest.raises(UserError, match=r"was built for backbone [0-9a-f]+, but this run's is [0-9a-f]+; rebuild"):
        generate.main(["--run", str(run), "--experts", "lut", "--prompt", "x"])


def test_an_empty_prompt_is_refused(trained: RunResult) -> None:
    with pytest.raises(UserError, match="the prompt is empty"):
        generate.main(["--run", str(trained.run_dir), "--prompt", ""])


def test_evaluate_scores_both_forms_alike(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores: list[float] = []
    for experts in ("ffn", "lut"):
        evaluate.main(["--run", str(trained.run_dir), "--experts", experts, "--json", str(tmp_path / "score.json")])
        scores.append(json.loads((tmp_path / "score.json").read_text())["loss"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert trained.report is not None
    assert scores[0] == pytest.approx(trained.report.training_form.loss, abs=1e-6)
    assert "zlib -9" in capsys.readouterr().out


def test_verify_holds_and_finds_what_is_wrong(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    plot = tmp_path / "precisions.png"
    verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json"), "--plot", str(plot)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    checks = {check["name"]: check for check in json.loads((tmp_path / "proof.json").read_text())}
    assert all(check["holds"] is not False for check in checks.values())
    assert checks["logits through memmap"]["values"]["max_abs"] <= 5e-5
    assert checks["control: rows replaced by zeros"]["values"]["rise"] > 0
    assert checks["control: rows permuted over ids"]["values"]["rise"] > 0
    shard = run / "lut" / "rows-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json")])
    assert exit_.value.code == 1
    (check,) = json.loads((tmp_path / "proof.json").read_text())
    assert check["holds"] is False
    assert "token id" in check["found"]


def test_verify_without_a_training_form_proves_what_is_left(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    (run / "experts.safetensors").unlink()
    verify.main(["--run", str(run), "--json", str(tmp_path / "proof.json")])
    checks = json.loads((tmp_path / "proof.json").read_text())
    assert any(check["found"] == "the run holds no training form" for check in checks)
    assert any(check["name"] == "logits through pread" and check["holds"] for check in checks)


def test_reparameterize_builds_another_precision(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    reparameterize.main(["--run", str(run), "--dtype", "bfloat16", "--lut", "lut-bf16"])
    verify.main(["--run", str(run), "--lut", "lut-bf16", "--json", str(tmp_path / "proof.json")])
    with pytest.raises(UserError, match=r"lut-bf16: holds a finished table; choose another --lut name"):
        reparameterize.main(["--run", str(run), "--dtype", "float16", "--lut", "lut-bf16"])
    reparameterize.main(["--run", str(run), "--dtype", "float16", "--lut", "lut-bf16", "--overwrite"])


def test_a_table_is_recoded_without_the_training_form(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    reparameterize.main(["--run", str(run), "--dtype", "int8", "--lut", "direct"])
    (run / "experts.safetensors").unlink()
    with pytest.raises(UserError, match=r"experts.safetensors: missing, so this run holds no training form"):
        reparameterize.main(["--run", str(run), "--dtype", "int8", "--lut", "recoded"])
    recode = ["--run", str(run), "--from-lut", "lut", "--dtype", "int8", "--lut", "recoded"]
    reparameterize.main([*recode, "--dry-run"])
    assert "MiB of disk (fits" in capsys.readouterr().err
    assert not (run / "recoded").exists()
    reparameterize.main(recode)
    shard = "rows-00000.safetensors"
    assert (run / "recoded" / shard).read_bytes() == (run / "direct" / shard).read_bytes()
    with pytest.raises(UserError, match=r"lut-nf9: no such table"):
        reparameterize.main(["--run", str(run), "--from-lut", "lut-nf9", "--lut", "x"])


def test_a_checkpoint_becomes_a_run(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        shutil.copy(trained.run_dir / name, run / name)
    shutil.copytree(trained.run_dir / "checkpoints", run / "checkpoints")
    reparameterize.main(["--run", str(run), "--checkpoint", "last", "--dtype", "float32"])
    assert RunDirectory(run).identity() == RunDirectory(trained.run_dir).identity()
    shard = "lut/rows-00000.safetensors"
    assert (run / shard).read_bytes() == (trained.run_dir / shard).read_bytes()
    with pytest.raises(UserError, match=r"first: no such checkpoint; this run has best, last"):
        reparameterize.main(["--run", str(run), "--checkpoint", "first"])


def test_print_config_prints_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--print-config", "seed=7"])
    assert "seed: 7" in capsys.readouterr().out


def test_ids_outside_the_vocabulary_are_refused_by_name(trained: RunResult) -> None:
    with LutStore.open(trained.run_dir / "lut") as store:
        for bad in (-1, 512):
            with pytest.raises(IndexError, match=rf"token id {bad} is outside the table's vocabulary \[0, 512\)"):
                store.gather(torch.tensor([3, bad]))


def test_a_table_is_not_made_of_itself(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    before = (run / "lut" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="is the table that the rows come from; give the new one another --lut name"):
        reparameterize.main(["--run", str(run), "--from-lut", "lut", "--dtype", "int8", "--overwrite"])
    assert (run / "lut" / "manifest.json").read_bytes() == before


def test_a_table_that_training_left_unfinished_is_finished_as_it_was_begun(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    shutil.rmtree(run / "lut")
    counts = torch.from_numpy(read_token_counts(trained.run_dir / "lut", read_manifest(trained.run_dir / "lut")))
    identity = load_tokenizer(run / "tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr("src.lut.builder.encode_chunk", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_lut(run, run / "lut", dtype="float32", token_counts=counts, tokenizer=fingerprint(identity))
    reparameterize.main(["--run", str(run), "--resume", "--memory-mb", "1"])
    for path in sorted((trained.run_dir / "lut").iterdir()):
        assert (run / "lut" / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.setattr("src.lut.builder.prepare", _interrupted)
    reparameterize.main(["--run", str(run), "--resume"])  # finds nothing to do


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_no_room_for_a_new_table_leaves_the_old_one(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)

    def full(*_: object) -> None:
        raise LutError("the table needs more bytes than are free")

    monkeypatch.setattr("src.lut.builder.require_space", full)
    with pytest.raises(LutError, match="more bytes than are free"):
        reparameterize.main(["--run", str(run), "--dtype", "float32", "--overwrite"])
    with LutStore.open(run / "lut") as store:
        store.gather(torch.arange(4))


def test_a_table_that_cannot_be_opened_leaves_no_file_open(trained: RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    (run / "lut" / "token_counts.safetensors").write_bytes(b"damaged")
    open_files = psutil.Process().num_fds()
    with pytest.raises(LutError, match=r"token_counts.safetensors: missing or not what the manifest lists"):
        LutStore.open(run / "lut", cache_mb=1)
    assert psutil.Process().num_fds() <= open_files
    reparameterize.main(["--run", str(run), "--dtype", "float32", "--overwrite"])  # which does not trust them either
    LutStore.open(run / "lut", cache_mb=1).close()


def test_lengths_out_of_range_are_refused(trained: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--run", str(trained.run_dir), "--prompt", "x", "--max-new-tokens", "0"])
    assert "argument --max-new-tokens: '0', but it must be a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "flag", "values"),
    [
        ("generate", "--seed", ("-9223372036854775809", "9223372036854775808", "1.5", "9" * 5000)),
        ("generate", "--temperature", ("nan", "inf", "-1", "1e39")),
        ("generate", "--top-p", ("nan", "-inf", "2")),
        ("generate", "--top-k", ("0", "-1", "x")),
        ("generate", "--cache-mb", ("nan", "inf", "-1", "1e400")),
        ("evaluate", "--limit", ("0", "-3", "")),
        ("evaluate", "--batch-size", ("0", "1e3")),
        ("reparameterize", "--memory-mb", ("0", "1" * 30)),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_work(
    verb: str, flag: str, values: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mains = {"generate": generate.main, "evaluate": evaluate.main, "reparameterize": reparameterize.main}
    needed = ["--prompt", "x"] if verb == "generate" else []
    for value in values:
        with pytest.raises(SystemExit) as exit_:
            mains[verb](["--run", "no-run", *needed, f"{flag}={value}"])
        assert exit_.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {flag}: " in last
        assert "but it must be a" in last


def unwritable(tmp_path: Path) -> Sequence[str]:
    """Directories that cannot be made or take no files, also for root."""
    (tmp_path / "file").write_text("not a directory")
    return (f"{tmp_path}/file", f"{tmp_path}/file/runs", f"{tmp_path}/{'x' * 300}", "/proc/runs")


@pytest.mark.parametrize("key", ["output_dir", "data.cache_dir"])
def test_a_directory_of_the_config_that_cannot_be_written_is_named_by_its_key(
    key: str, tmp_path: Path, small_overrides: Sequence[str]
) -> None:
    for place in unwritable(tmp_path):
        others = [f"output_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", f"{key}={place}"]
        with pytest.raises(UserError, match=rf"^{key}: .* (cannot be written \(.*\); name another place$|is no path)"):
            train.main([*small_overrides, *others])
        assert not any((tmp_path / name).exists() for name in ("cache", "runs/quickstart"))
        if key == "data.cache_dir":
            config = ["--config", str(CONFIGS / "quickstart.yaml")]
            with pytest.raises(UserError, match=rf"^{key}: .* (cannot be written|is no path)"):
                prepare_data.main([*config, *small_overrides, f"{key}={place}"])


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_named_by_its_flag_before_any_work(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mains: dict[str, Callable[[Sequence[str]], None]] = {"evaluate": evaluate.main, "verify": verify.main}
    for verb, main in mains.items() if flag == "--json" else [("verify", verify.main)]:
        for place in ("", str(tmp_path), *(f"{each}/score.json" for each in unwritable(tmp_path)), "a\0b"):
            with pytest.raises(SystemExit) as exit_:
                main(["--run", "no-run", f"{flag}={place}"])
            assert exit_.value.code == 2, verb
            assert f"argument {flag}: " in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_named_by_its_flag(trained: RunResult, tmp_path: Path) -> None:
    for place in (unwritable(tmp_path)[1], "/proc/runs"):
        with pytest.raises(UserError, match=r"^--output: .* cannot be written"):
            convert.main(["--to", "official", "--input", str(trained.run_dir), "--output", place])


def test_a_table_that_cannot_be_written_is_named_by_its_flag_before_any_work(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained.run_dir, run, symlinks=True)
    (run / "backbone.safetensors").unlink()
    before = sorted(run.rglob("*"))
    for place in unwritable(tmp_path):
        for more in ([], ["--checkpoint", "last"], ["--from-lut", "lut"]):
            with pytest.raises((UserError, SystemExit)) as refused:
                reparameterize.main(["--run", str(run), "--lut", place, *more])
            said = f"{refused.value} {capsys.readouterr().err}"
            assert re.search(r"--lut: .*( cannot be written|is no path)", said), said
    assert sorted(run.rglob("*")) == before


def test_what_is_no_checkpoint_is_named(trained: RunResult, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a checkpoint")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "of-nothing")
    torch.save([1, 2], tmp_path / "a-list")
    checkpoint = trained.run_dir / "checkpoints" / "last.ckpt"
    (tmp_path / "cut").write_bytes(checkpoint.read_bytes()[:100_000])
    for name in ("text", "empty", "of-nothing", "a-list", "cut"):
        with pytest.raises(
            RunError, match=rf"{name}: (not a readable checkpoint \(.+\)|holds no weights of a model); "
        ):
            reparameterize.main(["--run", str(trained.run_dir), "--checkpoint", str(tmp_path / name), "--lut", "new"])
    with pytest.raises(SystemExit, match="2"):
        reparameterize.main(["--run", str(trained.run_dir), "--checkpoint", "", "--lut", "new"])
    for name in ("nowhere", str(tmp_path / "folder")):
        with pytest.raises(RunError, match=rf"^--checkpoint {name}: no such checkpoint; this run has best, la"):
            reparameterize.main(["--run", str(trained.run_dir), "--checkpoint", name, "--lut", "new"])
    assert not (trained.run_dir / "new").exists()


def test_outputs_of_benchmarks_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {build: ("--json", "--directory"), data: ("--json", "--directory"), loss: ("--output",)}
    flags |= {lookup: ("--output", "--directory"), decode: ("--output",), figure: ("--output",), routing: ("--output",)}
    flags[gpu] = ("--output", "--directory")
    for verb, names in {**flags, benchmark_train: ("--json", "--plot", "--cache-dir")}.items():
        for name in names:
            for place in unwritable(tmp_path)[1:]:
                with pytest.raises(SystemExit) as exit_:
                    verb.main([name, place if name in ("--directory", "--cache-dir") else f"{place}/file"])
                assert exit_.value.code == 2
                assert f"argument {name}: " in capsys.readouterr().err.splitlines()[-1]


BYTES_THAT_ARE_NO_TEXT = os.fsdecode(b"caf\xe9")


def test_a_prompt_that_is_not_utf8_is_one_line(trained: RunResult, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9")
    for source in (["--prompt", BYTES_THAT_ARE_NO_TEXT], ["--prompt-file", str(file)]):
        with pytest.raises(UserError, match=rf"^{source[0]}.*UTF-8"):
            generate.main(["--run", str(trained.run_dir), *source])
    with pytest.raises(UserError, match=r"^--token: .*caf\\\\udce9.* is not UTF-8 text"):
        inspect_lut.main(["--run", str(trained.run_dir), "--token", BYTES_THAT_ARE_NO_TEXT])


def test_an_interactive_session_survives_a_line_that_is_not_utf8(trained: RunResult) -> None:
    command = [sys.executable, "-m", "src.generate", "--run", str(trained.run_dir), "--interactive"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "2"], cwd=ROOT, input=b"caf\xe9\nimport os\n", capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"error: prompt: " in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"import os")


@pytest.mark.parametrize("arguments", [["src.train", "--print-config"], ["src.generate", "--help"]])
def test_a_closed_pipe_ends_a_verb_silently(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode in (0, 141)  # 0 where all of the text fits the buffer


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfimport os")
    generate.main(["--run", str(trained.run_dir), "--prompt-file", str(file), "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith("import os")


@pytest.mark.parametrize("device", ["gpu0", "meta", pytest.param("cuda:99"), "cpu,cuda", ""])
def test_a_device_that_cannot_be_used_is_named_before_any_work(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    needs = {generate: ["--prompt", "x"], evaluate: [], reparameterize: [], verify: [], inspect_lut: ["--token", "x"]}
    for verb, more in needs.items():
        with pytest.raises(SystemExit) as left:
            verb.main(["--run", "no-run", "--device", device, *more])
        assert left.value.code == 2
        assert f"argument --device: {device!r} cannot be used (" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a" * 256, "runs/" + "ü" * 200, "a\0b"])
def test_what_no_system_takes_for_a_path_is_one_line(
    path: str, trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run", str(trained.run_dir)]
    for verb, arguments in (
        (generate, ["--run", path, "--prompt", "x"]),
        (generate, [*run, "--lut", path, "--experts", "lut", "--prompt", "x"]),
        (generate, [*run, "--prompt-file", path]),
        (reparameterize, [*run, "--from-lut", path, "--lut", "other"]),
        (reparameterize, [*run, "--checkpoint", path]),
        (verify, ["--run", path]),
        (convert, ["--from", "official", "--input", path, "--output", str(tmp_path / "out")]),
        (train, ["--config", path]),
        (train, ["--resume", path]),
    ):
        with pytest.raises((UserError, SystemExit)) as left:
            verb.main(arguments)
        assert (
            "is no path: it holds a NUL, or a name of more than 255 bytes" in str(left.value) + capsys.readouterr().err
        )


@pytest.mark.parametrize("verb", ["generate", "inspect_lut", "prepare_data"])
def test_too_many_open_files_are_one_line_that_names_the_limit(
    verb: str, trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    run = f"--run={trained.run_dir}"
    verbs: dict[str, Callable[[], None]] = {
        "generate": lambda: generate.main([run, "--prompt", "import", "--max-new-tokens", "2"]),
        "inspect_lut": lambda: inspect_lut.main(["--run", str(trained.run_dir), "--token", "a"]),
        "prepare_data": lambda: prepare_data.main(
            [
                "--config",
                str(CONFIGS / "quickstart.yaml"),
                f"data.files={tmp_path}/text.txt",
                f"data.cache_dir={tmp_path}/cache",
                "data.tokenizer.vocab_size=300",
            ]
        ),
    }
    lines: list[str] = []
    for spare in range(0, 45, 3):
        try:
            with open_files_limited(spare):
                run_verb(verbs[verb])
            break
        except SystemExit as exit_:
            assert exit_.code == 2
            lines += capsys.readouterr().err.splitlines()[-1:]
    assert lines
    for line in lines:
        assert line.startswith("error: ")
        assert "ulimit -n" in line
