"""Every verb on a plug-in: with the base where it was, moved, in memory already, or exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import convert, evaluate, export, generate, inspect_lut, reparameterize, verify
from src.errors import CheckpointError, RunError, UserError
from src.inference import load_model
from src.lut import read_manifest
from src.run_directory import RunDirectory
from src.train import RunResult

PROMPT = ["--prompt", "import os", "--max-new-tokens", "8"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    generate.main([*arguments, *PROMPT])
    return capsys.readouterr().out


def test_generate_says_the_same_in_every_way(
    dense_run: RunDirectory, plug_in_run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = str(dense_run.path), str(plug_in_run.run_dir)
    expected = printed(capsys, "--run", run)
    assert printed(capsys, "--run", base, "--attach", run) == expected
    assert printed(capsys, "--run", base, "--attach", run, "--experts", "ffn") == expected
    copy = shutil.copytree(run, tmp_path / "copy")
    config = (copy / "config.yaml").read_text().replace(base, "/moved")
    (copy / "config.yaml").write_text(config)
    with pytest.raises(RunError, match=r"copy: plugs into the run /moved, but /moved holds no weights"):
        generate.main(["--run", str(copy), *PROMPT])
    assert printed(capsys, "--run", str(copy), "--base", base) == expected
    with pytest.raises(RunError, match=r"^--attach: .*base: holds all of its weights, so it is no plug-in"):
        generate.main(["--run", base, "--attach", base, *PROMPT])
    with pytest.raises(RunError, match=r"^--base .*: .* holds all of its weights and plugs into no other run"):
        generate.main(["--run", base, "--base", base, *PROMPT])


def test_verify_proves_both_forms_and_the_base(plug_in_run: RunResult, tmp_path: Path) -> None:
    verify.main(["--run", str(plug_in_run.run_dir), "--json", str(tmp_path / "checks.json")])
    checks = {check["name"]: check for check in json.loads((tmp_path / "checks.json").read_text())}
    assert checks["weights of the base in use"]["values"]["same"] == len(load_file(base_of(plug_in_run).backbone_path))
    assert checks["detached again"]["holds"] and checks["detached again"]["values"]["attached"] > 1e-3
    assert checks["logits through pread"]["values"]["max_abs"] <= 5e-5


def base_of(plug_in_run: RunResult) -> RunDirectory:
    base = RunDirectory(plug_in_run.run_dir).base()
    assert base is not None
    return base


def test_verify_finds_a_base_that_was_changed(plug_in_run: RunResult, tmp_path: Path) -> None:
    base = RunDirectory(shutil.copytree(base_of(plug_in_run).path, tmp_path / "base"))
    weights, identity = load_file(base.backbone_path), base.identity()
    weights["norm.weight"] = weights["norm.weight"] + 1e-3
    base.write_backbone(weights, identity)  # which claims to be the old one
    with pytest.raises(SystemExit):
        verify.main(["--run", str(plug_in_run.run_dir), "--base", str(base.path), "--json", str(tmp_path / "checks")])
    failed = [check["name"] for check in json.loads((tmp_path / "checks").read_text()) if check["holds"] is False]
    assert failed[0] == "weights are those of the table"


def test_evaluate_and_inspect(
    dense_run: RunDirectory, plug_in_run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, scores = str(dense_run.path), str(plug_in_run.run_dir), tmp_path / "scores.json"
    with_base = ["--run", base, "--attach", run, "--compare", base, "--tasks", "", "--json", str(scores)]
    evaluate.main(with_base)
    found = json.loads(scores.read_text())
    assert (found["form"], found["compared_with"]) == ("base + plug-in (lookup form, lut)", "base (training form)")
    report = plug_in_run.report
    assert report is not None and report.lookup_form is not None and report.initial is not None
    assert found["loss"] == pytest.approx(report.lookup_form.loss, abs=1e-5)
    (text,) = [row for row in found["comparison"] if row["metric"] == "loss"]
    assert text["second"] == pytest.approx(report.initial.loss, abs=1e-5)
    capsys.readouterr()
    inspect_lut.main(["--run", run, "--token", "self", "--layer", "0"])
    assert "router's weight" in capsys.readouterr().out
    with pytest.raises(UserError, match="--layer 1: the table has layers 0 to 0"):
        inspect_lut.main(["--run", run, "--token", "self", "--layer", "1"])


def test_another_table_is_built_of_it(plug_in_run: RunResult, tmp_path: Path) -> None:
    run = shutil.copytree(plug_in_run.run_dir, tmp_path / "run")
    for more in (["--lut", "again", "--dtype", "float32"], ["--lut", "nf4", "--dtype", "nf4", "--from-lut", "lut"]):
        reparameterize.main(["--run", str(run), *more])
    shards = [(run / name / "rows-00000.safetensors").read_bytes() for name in ("lut", "again")]
    assert shards[0] == shards[1]
    assert read_manifest(run / "nf4").backbone == RunDirectory(run).identity().backbone
    reparameterize.main(["--run", str(run), "--checkpoint", "last", "--lut", "third"])  # its weights are there already


def test_an_export_holds_base_and_plug_in(dense_run: RunDirectory, plug_in_run: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(plug_in_run.run_dir)
    export.main(["--run", str(run.path), "--to", "hf", "--output", str(tmp_path / "folder")])
    convert.main(["--from", "hf", "--input", str(tmp_path / "folder"), "--output", str(tmp_path / "back")])
    back, ids = RunDirectory(tmp_path / "back"), torch.arange(32).unsqueeze(0)
    assert (back.identity(), back.plug_in()) == (run.identity(), None)
    with load_model(back.path) as one, load_model(run.path) as other:
        assert torch.equal(one(ids), other(ids))
    alone = tmp_path / "alone"
    export.main(["--run", str(run.path), "--to", "hf", "--plug-in-only", "--output", str(alone)])
    config = json.loads((alone / "config.json").read_text())
    assert config["plug_in"] == {"base": "base", "backbone": dense_run.identity().backbone}
    assert "auto_map" not in config
    assert load_file(alone / "model.safetensors").keys() == {"blocks.0.router.weight"}
    convert.main(["--from", "hf", "--input", str(alone), "--output", str(tmp_path / "plug-in")])
    with (
        load_model(dense_run.path, attach=tmp_path / "plug-in") as one,
        load_model(tmp_path / "plug-in", base=dense_run.path) as two,
        load_model(run.path) as other,
    ):
        assert torch.equal(one(ids), other(ids)) and torch.equal(two(ids), other(ids))
    with pytest.raises(CheckpointError, match="holds all of its weights, so it is no plug-in; leave --plug-in-only"):
        export.main(["--run", str(dense_run.path), "--to", "hf", "--plug-in-only", "--output", str(tmp_path / "no")])
    with pytest.raises(UserError, match="--plug-in-only: official has no such checkpoints"):
        export.main(["--run", str(run.path), "--to", "official", "--plug-in-only", "--output", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_weights_of_a_plug_in_that_are_damaged_are_named(plug_in_run: RunResult, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(plug_in_run.run_dir, tmp_path / "run"))
    metadata = {"backbone": run.identity().backbone, "training_form": run.identity().training_form}
    save_file({"blocks.0.router.weight": torch.zeros(2, 64)}, run.backbone_path, metadata=metadata)
    with pytest.raises(RunError, match=r"backbone.safetensors: does not fit the model of config.yaml"):
        load_model(run.path)
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("plug_in:\n", "plug_in:\n  more: 1\n"))
    with pytest.raises(RunError, match=r"config.yaml: plug_in is .*, expected base and backbone; copy the run again"):
        load_model(run.path)
