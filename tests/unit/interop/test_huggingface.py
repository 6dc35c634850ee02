"""Checkpoints of transformers: randomly initialised peers, imported and exported."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_methods import WAVE_TOWER

from mmssl import cli, config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.eval.load import load_model
from mmssl.interop.exports import ExportSpec, export_run
from mmssl.interop.huggingface import ImportSpec, import_folder, write_run
from mmssl.train.start import load_start_weights
from mmssl.types import UserError, ViewBatch

transformers = pytest.importorskip("transformers")

COMPUTED = ("position_embeddings", "decoder_pos_embed")  # tables of MAE
CLOSE = {"atol": 1e-5, "rtol": 0}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
WAVE = {
    **TINY,
    "conv_dim": [16] * 3,
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = {**WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
CODES = {"codevector_dim": 8, "proj_codevector_dim": 12, "num_codevectors_per_group": 5}
FIVE = {**WAVE, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
CONFORMER = {
    **WAVE,
    "position_embeddings_type": None,
    "hidden_act": "swish",
    "conv_depthwise_kernel_size": 5,
}
PICTURE = {**TINY, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 40,
}
WORDS = {**TINY, "vocab_size": 50, "max_position_embeddings": 24}
FILM = {**PICTURE, "num_frames": 4, "tubelet_size": 2}


@dataclass(frozen=True)
class Case:
    """A peer: its class, its configuration, and what else is known of it.

    left: tensors that an encoder leaves behind. padded: the peer handles padding correctly.
    """

    kind: str
    options: dict
    heads: bool = False
    padded: bool = False
    left: tuple = ("masked_spec_embed",)
    auto: str = "AutoModel"


PRE = {"heads": True, "left": (), "auto": "AutoModelForPreTraining"}
CASES = {
    "wav2vec2_base": Case("Wav2Vec2Model", WAVE),
    "wav2vec2_large": Case("Wav2Vec2Model", {**LARGE, "conv_bias": True}, padded=True),
    "wav2vec2_base_heads": Case("Wav2Vec2ForPreTraining", {**WAVE, **CODES}, **PRE),
    "wav2vec2_large_heads": Case("Wav2Vec2ForPreTraining", {**LARGE, **CODES}, padded=True, **PRE),
    "conformer": Case("Wav2Vec2ConformerModel", CONFORMER),
    "conformer_heads": Case("Wav2Vec2ConformerForPreTraining", {**CONFORMER, **CODES}, **PRE),
    "hubert_base": Case("HubertModel", WAVE),
    "hubert_large": Case("HubertModel", LARGE, padded=True),
    "wavlm_base": Case("WavLMModel", {**WAVE, "num_buckets": 32, "max_bucket_distance": 80}),
    "wavlm_large": Case("WavLMModel", LARGE, padded=True),
    "data2vec_audio": Case("Data2VecAudioModel", FIVE),
    "vit_mae": Case("ViTMAEModel", PICTURE, left=()),
    "vit_mae_heads": Case("ViTMAEForPreTraining", {**PICTURE, **DECODER}, **PRE),
    "videomae": Case("VideoMAEModel", FILM, left=()),
    "bert": Case(
        "BertModel", WORDS, padded=True, left=("pooler.dense.weight", "pooler.dense.bias")
    ),
    "bert_words": Case("BertForMaskedLM", WORDS, True, True, (), "AutoModelForMaskedLM"),
    "bert_pairs": Case("BertForPreTraining", WORDS, padded=True, **PRE),
    "videomae_normed": Case("VideoMAEModel", {**FILM, "use_mean_pooling": False}, left=()),
}
HEADS = [name for name in CASES if CASES[name].heads]


@cache
def peer_of(name):
    case = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    kind = getattr(transformers, case.kind)
    peer = kind(kind.config_class(**case.options)).eval()
    if "ViT" in case.kind:
        fixed_places(peer)
    with torch.no_grad():  # fresh biases and norms are alike: a mix-up would not show
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        for key, buffer in peer.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand_like(buffer)
    return peer


def fixed_places(peer):
    """The tables of the published models; their library leaves zeros in a fresh one."""
    embeddings = encoder_of(peer).embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    if hasattr(peer, "decoder"):
        peer.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the peers and of the runs that were imported from them."""
    root = tmp_path_factory.mktemp("peers")
    done = {}

    def get(name):
        if name not in done:
            source, out = root / name, root / f"{name}.run"
            peer_of(name).save_pretrained(source)
            done[name] = source, out, import_folder(source, out)
        return done[name]

    return get


def encoder_of(peer):
    return getattr(peer, peer.base_model_prefix, peer)


