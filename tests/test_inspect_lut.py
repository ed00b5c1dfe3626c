"""`inspect_lut` on a small trained run, against the rows and routers themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from src import inspect_lut
from src.data.tokenizer import load_tokenizer
from src.errors import UserError
from src.evaluation.routing_view import measure_token_weights, windows_with
from src.inference import load_model
from src.lut import LutStore
from src.lut.verification import find_neighbors
from src.train import RunResult


def test_rows_neighbors_and_weights_are_those_of_the_table(
    trained: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "token.json"
    inspect_lut.main(["--run", str(trained.run_dir), "--token", "self", "--neighbors", "3", "--json", str(report)])
    document = json.loads(report.read_text())
    with LutStore.open(trained.run_dir / "lut") as store:
        rows = store.gather(torch.arange(512))  # (V, L, E, D)
    token_id = document["id"]
    assert token_id == load_tokenizer(trained.run_dir / "tokenizer.json").token_to_id("self")
    assert len(document["rows"]) == rows.shape[1] * rows.shape[2]
    for entry in document["rows"]:
        vectors = rows[:, entry["layer"], entry["expert"]].float()
        assert entry["norm"] == pytest.approx(vectors[token_id].norm().item(), rel=1e-5)
        cosines = F.cosine_similarity(vectors, vectors[token_id], dim=-1)
        cosines[token_id] = -2
        assert [neighbor["cosine"] for neighbor in entry["neighbors"]] == pytest.approx(cosines.topk(3).values.tolist())
    assert document["occurrences"] > 0
    shares = torch.tensor([entry["router_share"] for entry in document["rows"]]).view(rows.shape[1:3])
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(rows.shape[1]))
    printed = capsys.readouterr().out
    assert "router's weight" in printed
    assert "'self'" in printed


def test_weights_are_the_mean_over_occurrences(trained: RunResult) -> None:
    # the last token of a window is only predicted
    windows = torch.tensor([[5, 7, 7, 9, 1], [1, 2, 3, 4, 7], [7, 1, 1, 1, 1]])
    with load_model(trained.run_dir, experts="lut") as model:
        found = measure_token_weights(model, windows_with(windows, 7, 9), 7)
        assert found.occurrences == 3
        assert found.shares is not None
        logits = model.trunk(windows[:, :-1]).router_logits
        for layer, layer_logits in enumerate(logits):
            probs = layer_logits.softmax(-1)
            expected = (probs[0, 1] + probs[0, 2] + probs[2, 0]) / 3
            torch.testing.assert_close(found.shares[layer], expected)
        assert measure_token_weights(model, windows_with(windows, 400, 9), 400).shares is None


def test_mistakes_are_shown_with_what_would_be_right(trained: RunResult, tmp_path: Path) -> None:
    run = str(trained.run_dir)
    with pytest.raises(UserError, match=r"--token 'self\.selfself': is \d tokens, expected one; its pieces are 'sel"):
        inspect_lut.main(["--run", run, "--token", "self.selfself"])
    with pytest.raises(UserError, match=r"--token '': is 0 tokens, expected one; its pieces are none"):
        inspect_lut.main(["--run", run, "--token", ""])
    with pytest.raises(UserError, match="--layer 2: the table has layers 0 to 1"):
        inspect_lut.main(["--run", run, "--token", "self", "--layer", "2"])
    with pytest.raises(IndexError, match=r"token id 512 is outside the table's vocabulary \[0, 512\)"):
        find_neighbors(trained.run_dir / "lut", 512, layers=[0], neighbors=1)
    shutil.copytree(trained.run_dir, tmp_path / "run")
    (tmp_path / "run" / "lut" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json: missing, so the table is unfinished"):
        inspect_lut.main(["--run", str(tmp_path / "run"), "--token", "self"])
