"""A whole model for other libraries: transformers, HEAR, s3prl, mteb."""

import importlib
import json
import re
import sys
import types
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from embed_runs import embedding, run_folder
from media_files import moving_frames, tone, write_media

import mmssl
from mmssl import cli
from mmssl.interop import hear, s3prl
from mmssl.interop.exports import ExportSpec, export_run
from mmssl.interop.frames import SoundFrames
from mmssl.interop.mteb import MtebEncoder
from mmssl.types import UserError

transformers = pytest.importorskip("transformers")

CLOSE = {"atol": 1e-5, "rtol": 0}
CLIP = write_media(moving_frames(23), tone(2.3, 16000), fps=10)


@cache
def model_of(name):
    return embedding(name)


def noise(seconds, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.3 * rng.standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(interface of the run, folder) of every format of the tiny flagship."""
    root = tmp_path_factory.mktemp("whole")
    made = run_folder(root / "run")
    for kind in ("mmssl", "hear", "s3prl"):
        assert cli.main(["export", str(root / "run"), str(root / kind), f"format={kind}"]) == 0
    return made, root


# ---------------------------------------------------------------- transformers


def test_automodel_gives_the_same_vectors(exported, tmp_path):
    import mmssl.interop.auto

    made, root = exported
    automodel = transformers.AutoModel.from_pretrained(root / "mmssl")
    processor = transformers.AutoProcessor.from_pretrained(root / "mmssl")
    assert type(automodel) is mmssl.interop.auto.MmsslModel
    assert type(processor) is mmssl.interop.auto.MmsslProcessor
    given = {"audio": [CLIP, (noise(0.7), 16000)], "video": [CLIP], "text": ["a dog", "the sea"]}
    for space in ("av", "avt", None):
        kept = {m: v for m, v in given.items() if made.supports(m, space)}
        out = automodel(**processor(**kept, space=space), space=space)
        for modality, values in kept.items():
            ours = made.encode({modality: values}, space=space)
            torch.testing.assert_close(out[f"{modality}_embeds"], ours, **CLOSE)
    # and once more through their own writers
    automodel.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    out = again(**transformers.AutoProcessor.from_pretrained(tmp_path / "again")(text=["a dog"]))
    torch.testing.assert_close(out.text_embeds, made.encode({"text": ["a dog"]}), **CLOSE)
    for folder in (root / "mmssl", tmp_path / "again"):
        loaded = mmssl.load(folder)
        assert loaded.hash == made.hash
        torch.testing.assert_close(loaded.encode(["a dog"]), made.encode(["a dog"]), **CLOSE)
        assert not [
            p for p in folder.iterdir() if p.suffix not in (".json", ".safetensors", ".model")
        ]


def test_the_folder_tells_nothing_of_the_machine(exported):
    _, root = exported
    text = (root / "mmssl" / "config.json").read_text()
    assert str(root) not in text
    assert yaml.safe_load(json.loads(text)["run"])["data"]["train"] == ""


def test_automodel_refuses_what_it_lacks(exported):
    import mmssl.interop.auto  # noqa: F401

    _, root = exported
    automodel = transformers.AutoModel.from_pretrained(root / "mmssl")
    processor = transformers.AutoProcessor.from_pretrained(root / "mmssl")
    with pytest.raises(UserError, match=r"text: is not read; spaces are av \(audio video\)"):
        processor(text=["a dog"], space="av")
    with pytest.raises(UserError, match="text: is not in av"):
        automodel(**processor(text=["a dog"]), space="av")


def test_damaged_folders_are_explained(exported, tmp_path):
    _, root = exported
    folder = tmp_path / "folder"
    export_run(root / "run", folder, ExportSpec(format="mmssl"))
    config = json.loads((folder / "config.json").read_text())
    sound = config["run"]
    config["run"] = sound.replace("length: 8", "length: long")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: .*views.text.length"):
        mmssl.load(folder)
    config["run"] = sound.replace("dim: 8", "dim: 16")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"weights and config\.json differ"):
        mmssl.load(folder)
    with pytest.raises(UserError, match="format=hear takes the whole model"):
        export_run(root / "run", tmp_path / "x", ExportSpec(format="hear", tower="audio"))


# ---------------------------------------------------------------- HEAR


@pytest.fixture
def validate(monkeypatch):
    """The unmodified validator; of TensorFlow it needs one class."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    validator = pytest.importorskip(
        "hearvalidator.validate", reason="pip install --no-deps -r tests/peers.txt"
    )

    def run(module, path, device="cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # frames further apart than transcription tolerates
            validator.ValidateModel(module, path, device=device)()

    return run


@pytest.mark.parametrize("name", ["tiny", "audio/cola", "speech/hubert_it1", "avt/mmv_fac"])
def test_hearvalidator_passes_unmodified(validate, tmp_path, name):
    run_folder(tmp_path / "run", name)
    validate("mmssl.interop.hear", str(tmp_path / "run"))


def test_hearvalidator_passes_the_exported_module(validate, exported, monkeypatch):
    _, root = exported
    monkeypatch.syspath_prepend(root / "hear")
    validate("hear_mmssl.tiny", "")  # the weights beside it
    module = importlib.import_module("hear_mmssl.tiny")
    assert module.load_model(space="avt").scene_embedding_size == 8
    sys.modules.pop("hear_mmssl.tiny")


@pytest.mark.parametrize("name", ["tiny", "speech/hubert_it1"])
@pytest.mark.parametrize("seconds", [1.07, 1.98, 2.74, 4.0])
def test_hears_rules_of_timestamps(tmp_path, name, seconds):
    """The rules of the newer validator, 2021.0.6, which the index does not carry."""
    run_folder(tmp_path / "run", name)
    model = hear.load_model(tmp_path / "run")
    assert model.sample_rate in hear.RATES
    audio = torch.rand(2, int(seconds * model.sample_rate)) * 2 - 1
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (*times.shape, model.timestamp_embedding_size)
    gaps = times.diff()
    length, hop = 1000 * audio.shape[1] / model.sample_rate, float(gaps.mean())
    assert (gaps - hop).abs().max() < 1e-3
    assert hop <= 50 + 1e-6
    assert 0 <= times.min() <= hop
    assert length - hop <= times.max() <= length
    scene = hear.get_scene_embeddings(audio, model)
    assert scene.shape == (2, model.scene_embedding_size)
    assert scene.dtype == torch.float32
    with pytest.raises(UserError, match=r"expected \(sounds, samples\), found \(5,\)"):
        hear.get_scene_embeddings(torch.zeros(5), model)


def test_hear_frames_are_those_of_the_tower(exported):
    made, root = exported
    model = hear.load_model(root / "hear")
    wave = torch.from_numpy(noise(1.0))
    frames, times = hear.get_timestamp_embeddings(wave[None], model)
    theirs, centres = made.encode_frames({"audio": (wave, 16000)})
    for vector, time_ms in zip(frames[0], times[0], strict=True):
        nearest = (centres - time_ms / 1000).abs().argmin()
        torch.testing.assert_close(vector, theirs[nearest], **CLOSE)


def test_a_model_without_sound_is_no_hear_model(tmp_path):
    run_folder(tmp_path / "run", "general/mae")
    with pytest.raises(UserError, match="no tower '' reads sound; these do: none"):
        hear.load_model(tmp_path / "run")


def test_one_token_per_second_is_no_frame(monkeypatch):
    model = model_of("speech/hubert_it1")
    found = [([torch.zeros(1, 16)], torch.zeros(1))]
    monkeypatch.setattr(type(model), "encode_layers", lambda *_, **__: found)
    with pytest.raises(UserError, match="its tokens are too long for frames"):
        SoundFrames(model)


# ---------------------------------------------------------------- s3prl


@pytest.mark.parametrize("name", ["speech/hubert_it1", "tiny", "audio/cola"])
def test_s3prl_upstream(tmp_path, name):
    made = run_folder(tmp_path / "run", name)
    upstream = s3prl.UpstreamExpert(tmp_path / "run")
    samples = upstream.get_downsample_rates("hidden_states")
    wavs = [torch.from_numpy(noise(s, seed=k)) for k, s in enumerate((0.39, 0.2, 1.1))]
    out = upstream(wavs)
    longest = round(len(wavs[2]) / samples)
    assert {len(h) for h in out["hidden_states"]} == {3}
    assert {h.shape[1] for h in out["hidden_states"]} == {longest}
    for place, wav in enumerate(wavs):  # each as if it were alone
        alone = upstream([wav])
        for a, b in zip(alone["hidden_states"], out["hidden_states"], strict=True):
            count = a.shape[1]
            assert abs(count - len(wav) / samples) < 5
            torch.testing.assert_close(b[place, :count], a[0], **CLOSE)
            assert not b[place, count:].any()
    if name == "speech/hubert_it1":
        tower = next(iter(made.spec.towers.values()))
        assert len(out["hidden_states"]) == tower.backbone.layers + 1
        assert samples == 320
    frames, times = made.encode_frames({"audio": (wavs[2], 16000)})
    grid = (torch.arange(longest) + 0.5) * samples / 16000
    nearest = (times[None] - grid[:, None]).abs().argmin(1)
    torch.testing.assert_close(out["last_hidden_state"][2], frames[nearest], **CLOSE)
    with pytest.raises(UserError, match="expected a list of 1-D tensors"):
        upstream([torch.zeros(1, 5)])


def test_hub_entry(exported):
    made, root = exported
    upstream = torch.hub.load(str(root / "s3prl"), "tiny", source="local")
    wav = torch.from_numpy(noise(1.0))
    states = upstream([wav])["hidden_states"]
    tower = made.model.towers["audio"]
    assert len(states) == 1 + len(made.model.trunk.blocks)
    assert states[0].shape[2] == tower.width


# ---------------------------------------------------------------- mteb


def test_mteb_adapter_reads_batches(exported):
    made, _ = exported
    encoder = MtebEncoder(made, space="avt")
    sounds = [{"array": noise(0.5, seed=k), "sampling_rate": 16000} for k in range(3)]
    loader = [
        {"text": ["a dog", "a cat"], "audio": sounds[:2], "id": ["1", "2"]},
        {"text": ["the sea"], "audio": sounds[2:], "id": ["3"]},
    ]
    found = encoder.encode(loader, task_metadata=None, hf_split="test", hf_subset="x", batch_size=2)
    ours = made.encode({"text": ["a dog", "a cat", "the sea"], "audio": sounds}, space="avt")
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, ours, atol=1e-5)
    np.testing.assert_allclose(encoder.similarity(found, found), found @ found.T, atol=1e-5)
    np.testing.assert_allclose(encoder.similarity_pairwise(found, found), np.ones(3), atol=1e-5)


# ---------------------------------------------------------------- the README


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    run_folder(tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    section = readme.split("### Embed")[1].split("\n### ")[0].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    for name in re.findall(r'"([\w/]+\.mp4)"', code):
        (tmp_path / name).write_bytes(CLIP)
    names = {}
    exec(code, names)
    assert names["scores"].shape == (2, 2)
    assert len(list(filter(None, code.splitlines()))) <= 5