def view_of(data, rate, modality, lengths=None):
    rows = len(data)
    places = torch.arange(rows)
    return ViewBatch(
        modality=modality,
        data=data,
        lengths_P=torch.full((rows,), data.shape[1]) if lengths is None else lengths,
        rows_P=places,
        slots_P=torch.zeros_like(places),
        seeds_P=places + 7,
        start_s_P=torch.zeros(rows),
        present_BL=torch.ones(rows, 1, dtype=torch.bool),
        rate=rate,
    )


def wave(samples=800, lengths=None):
    data = 0.3 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    if lengths is not None:
        data = data * (torch.arange(samples) < lengths[:, None])
    return view_of(data, 16000.0, "audio", lengths)


def film(frames):
    shape = (2, frames, 32, 32, 3)
    data = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return view_of(data, 8.0, "video")


def words(lengths=None):
    """Two texts of pairs, whose second segments begin at 9 and 4."""
    ids = torch.randint(5, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    view = view_of(ids, 0.0, "text", lengths)
    return replace(view, split_P=torch.tensor([9, 4]), order_P=torch.tensor([0, 1]))


def view_for(name, padded=False):
    if name.startswith("vi"):
        return film(4 if name.startswith("video") else 1)
    if name.startswith("bert"):
        return words(torch.tensor([20, 13]) if padded else None)
    return wave(800, torch.tensor([800, 555]) if padded else None)


@torch.no_grad()
def ours(tower, view):
    """What enters the first layer, the output of every layer, and that of the tower."""
    first, *rest = tower.layers(view)[0]
    if tower.trunk.input_norm is not None:
        first = tower.trunk.input_norm(first, tower.modality)
    return [first, *rest], tower.encode(view, 1.0).x_PND


@torch.no_grad()
def theirs(peer, tower, view):
    """The same of the peer, without a class token."""
    encoder = encoder_of(peer)
    mask = (torch.arange(view.data.shape[1]) < view.lengths_P[:, None]).long()
    mask = None if bool(mask.all()) else mask
    if view.modality == "text":
        kinds = (torch.arange(view.data.shape[1]) >= view.split_P[:, None]).long()
        out = encoder(view.data, mask, kinds, output_hidden_states=True)
        return list(out.hidden_states), out.last_hidden_state
    if view.modality == "audio":
        out = encoder(view.data, attention_mask=mask, output_hidden_states=True)
        return list(out.hidden_states), out.last_hidden_state
    pixels = tower.inputs(view)  # (P, C, T, H, W)
    if view.data.shape[1] > 1:
        out = encoder(pixels.transpose(1, 2), output_hidden_states=True)
        return list(out.hidden_states), out.last_hidden_state
    kept, encoder.config.mask_ratio = encoder.config.mask_ratio, 0.0
    order = torch.arange(16.0).expand(2, -1)
    out = encoder(pixels[:, :, 0], noise=order, output_hidden_states=True)
    encoder.config.mask_ratio = kept
    return [x[:, 1:] for x in out.hidden_states], out.last_hidden_state[:, 1:]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", CASES)
def test_an_imported_model_equals_its_peer_at_every_layer(folders, name):
    _, out, done = folders(name)
    assert tuple(done.left) == CASES[name].left
    model, _, _ = load_model(out)
    (tower,) = model.towers.values()
    view = view_for(name)
    mine, last = ours(tower, view)
    wanted, wanted_last = theirs(peer_of(name), tower, view)
    assert len(mine) == len(wanted) == 1 + TINY["num_hidden_layers"]
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(last, wanted_last, **CLOSE)
    assert last.std() > 0.1


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].padded])
def test_padding_is_handled_as_by_the_peer(folders, name):
    model, _, _ = load_model(folders(name)[1])
    (tower,) = model.towers.values()
    view = view_for(name, padded=True)
    mine, last = ours(tower, view)
    wanted, wanted_last = theirs(peer_of(name), tower, view)
    valid = ~tower.encode(view, 1.0).pad_PN
    assert valid.sum(1).tolist() == ([20, 13] if name.startswith("bert") else [39, 27])
    for a, b in zip([*mine, last], [*wanted, wanted_last], strict=True):
        torch.testing.assert_close(a[valid], b[valid], **CLOSE)


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith(("wav", "con"))])
def test_quantiser_and_projections_equal_the_peers(folders, name):
    model, _, _ = load_model(folders(name)[1])
    peer, view = peer_of(name), wave()
    target = model.tasks["mam"].target
    with torch.no_grad():
        tokens = model.towers["audio"].encode(view, 1.0)
        hidden = torch.zeros(tokens.pad_PN.shape, dtype=torch.bool)
        hidden[:, 3:9] = True
        vectors = target.quantizer(tokens.features_PNE).vectors_PNQ
        out = peer(view.data, mask_time_indices=hidden)
        mask = masked_tokens(model, view, hidden)
        codes = target.of_code(vectors)
        torch.testing.assert_close(codes, out.projected_quantized_states, **CLOSE)
        torch.testing.assert_close(target.of_context(mask), out.projected_states, **CLOSE)


