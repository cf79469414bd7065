"""Hugging Face's Trainer drives the library through its own code: the example trains, evaluates, saves and resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,  # each run imports transformers and accelerate in two processes
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) >= 5,
        reason="the Trainer of transformers 5 creates no optimizer in such a job: make test-transformers runs it",
    ),
]

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "huggingface" / "trainer.py"
SETTINGS = {
    "pp2": {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True},
    "dp2": {"pipeline_parallel_degree": 1, "ddp": True},
    "tp2-shared-out": {"tensor_parallel_degree": 2, "ddp": True, "shard_optimizer_state": True},
}


def run(folder: Path, parameters: dict, *arguments: str) -> tuple[list[float], list[float]]:
    """(training losses, evaluation losses) of the example in a new folder, unmodified, by the launcher."""
    folder.mkdir()
    command = [sys.executable, "-m", "modelparallel", "run", "--nproc", "2", "--device", "cpu", "--job-dir", "job"]
    command += ["--timeout", "120", "--parameters", json.dumps(parameters), str(SCRIPT), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    log = (folder / "job" / "logs" / "rank_0.log").read_text()
    training, evaluation = (
        [float(loss) for loss in re.findall(rf"{{'{name}': ([0-9.]+)", log)] for name in ("loss", "eval_loss")
    )
    return training, evaluation


def plain_loss(folder: Path) -> float:
    """What plain transformers makes of a saved model: the loss over the samples on which the example evaluates."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.manual_seed(1)
    ids = torch.randint(64, (64, 16))[:16]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_the_trainer_trains_evaluates_and_saves_in_a_pipeline(tmp_path):
    losses, evaluations = run(tmp_path / "run", SETTINGS["pp2"])
    output = tmp_path / "run" / "trainer-output"
    assert len(losses) == 6 and len(evaluations) == 3
    assert evaluations[-1] == pytest.approx(plain_loss(output), rel=1e-5) and evaluations[-1] < evaluations[0]
    for step in (2, 4, 6):
        names = {path.name for path in (output / f"checkpoint-{step}").iterdir()}
        assert {"model.safetensors", "optimizer.pt_0", "optimizer.pt_1", "user_content.pt", "scheduler.pt"} <= names


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_trainer_goes_on_as_one_that_was_not_interrupted(tmp_path, setting):
    losses, evaluations = run(tmp_path / "whole", SETTINGS[setting])
    checkpoint = tmp_path / "whole" / "trainer-output" / "checkpoint-4"
    resumed = run(tmp_path / "resumed", SETTINGS[setting], str(checkpoint))
    assert resumed == (losses[4:], evaluations[1:])
    weights = [load_file(tmp_path / name / "trainer-output" / "model.safetensors") for name in ("whole", "resumed")]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert evaluations[-1] == pytest.approx(plain_loss(tmp_path / "resumed" / "trainer-output"), rel=1e-5)
