"""What verbs do with arguments, text and places that are not as they should be: one line, before any work."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from src import convert, evaluate, generate, inspect_lut, prepare_data, reparameterize, train, verify
from src.benchmarks import build, data, decode, figure, gpu, lookup, loss, routing
from src.benchmarks import train as benchmark_train
from src.cli import run_verb
from src.errors import RunError, UserError
from src.train import RunResult
from tests.conftest import CONFIGS, open_files_limited

ROOT = CONFIGS.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["src.train", "trainer.max_step=1"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        (["src.train", "--config", "no.yaml"], "no.yaml: no such config file"),
        (["src.generate", "--run", "no-run", "--prompt", "x"], "no-run: no such run directory"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
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


def test_missing_arguments_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in ((generate.main, ["--run", "x"]), (evaluate.main, []), (verify.main, ["--rum", "x"])):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "--prompt --prompt-file" in capsys.readouterr().err


def test_print_config_prints_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--print-config", "seed=7"])
    assert "seed: 7" in capsys.readouterr().out


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
