"""Small real models, saved once a session; and the runs that several tests read."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch, as the command line does
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # the cores are shared
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

# Before Triton is imported: without a GPU its kernels are interpreted, to check numbers.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from hypothesis import settings

from peftprof.config import RunConfig, make_config
from peftprof.run import embedded, runner, tokens
from peftprof_kernels import set_native_dequantize

# How long an example takes says more of the machine than of the code.
settings.register_profile("peftprof", deadline=None)
settings.load_profile("peftprof")

FAMILIES = ("bert", "distilbert", "roberta", "modernbert", "llama", "qwen2", "qwen3", "mistral")
DECODERS = ("llama", "qwen2", "qwen3", "mistral")

# What takes minutes begins first: begun last, it would leave the other cores idle.
LONGEST = (
    "kernels/test_codegen.py",
    "trace/test_damage.py",
    "study/test_killed.py",
    "run/test_equality.py",
    "test_cli.py",
)


def pytest_configure(config):
    # By the number of tests, xdist's own order, files of a few long ones come last.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    place = {here / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


# Of the WHOLE pieces of MiniLM the first: characters, and the words that are most used. A run
# reads and hashes its tokenizer and its embedding, which with all of them is half of a short one.
WHOLE, PIECES = 30522, 4602
ROUND = 6  # more rows in the embedding than pieces, as with many models


def save_tokenizer(folder: Path, pieces: int = PIECES) -> None:
    """MiniLM's tokenizer, cut to so many pieces, into a model's folder."""
    minilm, _ = embedded.model_folder("minilm")
    tokenizer = json.loads((minilm / "tokenizer.json").read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {piece: n for piece, n in known.items() if n < pieces}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    lines = (minilm / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (folder / "vocab.txt").write_text("\n".join([*lines[:pieces], ""]), encoding="utf-8")
    shutil.copy(minilm / "special_tokens_map.json", folder)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "model_max_length": 512}'
    )


def tiny_config(family: str, hidden: int, pieces: int = PIECES):
    from transformers import AutoConfig

    sizes = {"vocab_size": pieces + ROUND, "pad_token_id": 0, "num_labels": 2}
    if family == "distilbert":
        sizes |= {"dim": hidden, "hidden_dim": 2 * hidden, "n_heads": 2, "n_layers": 2}
    else:
        sizes |= {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        }
    if family in DECODERS:
        sizes |= {"num_key_value_heads": 2, "head_dim": hidden // 2}
    if family == "roberta":
        sizes |= {"max_position_embeddings": 514}
    if family == "modernbert":
        sizes |= {
            "cls_token_id": 101,
            "sep_token_id": 102,
            "bos_token_id": 101,
            "eos_token_id": 102,
        }
    return AutoConfig.for_model(family, **sizes)


@pytest.fixture(scope="session", autouse=True)
def _tokens_of_tests(tmp_path_factory):
    """Token files of tests go where tests' files go: the user's cache holds a few only."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens, "cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _our_dequantise():
    """A QLoRA run sets compiled code for the process; the next test starts without it."""
    yield
    set_native_dequantize(None)


@pytest.fixture(scope="session")
def _libraries():
    """What the libraries hold is no garbage: looked through anew it is half of a short run."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401  # asks what refers to its random numbers, and must find it
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # or Triton tells of what was never freed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, _libraries):
    """`tiny(family, hidden=64)`: the folder of a two-layer model with a small tokenizer."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, hidden: int = 64) -> Path:
        if (family, hidden) not in made:
            from transformers import AutoModelForSequenceClassification

            folder = tmp_path_factory.mktemp(f"{family}-{hidden}")
            torch.manual_seed(0)
            config = tiny_config(family, hidden)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
            save_tokenizer(folder)
            made[family, hidden] = folder
        return made[family, hidden]

    return make


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A small CSV that a small model can learn: the label is in the words."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    words = ("dull", "weak", "poor", "flat"), ("bright", "fine", "grand", "warm")
    rows = [
        f"a {'very ' * (i % 5)}{words[i % 2][i // 2 % 4]} film number {i},{i % 2}"
        for i in range(96)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def small_run(tiny, sentences):
    """`small_run(method, family="bert", **settings)`: a resolved configuration."""

    def make(method: str, family: str = "bert", hidden: int = 64, **settings) -> RunConfig:
        defaults = {
            "model": str(tiny(family, hidden)),
            "dataset": str(sentences),
            "batch_size": 8,
            "max_steps": 14,
            "rank": 4,
            "precision": "fp32",
            "device": "cpu",
            "learning_rate": 1e-3,
        }
        return runner.resolve(make_config(method, **(defaults | settings)))

    return make


class Quiet:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun: list[tuple[str, int, int]] = []

    def begin(self, what: str, total: int, done: int) -> None:
        self.begun.append((what, total, done))

    def steps(self, done, loss, samples_per_s, memory_bytes) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture
def trained(monkeypatch):
    """The trainees of the runs of a test, each as it was when its run was over."""
    found = []
    real = runner._save_trained

    def remembering(folder, trainee, prepared):
        found.append(trainee)
        real(folder, trainee, prepared)

    monkeypatch.setattr(runner, "_save_trained", remembering)
    return found


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)`: a folder on a disk of that size; asked again, the same one resized."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk is a tmpfs mount, which needs Linux and root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def make(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=mounted)
        if done.returncode:
            pytest.skip("no mounts allowed here")
        mounted = True
        return folder

    yield make
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
