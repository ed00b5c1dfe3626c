"""A run directory holds what its verbs need: they work, and score the same text, without the corpus."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from src import evaluate, generate, inspect_lut, reparameterize, verify
from src.config import load_config, load_run_config
from src.errors import RunError
from src.evaluation.held_out import HeldOut, held_out_of_run
from src.inference import load_model
from src.lut import read_manifest
from src.lut.scan import read_token_counts
from src.run_directory import RunDirectory
from src.train import RunResult, resumed_config, train
from tests.conftest import CONFIGS, SMALL, STDLIB, small_config
from tests.data.corpora import json_lines


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of two sources and a further text, with documents kept apart; its corpus and its cache are gone."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name in ("json", "email", "http"):  # documents so short that windows hold several
        lines = [line for path in sorted((STDLIB / name).glob("*.py")) for line in path.read_text().splitlines(True)]
        texts = ["".join(lines[first : first + 4]) for first in range(0, len(lines), 4)]
        (root / f"{name}.jsonl").write_bytes(json_lines(texts))
    sources = ",".join(f"{{name: {name}, files: ['{root}/{name}.jsonl']}}" for name in ("email", "http"))
    overrides = (
        *SMALL,
        f"data.sources=[{sources}]",
        f"data.cache_dir={root}/cache",
        "data.document_mask=true",
        f"evaluation.corpora=[{{name: parsers, files: ['{root}/json.jsonl'], windows: 8}}]",
        "trainer.precision=32-true",
        "trainer.max_steps=60",
    )
    result = train(small_config(overrides, root / "runs"))
    run = RunDirectory(tmp_path_factory.mktemp("here") / "run")
    shutil.move(result.run_dir, run.path)
    shutil.rmtree(root)
    return run


def text_of(run: RunDirectory) -> HeldOut:
    text, note = held_out_of_run(run, load_run_config(run).data)
    assert note is None
    return text


def test_scores_without_the_corpus_are_those_of_the_report(
    moved: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "scores.json"
    evaluate.main(["--run", str(moved.path), "--experts", "ffn", "--compare", "lut", "--json", str(found)])
    scores, report = json.loads(found.read_text()), moved.record()["evaluation"]
    assert set(scores["texts"]) == {"held_out", "held_out/email", "held_out/http", "parsers"}
    assert {row["name"] for row in scores["comparison"]} == {*scores["texts"], *scores["tasks"]}
    for part in ("texts", "tasks"):
        assert scores[part] == report["training_form"][part]
    assert scores["comparison"] == report["comparison"]
    assert "note:" not in capsys.readouterr().err


def test_every_verb_masks_documents_as_training_did(moved: RunDirectory, tmp_path: Path) -> None:
    verify.main(["--run", str(moved.path), "--json", str(tmp_path / "proof.json")])
    checks = {check["name"]: check["values"] for check in json.loads((tmp_path / "proof.json").read_text())}
    loss = moved.record()["lookup_form"]["loss"]
    assert checks["held-out loss, float32 table"]["table"] == pytest.approx(loss, abs=1e-6)
    costs = [values for name, values in checks.items() if name.startswith("rows as float32")]
    assert costs[0]["loss"] == pytest.approx(loss, abs=1e-6)
    inspect_lut.main(["--run", str(moved.path), "--token", "self", "--json", str(tmp_path / "token.json")])
    seen = json.loads((tmp_path / "token.json").read_text())
    text = text_of(moved)
    inputs = text.windows[:, :-1]
    assert seen["occurrences"] == int((inputs == seen["id"]).sum())
    with load_model(moved.path) as model:
        logits = model.trunk(inputs, attention_mask=text.mask(inputs)).router_logits[0]
    shares = logits.softmax(-1)[inputs == seen["id"]].mean(dim=0)
    assert [row["router_share"] for row in seen["rows"][:4]] == pytest.approx(shares.tolist(), abs=1e-6)


def test_each_of_two_runs_is_scored_as_it_was_trained(moved: RunDirectory, tmp_path: Path) -> None:
    other, found = RunDirectory(tmp_path / "other"), tmp_path / "scores.json"
    shutil.copytree(moved.path, other.path)
    other.config_path.write_text(other.config_path.read_text().replace("document_mask: true", "document_mask: false"))
    losses: list[float] = []
    for run, more in ((moved, ()), (other, ()), (moved, ("--compare", str(other.path)))):
        evaluate.main(["--run", str(run.path), "--tasks", "", "--json", str(found), *more])
        losses.append(json.loads(found.read_text())["loss"])
    row = json.loads(found.read_text())["comparison"][0]
    assert losses[0] == losses[2] != losses[1]
    assert (row["name"], row["first"], row["second"]) == (
        "held_out",
        pytest.approx(losses[0]),
        pytest.approx(losses[1]),
    )


def test_text_and_tables_need_no_corpus(
    moved: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main(["--run", str(moved.path), "--prompt", "import", "--max-new-tokens", "8"])
    assert capsys.readouterr().out.startswith("import")
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(moved.path, run.path, ignore=shutil.ignore_patterns("lut"))
    reparameterize.main(["--run", str(run.path), "--dtype", "int8"])
    counts = read_token_counts(run.lut_path(), read_manifest(run.lut_path()))
    assert counts is not None
    assert torch.equal(torch.from_numpy(counts), text_of(moved).token_counts)


def test_a_resumed_run_keeps_the_held_out_text_that_it_is_scored_on(trained: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.run_dir, run.path)
    run.held_out_path.unlink()  # as in runs of version 0.1
    more = ("trainer.max_steps=121", "trainer.max_time=null", "data.validation_windows=8")
    train(resumed_config(run, None, more), run)
    before, after = text_of(RunDirectory(trained.run_dir)), text_of(run)
    assert (len(before.windows), len(after.windows)) == (64, 8)
    assert run.record()["evaluation"]["lookup_form"]["texts"]["held_out"]["windows"] == 8


def test_a_run_without_its_held_out_text_reads_the_corpus_again_and_says_so(trained: RunResult, tmp_path: Path) -> None:
    kept = text_of(RunDirectory(trained.run_dir))
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.run_dir, run.path, ignore=shutil.ignore_patterns("checkpoints"))
    run.held_out_path.unlink()
    again, note = held_out_of_run(run, load_run_config(run).data)
    assert (
        note == f"{run.held_out_path}: missing, as in runs of version 0.1; the held-out text was read from the corpus"
    )
    for name in ("windows", "byte_lengths", "token_counts"):
        assert torch.equal(getattr(again, name), getattr(kept, name))
    run.held_out_path.write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"held_out.safetensors: not a readable safetensors file"):
        held_out_of_run(run, load_run_config(run).data)


@pytest.mark.parametrize("files", ["data.files=text/*.py", "data.sources=[{name: ours, files: ['text/*.py']}]"])
def test_relative_paths_of_a_run_mean_the_same_text_everywhere(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(STDLIB / "json", here / "text")
    shutil.copytree(STDLIB / "email", elsewhere / "text")
    monkeypatch.chdir(here)
    quick = ("trainer.max_steps=2", "trainer.precision=32-true", "evaluation.at_fit_end=false")
    paths = (
        files,
        "output_dir=runs",
        "data.cache_dir=cache",
        "evaluation.local_data=rows",
        "data.validation_fraction=0.3",
    )
    run = RunDirectory(train(load_config(CONFIGS / "quickstart.yaml", [*SMALL, *quick, *paths])).run_dir.absolute())
    kept = text_of(run)
    run.held_out_path.unlink()  # as in runs of version 0.1, whose verbs read the corpus again

    monkeypatch.chdir(elsewhere)
    config = load_run_config(run)
    assert (config.output_dir, config.data.cache_dir) == (f"{here}/runs", f"{here}/cache")
    assert config.evaluation.local_data == f"{here}/rows"
    assert torch.equal(held_out_of_run(run, config.data)[0].windows, kept.windows)
    train(resumed_config(run, None, ["trainer.max_steps=3"]), run)

    relative = run.config_path.read_text().replace(f"{here}/", "")
    run.config_path.write_text(relative)  # as version 0.1 wrote it
    run.held_out_path.unlink()
    with pytest.raises(
        RunError, match=r"config.yaml: data.files is relative to the directory that the run was made in"
    ):
        held_out_of_run(run, load_run_config(run).data)
    monkeypatch.chdir(here)
    assert torch.equal(held_out_of_run(run, load_run_config(run).data)[0].windows, kept.windows)
    train(resumed_config(run, None, ["trainer.max_steps=4"]), run)
    assert load_run_config(run).output_dir == f"{here}/runs"