def masked_tokens(model, view, hidden):
    from mmssl.towers import Mask

    task = model.tasks["mam"]
    mask = Mask("mam", hidden, task.mask.hide, task.embedding)
    return model.towers["audio"].encode(view, 1.0, mask).x_PND


@pytest.mark.parametrize("name", ["bert_words", "bert_pairs"])
def test_scores_of_words_and_pairs_equal_the_peers(folders, name):
    model, _, _ = load_model(folders(name)[1])
    target, view = model.tasks["mlm"].target, words()
    kinds = (torch.arange(20) >= view.split_P[:, None]).long()
    with torch.no_grad():
        x_PND = model.towers["text"].encode(view, 1.0).x_PND
        out = peer_of(name)(view.data, token_type_ids=kinds)
        scores = out.logits if name == "bert_words" else out.prediction_logits
        torch.testing.assert_close(target.head(x_PND), scores, **CLOSE)
        if name == "bert_pairs":
            torch.testing.assert_close(target.sentence(x_PND), out.seq_relationship_logits, **CLOSE)


@pytest.mark.parametrize("scale", ["values", "normalised"])
def test_mae_reconstructs_as_its_peer(folders, scale):
    model, _, _ = load_model(folders("vit_mae_heads")[1])
    peer, view = peer_of("vit_mae_heads"), film(1)
    task, tower = model.tasks["mae"], model.towers["video"]
    task.target.normalize = peer.config.norm_pix_loss = scale == "normalised"
    batch = fake_batch(model.spec, 2, missing=False)
    batch.views["x"] = view
    with torch.no_grad():
        seen = task._seen(model.passes(batch), batch)
        logits = task.target.head(seen.tokens, seen.hidden_PN)
        term = task.target(seen)[""]
        pixels = tower.inputs(view)[:, :, 0]
        # visible patches first, in their order, as they are encoded here
        noise = seen.hidden_PN.float() * 100 + torch.arange(16.0)
        out = peer(pixels, noise=noise)
    assert torch.equal(out.mask.bool(), seen.hidden_PN)
    colours_last = logits.unflatten(-1, (3, 64)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(colours_last, out.logits, **CLOSE)
    torch.testing.assert_close(term.sum / term.count, out.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_a_file_has_one_place_and_every_place_a_number(folders, tmp_path, name):
    source, _, done = folders(name)
    weights = load_file(source / "model.safetensors")
    given = {k: x for k, x in weights.items() if not k.endswith(COMPUTED) and k not in done.left}
    if name.startswith("conformer"):
        given = {k: x for k, x in given.items() if "pos_conv_embed" not in k}
    ends = torch.tensor([x.numel() for x in given.values()]).cumsum(0).tolist()
    numbered = {
        key: torch.arange(end - x.numel() + 1, end + 1).reshape(x.shape).to(x.dtype)
        for (key, x), end in zip(given.items(), ends, strict=True)
    }
    import_folder(changed(folders, tmp_path, name, tensors=numbered), tmp_path / "out")
    made = load_file(tmp_path / "out" / "weights.safetensors").values()
    found = torch.cat([x.flatten().double() for x in made])
    assert torch.equal(found[found > 0].sort().values, torch.arange(1, ends[-1] + 1).double())
    # the biases of keys, which VideoMAE has not
    zeros = 32 * TINY["num_hidden_layers"] if name.startswith("videomae") else 0
    assert (found == 0).sum() == zeros


# ---------------------------------------------------------------- export


def load_theirs(folder, auto):
    peer, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return peer.eval()


def formatted(name):
    """Two model types are the same encoder."""
    same = [kind for kind in ("hubert", "wav2vec2") if name.startswith(kind)]
    return {"format": same[0]} if same else {}


WITHOUT_POOLER = ("bert", "bert_words")  # which their encoder has


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_POOLER])
def test_an_exported_model_loads_in_transformers_and_gives_the_same(folders, tmp_path, name):
    _, run, _ = folders(name)
    export_run(run, tmp_path / "out", ExportSpec(**formatted(name)))
    peer = load_theirs(tmp_path / "out", "AutoModel")
    assert type(peer) is type(encoder_of(peer_of(name)))
    (tower,) = load_model(run)[0].towers.values()
    view = view_for(name)
    mine, last = ours(tower, view)
    wanted, wanted_last = theirs(peer, tower, view)
    for a, b in zip([*mine, last], [*wanted, wanted_last], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", WITHOUT_POOLER)
def test_an_encoder_without_what_their_class_needs_is_refused(folders, tmp_path, name):
    with pytest.raises(UserError, match=r"towers\.text as bert: lacks `pooler.* heads=true"):
        export_run(folders(name)[1], tmp_path / "out")


@pytest.mark.parametrize("name", HEADS)
def test_exported_heads_load_in_transformers_bit_for_bit(folders, tmp_path, name):
    source, run, _ = folders(name)
    assert export_run(run, tmp_path / "out", ExportSpec(heads=True)) == CASES[name].kind
    load_theirs(tmp_path / "out", CASES[name].auto)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if "pos_embed" in key or "position_embeddings" in key:
            torch.testing.assert_close(value, after[key], atol=1e-6, rtol=0)
        elif "conformer" not in key or "pos_conv" not in key:  # which their Conformer never calls
            assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", [name for name in CASES if name != "bert"])
def test_import_of_an_export_is_the_run_bit_for_bit(folders, tmp_path, name):
    _, run, _ = folders(name)
    heads = CASES[name].heads
    export_run(run, tmp_path / "out", ExportSpec(heads=heads, **formatted(name)))
    import_folder(tmp_path / "out", tmp_path / "again")
    assert same_weights(run, tmp_path / "again")
    assert config.load(run / "config.yaml") == config.load(tmp_path / "again" / "config.yaml")


# ---------------------------------------------------------------- refusals


def changed(folders, tmp_path, name, settings=None, tensors=None, files=None):
    """A copy of a peer's folder with other entries and tensors (None = removed)."""
    copy = tmp_path / "changed"
    shutil.copytree(folders(name)[0], copy)
    for file, new in (("config.json", settings), ("preprocessor_config.json", files)):
        path = copy / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **(new or {})}))
    weights = load_file(copy / "model.safetensors") | (tensors or {})
    kept = {key: x for key, x in weights.items() if x is not None}
    save_file(kept, copy / "model.safetensors")
    return copy


