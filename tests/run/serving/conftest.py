"""Short runs and a small language model, made once a session."""

import shutil
from pathlib import Path

import pytest
import torch

from peftprof.run import runner
from peftprof.run.serving import memory


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs, small_run, quiet):
    """`run(method, family="bert")`: the folder of a short run, made once."""

    def make(method: str, family: str = "bert") -> Path:
        path = runs / f"{method}-{family}"
        if not path.exists():
            settings = {"max_steps": 3, "profiler": "none", "learning_rate": 1e-2}
            config = small_run(method, family, **settings)
            runner.train(config, path, ["train"], quiet)
        return path

    return make


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, tiny) -> Path:
    """The small Llama with a language model's head: its other folder is a classifier's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("language") / "model"
    shutil.copytree(tiny("llama"), folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_children(monkeypatch):
    """Memory is measured in processes that take seconds to start; a test has its own of it."""
    found = memory.Peaks(None, {}, {})
    monkeypatch.setattr(memory, "measure", lambda *_: found)
