"""Methods with encoders of their own also train the shared transformer: one line changes."""

import pytest
import torch
from small_methods import full_batch, shrinking
from tiny_run import gradients

from mmssl import config
from mmssl.build import build_model

SOUND = "towers.audio={cut: {kind: patches, patch: [2, 16]}, backbone: shared}"
IMAGES = "towers.x={cut: {kind: patches, patch: [1, 8, 8]}, backbone: shared}"
STEPS = "towers.audio={backbone: shared, cut: {project: true}}"  # frames or latents of a waveform
SIZE = "width: 16, layers: 1, head_size: 8, hidden: 32"
SEEN, CAUSAL = f"shared={{{SIZE}}}", f"shared={{{SIZE}, causal: true}}"

LINES = {
    "general/simclr": IMAGES.replace("towers.x", "towers.video"),
    "audio/vq_vae": "towers.audio.backbone=shared",
    "audio/lim": "towers.audio={use: audio_tiny, post: 2048}",  # a spectrogram for the waveform
    **dict.fromkeys(
        (
            *("audio/clar", "audio/jansen_triplet", "audio/trill", "audio/simclr", "audio/byol_a"),
            *("audio/cola", "audio/byol_a_v2"),
            *("audio/deep_cluster", "audio/permutations", "audio/audio2vec_cbow"),
            *("audio/audio2vec_skipgram", "audio/audio2vec_gap"),
        ),
        SOUND,
    ),
    **dict.fromkeys(
        (f"general/{n}" for n in ("moco", "moco_v2", "simsiam", "barlow_twins", "swav", "rotnet")),
        IMAGES,
    ),
    **dict.fromkeys(
        (
            *("audio/apc", "audio/vq_apc", "audio/cpc", "audio/cpc2", "audio/wav2vec"),
            *("audio/audio_word2vec", "separation/mixit", "separation/pit", "separation/denoising"),
        ),
        STEPS,
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_one_line_is_another_backbone(name):
    """Every parameter of the transformer gets a gradient from the method's own loss."""
    tasks = config.load(name).tasks.values()
    lines = [LINES[name], CAUSAL if any(task.kind == "future" for task in tasks) else SEEN]
    spec = config.load(name, [*lines, *shrinking(config.load(name, lines))])
    model = build_model(spec)
    for buffer_name, labels_N in model.named_buffers():
        if buffer_name.endswith("labels_N"):  # as behind DeepCluster's first epoch
            labels_N.copy_(torch.arange(len(labels_N)) % 2)
    loss, grads = gradients(model, full_batch(spec, 4))
    assert loss.isfinite()
    trunk = {n for n, _ in model.named_parameters() if n.startswith("trunk.")}
    assert trunk
    assert all(grads[n].any() for n in trunk)