def refused(source, out, message, options=None):
    with pytest.raises(UserError, match=message):
        import_folder(source, out, options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("hubert_base", {"encoder.wheel.weight": torch.ones(1)}, "unknown tensors: encoder.wheel"),
        ("hubert_base", {"encoder.layer_norm.bias": None}, r"lacks: encoder\.layer_norm\.bias"),
        (
            "hubert_base",
            {"encoder.layers.1.attention.k_proj.weight": torch.ones(32, 31)},
            r"`encoder\.layers\.1\.attention\.k_proj\.weight` has shape \(32, 31\).* \(32, 32\)",
        ),
        ("hubert_base", {"lm_head.weight": torch.ones(4, 32)}, r"unknown tensors: lm_head\.weight"),
        ("wav2vec2_base_heads", {"quantizer.weight_proj.bias": None}, r"lacks: quantizer"),
        ("wav2vec2_base_heads", {"wav2vec2.masked_spec_embed": None}, "lacks: masked_spec_embed"),
        (
            "vit_mae",
            {"embeddings.position_embeddings": torch.zeros(1, 17, 32)},
            r"`embeddings\.position_embeddings` is not the fixed table",
        ),
    ],
)  # fmt: skip
def test_tensors_are_matched_strictly_and_named(folders, tmp_path, name, tensors, message):
    refused(changed(folders, tmp_path, name, tensors=tensors), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wav2vec2_base", {"model_type": "llama"}, "'llama' is not known; there are wav2vec2, "),
        ("wav2vec2_base", {"hidden_act": "relu"}, "`hidden_act` is 'relu'.* only 'gelu'"),
        ("wav2vec2_base", {"feat_extract_activation": "relu"}, "extract_activation` is 'relu'"),
        ("wav2vec2_base", {"feat_extract_norm": "batch"}, "only 'group' or 'layer'"),
        ("wav2vec2_base", {"add_adapter": True}, "`add_adapter` is True"),
        ("wav2vec2_base", {"adapter_attn_dim": 8}, "`adapter_attn_dim` is 8"),
        ("wav2vec2_base", {"layer_norm_eps": 1e-6}, "`layer_norm_eps` is 1e-06"),
        ("wav2vec2_base", {"conv_dim": [16, 16, 8]}, "`conv_dim` .* equally many channels"),
        ("wav2vec2_base", {"num_attention_heads": 5}, "`num_attention_heads` is 5: hidden_size 32"),
        ("wav2vec2_base", {"num_hidden_layers": -1}, r"backbone\.layers`: .* found -1"),
        ("wav2vec2_base_heads", {"mask_time_prob": 0.0}, r"mask\.start_prob`: .* found 0\.0"),
        ("hubert_base", {"conv_pos_batch_norm": True}, "`conv_pos_batch_norm` is True"),
        ("hubert_base", {"feat_proj_layer_norm": False}, "`feat_proj_layer_norm` is False"),
        ("conformer", {"position_embeddings_type": "relative"}, "embeddings_type` is 'rel"),
        ("conformer", {"position_embeddings_type": "rotary"}, "embeddings_type` is 'rot"),
        ("conformer", {"hidden_act": "gelu"}, "only 'swish' or 'silu'"),
        ("data2vec_audio", {"num_conv_pos_embeddings": 1}, "use 2 or more"),
        ("vit_mae", {"qkv_bias": False}, "`qkv_bias` is False"),
        ("vit_mae", {"image_size": [32, 64]}, "pictures and patches are square"),
        ("vit_mae", {"num_channels": 1}, "`num_channels` is 1"),
        ("videomae", {"qv_bias": False}, "`qv_bias` is False"),
    ],
)  # fmt: skip
def test_a_configuration_without_a_counterpart_is_refused_by_name(
    folders, tmp_path, name, settings, message
):
    refused(changed(folders, tmp_path, name, settings), tmp_path / "out", message)


def test_an_entry_that_is_missing_has_the_value_of_their_library(folders, tmp_path):
    copy = changed(folders, tmp_path, "conformer")
    settings = json.loads((copy / "config.json").read_text())
    del settings["position_embeddings_type"]
    (copy / "config.json").write_text(json.dumps(settings))
    refused(copy, tmp_path / "out", "`position_embeddings_type` is 'relative'")


def test_a_pickle_is_not_read(folders, tmp_path):
    copy = changed(folders, tmp_path, "hubert_base")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"not even one")
    refused(copy, tmp_path / "out", r"pytorch_model\.bin: a pickle.*save_pretrained")
    (copy / "pytorch_model.bin").unlink()
    refused(copy, tmp_path / "out", "no \\*.safetensors here")
    (copy / "model.safetensors").write_bytes(b"no")
    refused(copy, tmp_path / "out", "not a readable safetensors file")
    (copy / "config.json").write_text("[]")
    refused(copy, tmp_path / "out", "expected an object, found list")
    (copy / "config.json").write_text("{")
    refused(copy, tmp_path / "out", "no JSON")
    refused(tmp_path / "nowhere", tmp_path / "out", "no such file; give the folder")


def test_what_is_there_is_not_written_over(folders, tmp_path):
    source, run, _ = folders("hubert_base")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for act in (lambda out: import_folder(source, out), lambda out: export_run(run, out)):
        with pytest.raises(UserError, match="is there already"):
            act(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------- variants of files


def test_older_names_of_the_weight_norm_are_read(folders, tmp_path):
    source, run, _ = folders("wav2vec2_base")
    old = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    weights = load_file(source / "model.safetensors")
    names = {f"{old}0": "weight_g", f"{old}1": "weight_v"}
    tensors = {f"encoder.pos_conv_embed.conv.{new}": weights[name] for name, new in names.items()}
    copy = changed(folders, tmp_path, "wav2vec2_base", tensors={**tensors, **dict.fromkeys(names)})
    import_folder(copy, tmp_path / "out")
    assert same_weights(run, tmp_path / "out")


def test_a_tensor_under_two_names_is_refused(folders, tmp_path):
    tensors = {"encoder.pos_conv_embed.conv.weight_g": torch.ones(1, 1, 16)}
    copy = changed(folders, tmp_path, "wav2vec2_base", tensors=tensors)
    refused(copy, tmp_path / "out", r"has `encoder\.pos.*original0` twice")


def same_weights(run, other):
    a, b = (load_file(folder / "weights.safetensors") for folder in (run, other))
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


def test_several_files_and_half_precision_are_read(tmp_path):
    peer = peer_of("hubert_base")
    half = type(peer)(peer.config)
    half.load_state_dict(peer.state_dict())
    half.half().save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    import_folder(tmp_path / "parts", tmp_path / "run")
    found = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(x.dtype == torch.float32 for x in found.values())
    name = "towers.audio.stem.proj.weight"
    assert torch.equal(found[name], peer.feature_projection.projection.weight.half().float())


def test_a_model_with_other_heads_gives_its_encoder_on_request(folders, tmp_path):
    tensors = {f"hubert.{key}": x for key, x in peer_of("hubert_base").state_dict().items()}
    tensors |= dict.fromkeys(peer_of("hubert_base").state_dict())
    tensors |= {"lm_head.weight": torch.ones(4, 32)}
    copy = changed(folders, tmp_path, "hubert_base", tensors=tensors)
    refused(copy, tmp_path / "out", "`lm_head.weight` has no counterpart here; .* heads=false")
    done = import_folder(copy, tmp_path / "out", ImportSpec(heads=False))
    assert done.left == ["lm_head.weight", "masked_spec_embed"]
    assert same_weights(folders("hubert_base")[1], tmp_path / "out")


def test_the_decoder_of_videomae_has_no_counterpart(tmp_path):
    peer = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**FILM, **DECODER, use_mean_pooling=False)
    )
    peer.save_pretrained(tmp_path / "peer")
    message = r"has no counterpart here \(their decoder .* heads=false"
    refused(tmp_path / "peer", tmp_path / "out", message)
    done = import_folder(tmp_path / "peer", tmp_path / "out", ImportSpec(heads=False))
    assert "mask_token" in done.left
    decoding = ("decoder.", "encoder_to_decoder", "mask_token")
    assert all(name.startswith(decoding) for name in done.left)


def test_how_the_input_is_prepared_travels_along(folders, tmp_path):
    files = {"do_normalize": False, "sampling_rate": 8000}
    import_folder(changed(folders, tmp_path, "hubert_base", files=files), tmp_path / "run")
    view = config.load(tmp_path / "run" / "config.yaml").views["x"]
    assert (view.normalize, view.hz) == (False, 8000)
    export_run(tmp_path / "run", tmp_path / "out", ExportSpec(format="hubert"))
    feature = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (feature.do_normalize, feature.sampling_rate) == (False, 8000)


@pytest.mark.parametrize(
    ("mean", "std", "values"),
    [
        ([0.5] * 3, [0.5] * 3, "signed"),
        ([0.0] * 3, [1.0] * 3, "unit"),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "imagenet"),
    ],
)
def test_pixels_are_scaled_as_their_processor_does(folders, tmp_path, mean, std, values):
    files = {"image_mean": mean, "image_std": std}
    import_folder(changed(folders, tmp_path, "vit_mae", files=files), tmp_path / "run")
    model, spec, _ = load_model(tmp_path / "run")
    assert spec.towers["video"].frontend.values == values
    export_run(tmp_path / "run", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=True)
    frames = film(1).data
    mine = model.towers["video"].inputs(film(1))[:, :, 0]
    pictures = list(frames[:, 0].movedim(-1, 1))
    wanted = processor(pictures, do_resize=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(mine, wanted, **CLOSE)


def test_other_statistics_of_pixels_are_refused(folders, tmp_path):
    files = {"image_mean": [0.4] * 3, "image_std": [0.5] * 3}
    copy = changed(folders, tmp_path, "vit_mae", files=files)
    refused(copy, tmp_path / "out", "`image_mean`.*ImageNet")


# ---------------------------------------------------------------- runs


WAVE_RUN = (
    "towers.audio.cut.channels=16",
    "towers.audio.backbone.width=32",
    "towers.audio.backbone.head_size=16",
    "towers.audio.backbone.hidden=64",
    "towers.audio.backbone.layers=2",
    "towers.audio.positions.groups=4",
)


def run_of(tmp_path, name, *overrides):
    """A fresh run as its checkpoint: configuration and weights."""
    spec = config.load(name, overrides)
    torch.manual_seed(0)
    state = {key: x.clone() for key, x in build_model(spec).state_dict().items()}
    write_run(tmp_path / "run", spec, state, "test")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wav2vec2_base_tiny", "Wav2Vec2Model"),
        ("hubert_it1_tiny", "HubertModel"),
        ("wavlm_base_tiny", "WavLMModel"),
        ("data2vec_audio_tiny", "Data2VecAudioModel"),
    ],
)
def test_a_trained_run_finds_its_own_format(tmp_path, name, kind):
    fewer = ["tasks.latents.target.layers=2"] if name.startswith("data2vec") else []
    run = run_of(tmp_path, f"runs/{name}", *WAVE_TOWER.get(name, ()), *WAVE_RUN, *fewer)
    assert export_run(run, tmp_path / "out") == kind
    peer = load_theirs(tmp_path / "out", "AutoModel")
    model, _, _ = load_model(run)
    assert torch.equal(peer.masked_spec_embed, model.tasks[next(iter(model.tasks))].embedding)
    view = view_of(wave().data, 8000.0, "audio")
    mine, last = ours(model.towers["audio"], view)
    wanted, wanted_last = theirs(peer, model.towers["audio"], view)
    for a, b in zip([*mine, last], [*wanted, wanted_last], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_heads_of_our_wav2vec2_are_theirs(tmp_path):
    run = run_of(tmp_path, "runs/wav2vec2_base_tiny", *WAVE_RUN, "tasks.mam.target.negatives=7")
    assert export_run(run, tmp_path / "out", ExportSpec(heads=True)) == "Wav2Vec2ForPreTraining"
    peer = load_theirs(tmp_path / "out", "AutoModelForPreTraining")
    assert peer.config.num_negatives == 7
    assert peer.config.mask_time_prob == pytest.approx(0.8)  # spans of 10 begun at 0.08
    target = load_model(run)[0].tasks["mam"].target
    assert torch.equal(peer.project_hid.weight, target.of_context.weight)
    assert torch.equal(peer.quantizer.codevectors[0], target.quantizer.codebook.flatten(0, 1))


def test_the_decoder_of_our_mae_is_theirs(tmp_path):
    sizes = ("towers.x.backbone.width=24", "towers.x.backbone.head_size=12", "views.x.size=32")
    run = run_of(tmp_path, "runs/mae_tiny", *sizes, "towers.x.backbone.layers=1")
    assert export_run(run, tmp_path / "out", ExportSpec(heads=True)) == "ViTMAEForPreTraining"
    peer = load_theirs(tmp_path / "out", "AutoModelForPreTraining")
    assert peer.config.norm_pix_loss
    model, _, _ = load_model(run)
    mine, last = ours(model.towers["x"], film(1))
    wanted, wanted_last = theirs(peer, model.towers["x"], film(1))
    for a, b in zip([*mine, last], [*wanted, wanted_last], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_our_bert_is_theirs(tmp_path):
    sizes = ("towers.text.backbone.width=32", "towers.text.backbone.head_size=16")
    more = ("towers.text.backbone.hidden=64", "towers.text.backbone.layers=2")
    run = run_of(tmp_path, "general/bert", *sizes, *more, "towers.text.cut.vocabulary=50")
    assert export_run(run, tmp_path / "encoder") == "BertModel"
    load_theirs(tmp_path / "encoder", "AutoModel")
    assert export_run(run, tmp_path / "out", ExportSpec(heads=True)) == "BertForPreTraining"
    peer = load_theirs(tmp_path / "out", "AutoModelForPreTraining")
    (tower,) = load_model(run)[0].towers.values()
    mine, last = ours(tower, words())
    wanted, wanted_last = theirs(peer, tower, words())
    for a, b in zip([*mine, last], [*wanted, wanted_last], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_share_that_is_a_schedule_is_no_entry_of_theirs(tmp_path):
    ratio = "tasks.mae.mask.ratio={kind: linear, start: 0.5, end: 0.75}"
    run = run_of(tmp_path, "runs/mae_tiny", "views.x.size=32", ratio)
    with pytest.raises(UserError, match=r"tasks\.mae\.mask\.ratio: is not one number"):
        export_run(run, tmp_path / "out", ExportSpec(heads=True))


def test_a_film_is_no_picture(tmp_path):
    changes = ("views.x.fps=4", "views.x.size=32", "towers.x.backbone.layers=1")
    run = run_of(tmp_path, "runs/mae_tiny", *changes)
    with pytest.raises(UserError, match="4 frames in patches of 1 are no picture"):
        export_run(run, tmp_path / "out", ExportSpec(format="vit_mae"))


def test_a_run_starts_from_an_imported_tower(folders, tmp_path):
    source, _, _ = folders("wav2vec2_base_heads")
    import_folder(source, tmp_path / "start", ImportSpec(tower="ear"))
    imported = load_file(tmp_path / "start" / "weights.safetensors")
    spec = config.load(
        tmp_path / "start" / "config.yaml", [f"towers.ear.init={tmp_path / 'start'}"]
    )
    model = build_model(spec)
    loaded = load_start_weights(model, spec)
    assert loaded
    assert all(name.startswith("towers.ear.") for name in loaded)
    state = model.state_dict()
    assert all(torch.equal(state[name], imported[name]) for name in loaded)


def test_an_imported_encoder_is_not_trained_by_itself(folders):
    model, spec, _ = load_model(folders("hubert_base")[1])
    with pytest.raises(UserError, match="has no tasks and cannot be trained"):
        model(fake_batch(spec, 2), 0, 1)


def test_imported_heads_can_be_trained(folders):
    model, spec, _ = load_model(folders("vit_mae_heads")[1])
    loss, _ = model.train()(fake_batch(spec, 2, missing=False), 0, 1)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("towers.audio.cut.norm=group1", r"towers\.audio\.cut\.norm: 'group1' has no counterpart"),
        ("towers.audio.cut.log_compress=true", r"towers\.audio\.cut\.log_compress: True has no"),
        ("towers.audio.cut.activation=relu", r"towers\.audio\.cut\.activation: 'relu'"),
        ("towers.audio.backbone.eps=1e-6", r"towers\.audio\.backbone\.eps: 1e-06"),
        ("towers.audio.backbone.layer_scale=0.1", r"towers\.audio\.backbone\.layer_scale: 0\.1"),
        ("towers.audio.backbone.share_layers=true", r"backbone\.share_layers: True"),
        ("towers.audio.backbone.input_norm=false", r"backbone\.input_norm: False"),
        ("towers.audio.globals=[agg]", r"towers\.audio\.globals: \['agg'\]"),
        ("towers.audio.registers=2", r"towers\.audio\.registers: 2"),
        ("towers.audio.positions.layers=2", r"towers\.audio\.positions\.layers: 2"),
        ("towers.audio.post=8", r"towers\.audio\.post: 8"),
    ],
)
def test_options_that_their_model_has_not_are_refused_by_name(tmp_path, change, message):
    run = run_of(tmp_path, "runs/wav2vec2_base_tiny", *WAVE_RUN, change)
    with pytest.raises(UserError, match=message):
        export_run(run, tmp_path / "out", ExportSpec(format="wav2vec2"))
    assert not (tmp_path / "out").exists()


def test_heads_without_a_counterpart_are_refused_by_name(tmp_path):
    run = run_of(tmp_path, "runs/hubert_it1_tiny", *WAVE_TOWER["hubert_it1_tiny"], *WAVE_RUN)
    with pytest.raises(UserError, match=r"tasks\.mam: has no heads that hubert has"):
        export_run(run, tmp_path / "out", ExportSpec(heads=True))
    shared = "tasks.mam.target.quantizer.shared_codebook=true"
    codes = run_of(tmp_path / "b", "runs/wav2vec2_base_tiny", *WAVE_RUN, shared)
    with pytest.raises(UserError, match=r"tasks\.mam\.target\.quantizer\.shared_codebook: True"):
        export_run(codes, tmp_path / "out", ExportSpec(heads=True))
    assert export_run(codes, tmp_path / "out") == "Wav2Vec2Model"


def test_a_run_must_say_what_it_means(folders, tmp_path):
    with pytest.raises(UserError, match="wav2vec2 and hubert are the same model; choose one with"):
        export_run(folders("hubert_base")[1], tmp_path / "out")
    with pytest.raises(UserError, match=r"'bart' is not known; there are mmssl, hear, .*wav2vec2"):
        export_run(tmp_path / "not looked at", tmp_path / "out", ExportSpec(format="bart"))
    with pytest.raises(UserError, match=r"no tower 'ear'; there are audio"):
        export_run(folders("hubert_base")[1], tmp_path / "out", ExportSpec(tower="ear"))
    with pytest.raises(UserError, match=r"no task 'x'; there are none"):
        export_run(folders("hubert_base")[1], tmp_path / "out", ExportSpec(task="x"))
    with pytest.raises(UserError, match=r"towers\.audio\.modality: 'audio' has no counterpart"):
        export_run(folders("hubert_base")[1], tmp_path / "out", ExportSpec(format="vit_mae"))


def test_of_several_towers_one_is_named(tmp_path):
    run = run_of(tmp_path, "runs/wav2vec2_base_tiny", *WAVE_RUN, "towers.ear={use: wave_tiny}")
    several = r"which tower\? say tower=NAME; there are audio, ear, or format=mmssl, .* the whole"
    with pytest.raises(UserError, match=several):
        export_run(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"towers\.ear: no view reads it"):
        export_run(run, tmp_path / "out", ExportSpec(tower="ear"))
    assert export_run(run, tmp_path / "out", ExportSpec(tower="audio")) == "Wav2Vec2Model"


def test_a_tower_that_no_model_type_can_say_names_all_reasons(tmp_path):
    run = run_of(tmp_path, "runs/wav2vec2_base_tiny", *WAVE_RUN, "towers.audio.registers=1")
    with pytest.raises(UserError, match="no model type can say what it is") as error:
        export_run(run, tmp_path / "out")
    assert "\n  wav2vec2: towers.audio.registers: 1 has no counterpart" in str(error.value)
    assert "\n  vit_mae: towers.audio.modality: 'audio' has no" in str(error.value)


def test_a_shared_backbone_is_refused(tmp_path):
    shared = "shared={kind: transformer, width: 32, layers: 1, head_size: 16}"
    changes = (*WAVE_RUN, shared, "towers.audio.backbone=null")
    run = run_of(tmp_path, "runs/wav2vec2_base_tiny", *changes)
    with pytest.raises(
        UserError, match=r"towers\.audio\.backbone: only a tower with a transformer"
    ):
        export_run(run, tmp_path / "out")


# ---------------------------------------------------------------- command line


def test_the_verbs(folders, tmp_path, capsys):
    source, _, _ = folders("wavlm_base")
    assert cli.main(["import", str(source), str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "tower `audio`, tasks: none; start from it with towers.audio.init=" in said
    assert "left behind" in said
    assert "masked_spec_embed" in said
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"WavLMModel -> {tmp_path / 'out'}\n"
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "x"), "fromat=hubert"]) == 2
    assert "did you mean `format=...`?" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path), str(tmp_path / "y")]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
