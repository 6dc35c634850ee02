"""VATT's acceptance list on its two method files (Akbari et al. 2021)."""

import pytest
import torch
import triplet_laws as laws
from model_sizes import SIZES, closed_form_params, linear_params, position_params
from small_methods import full_batch, small, small_model
from tiny_run import gradients, take_rows
from toy_triplets import causes, recall_at_1, toy_model, train, triplets

from mmssl import config
from mmssl.build import build_model, data_shape
from mmssl.check import SPECIAL, fake_batch
from mmssl.types import UserError

MA, MBS = "avt/vatt_ma", "avt/vatt_mbs"
BOTH = pytest.mark.parametrize("name", [MA, MBS])
TRIPLETS = 128


def published(name, *overrides):
    """The method at its full size, without memory."""
    with torch.device("meta"):
        return build_model(config.load(name, overrides), 65536, SPECIAL)


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


# ---------------------------------------------------------------- sizes


@BOTH
def test_token_counts_and_position_tables(name):
    spec, model = config.load(name), published(name)
    grids = {v: model.towers[v].grid_of(data_shape(v, view)) for v, view in spec.views.items()}
    assert grids == {"video": (8, 14, 14), "audio": (1200,), "text": (16,)}
    assert 8 * 14 * 14 == 1568
    tables = {
        v: sum(p.shape[0] for n, p in t.named_parameters() if n.startswith("positions.axis"))
        for v, t in model.towers.items()
    }
    # text: T5's relative bias in MBS, 16 learned vectors in the agnostic model
    assert tables == {"video": 36, "audio": 1200, "text": 16 if name == MA else 0}
    bias = [n for n, _ in model.named_parameters() if "relative" in n]
    assert len(bias) == (0 if name == MA else 1)


@pytest.mark.parametrize(
    ("size", "table"), [("base", 87.9e6), ("medium", 155.0e6), ("large", 306.1e6)]
)
def test_video_towers_are_within_one_percent_of_the_table(size, table):
    s = SIZES[size]
    key = "towers.video.backbone"
    model = published(
        MBS, f"{key}.layers={s.layers}", f"{key}.width={s.width}", f"{key}.hidden={s.hidden}"
    )
    total = count(model.towers["video"])
    assert abs(total / table - 1) < 0.01
    inputs = linear_params(4 * 16 * 16 * 3, s.width) + position_params(
        (8, 14, 14), s.width, norm=True
    )
    assert total == inputs + s.width + closed_form_params(s)


def test_the_file_of_mbs_is_medium_base_small():
    model = published(MBS)
    assert abs(count(model.towers["video"]) / 155.0e6 - 1) < 0.01
    audio = linear_params(128, 768) + position_params((1200,), 768, norm=True) + 768
    assert count(model.towers["audio"]) == audio + closed_form_params(SIZES["base"]) == 86_078_976
    text = linear_params(300, 512) + 512 + closed_form_params(SIZES["text"], relative_buckets=32)
    assert count(model.towers["text"]) == text == 19_070_208
    # the table says 264 M; its text tower does not follow from its own dimensions
    assert abs(count(*model.towers.values()) / 264e6 - 1) < 0.02


def test_the_agnostic_model_equals_its_closed_form():
    model = published(MA)
    total = closed_form_params(SIZES["medium"])
    for raw, places in ((3072, 36), (128, 1200), (300, 16)):
        total += linear_params(raw, 1024) + 2 * linear_params(1024, 1024)
        total += position_params((places,), 1024, norm=True) + 1024
    assert count(model.trunk, *model.towers.values()) == total == 162_332_672
    assert all(tower.own_trunk is None for tower in model.towers.values())


@BOTH
def test_heads_are_the_released_ones(name):
    heads = published(name).tasks["align"].embedder.heads
    widths = {
        "video": 1024,
        "audio": 1024 if name == MA else 768,
        "text": 1024 if name == MA else 512,
    }
    norm = 2 * 512
    want = widths["video"] * 512 + norm + 512 * 512 + norm  # no biases but the norms'
    want += widths["audio"] * 512 + 512 + widths["text"] * 256 + 256
    want += 512 * 256 + 2 * 256
    assert count(heads) == want


# ---------------------------------------------------------------- DropToken


def at_full_grids(name, *overrides):
    """Small towers on the published token grids."""
    grids = ("views.video.size=224", "views.video.crop_s=3.2", "views.audio.crop_s=3.2")
    return small_model(small(name, *grids, *overrides))


@pytest.fixture(scope="module")
def full_size():
    """VATT-MA's towers at width 16 and one clip of the published size."""
    model = at_full_grids(MA)
    return model, fake_batch(model.spec, 1, missing=False)


def test_half_of_the_video_and_audio_tokens_are_dropped_in_training_only(full_size):
    model, batch = full_size
    kept = {}
    for mode in (True, False):
        passes = model.train(mode).passes(batch, 0.0)
        with torch.no_grad():
            tokens = {v: passes.tokens(v) for v in ("video", "audio", "text")}
        kept[mode] = {v: int((~t.pad_PN[0]).sum()) for v, t in tokens.items()}
        assert {v: t.pad_PN.shape[1] for v, t in tokens.items()} == {
            "video": 1568,
            "audio": 1200,
            "text": 8,
        }
    assert kept[True] == {"video": 784, "audio": 600, "text": 8}
    assert kept[False] == {"video": 1568, "audio": 1200, "text": 8}


@BOTH
def test_dropping_nothing_is_no_droptoken_bit_for_bit(name):
    off = [f"towers.{v}.drop_tokens=0" for v in ("video", "audio")]
    never = small_model(small(name, *off)).train()
    evaluated = small_model(small(name)).eval()
    batch = full_batch(never.spec, 2)
    for view in ("video", "audio", "text"):
        a, b = (m.passes(batch, 0.0).tokens(view) for m in (never, evaluated))
        assert torch.equal(a.x_PND, b.x_PND)
        assert torch.equal(a.extra["agg"], b.extra["agg"])


@BOTH
def test_the_global_token_does_not_see_the_order_of_the_kept_tokens(name):
    model = small_model(small(name)).eval()
    batch = full_batch(model.spec, 2)
    for view in ("video", "audio"):
        want = model.passes(batch).tokens(view)
        order = torch.randperm(want.x_PND.shape[1], generator=torch.Generator().manual_seed(0))
        index = order.expand(2, -1)
        tower = model.towers[view]
        tower.dropper.forward = lambda x, u, drop, pad, order=order, index=index: (
            x[:, order],
            index,
            pad,
        )
        got = model.passes(batch).tokens(view)
        torch.testing.assert_close(got.extra["agg"], want.extra["agg"], atol=1e-5, rtol=0)


def test_positions_are_added_before_tokens_are_dropped():
    """Dropped or not, a token carries the position of its own place into the transformer."""
    model = small_model(small(MA)).train()
    batch = full_batch(model.spec, 2)
    model.trunk.forward = lambda x, pad, modality=None: (x, [])
    model.towers["audio"].post = None
    tower = model.towers["audio"]
    tokens = model.passes(batch, 0.0).tokens("audio")
    kept = ~tokens.pad_PN
    assert 0 < int(kept.sum()) < kept.numel()
    stem, grid = tower.stem(tower.inputs(batch.views["audio"]))
    placed = tower.pre(stem) + tower.positions.vectors(grid)
    torch.testing.assert_close(tokens.x_PND[kept], placed[kept])


# ---------------------------------------------------------------- one backbone for all


def test_losses_of_all_modalities_reach_the_same_trunk_tensors():
    model = small_model(small(MA)).train()
    batch = full_batch(model.spec, 3)
    g = torch.Generator().manual_seed(0)
    names = [n for n, _ in model.trunk.named_parameters()]
    for view in ("video", "audio", "text"):
        agg = model.passes(batch, 0.0).tokens(view).extra["agg"]
        loss = (agg * torch.randn(agg.shape, generator=g)).sum()
        grads = torch.autograd.grad(loss, list(model.trunk.parameters()))
        # a bias of the keys shifts all scores of a query alike and has no gradient
        assert all(float(grad.abs().max()) > 0 for grad in grads), view
        assert len(names) == len(grads)


def test_each_term_reaches_the_trunk_through_both_of_its_modalities():
    for pair, views in (("va", {"video", "audio"}), ("vt", {"video", "text"})):
        other = "vt" if pair == "va" else "va"
        model = small_model(small(MA, f"tasks.align.pairs.{other}.weight=0"))
        _, grads = gradients(model, full_batch(model.spec, 4))
        reached = {
            n.split(".")[1]
            for n, x in grads.items()
            if n.startswith("towers.") and x.abs().max() > 0
        }
        assert reached == views
        assert all(float(x.abs().max()) > 0 for n, x in grads.items() if n.startswith("trunk."))


AT = "tasks.align.pairs.at={between: [audio, text], space: vat, objective: {kind: mil_nce}}"


def test_a_batch_without_video_leaves_its_tokeniser_alone():
    model = small_model(small(MA, AT, "tasks.align.heads.audio_norm=true"))
    batch = full_batch(model.spec, 4)
    batch.views["video"] = laws.without(batch.views["video"], [0, 1, 2, 3])
    loss, grads = gradients(model, batch)
    assert float(loss) > 0
    assert set(grads) == {n for n, _ in model.named_parameters()}
    video = [n for n in grads if n.startswith("towers.video.")]
    assert video
    assert all(float(grads[n].abs().max()) == 0.0 for n in video)
    assert max(float(x.abs().max()) for n, x in grads.items() if n.startswith("trunk.")) > 0


@BOTH
def test_a_text_only_batch_trains_nothing(name):
    model = small_model(small(name))
    batch = take_rows(full_batch(model.spec, 4), [0, 1])
    for view in ("video", "audio"):
        batch.views[view] = laws.without(batch.views[view], [0, 1])
    loss, grads = gradients(model, batch)
    assert float(loss) == 0.0
    assert all(float(x.abs().max()) == 0.0 for x in grads.values())


# ---------------------------------------------------------------- MMV's loss


@BOTH
@pytest.mark.parametrize(("form", "captions"), [("released", 5), ("strict", 1)])
def test_constant_embeddings_give_chance(name, form, captions):
    laws.constant_embeddings_give_chance(name, form, captions)


@BOTH
def test_order_of_rows_and_captions_is_free(name):
    laws.order_is_free(name)


@BOTH
def test_missing_texts_have_no_influence_but_their_videos_have(name):
    laws.missing_texts_have_no_influence_but_their_videos_have(name)


@BOTH
def test_no_text_at_all_is_zero(name):
    laws.no_text_at_all_is_zero(name)


def test_audio_against_text_is_not_trained():
    model = small_model(small(MA, AT))
    with pytest.raises(UserError, match="evaluation only"):
        model.train()(full_batch(model.spec, 4), 0, 10)


# ---------------------------------------------------------------- toy triplets


def fixed_triplets():
    text = torch.randint(10, 500, (TRIPLETS, 4), generator=torch.Generator().manual_seed(1))
    return causes(TRIPLETS, 3), text


def recalls(model, batch):
    z = {key: vectors for key, (vectors, _) in model.embed(batch).items()}
    va = recall_at_1(z["video", "va"], z["audio", "va"])
    return va, recall_at_1(z["video", "vat"], z["text", "vat"])


def test_the_agnostic_model_overfits_toy_triplets():
    posts = [f"towers.{v}.post=64" for v in ("video", "audio", "text")]
    model = toy_model(MA, *posts, width=64)
    batch = triplets(*fixed_triplets())
    train(model, lambda step: batch, 140, 4e-3)
    va, vt = recalls(model, batch)
    assert va > 0.95
    assert vt > 0.95


def test_with_shuffled_text_only_audio_is_found():
    """Text of another row at every step: nothing can be learned from it, or memorised."""
    model = toy_model(MBS, width=64)
    cause, text = fixed_triplets()

    def shuffled(step):
        order = torch.randperm(TRIPLETS, generator=torch.Generator().manual_seed(step))
        return triplets(cause, text[order])

    train(model, shuffled, 80, 5e-3)
    va, vt = recalls(model, triplets(cause, text))
    assert va > 0.95
    assert vt <= 4 / TRIPLETS


# ---------------------------------------------------------------- other resolutions


def test_positions_of_other_grids():
    """320 px: 8 + 20 + 20 vectors; at the native size the tables themselves, to 1e-4."""
    model = small_model(small(MBS))
    positions = model.towers["video"].positions
    assert positions.native == (8, 14, 14)
    for axis, size in enumerate((8, 14, 14)):
        table = getattr(positions, f"axis{axis}")
        torch.testing.assert_close(positions.table(axis, size), table, atol=1e-4, rtol=0)
    wide = positions.table(1, 20)
    assert wide.shape == (20, 16)
    torch.testing.assert_close(wide[[0, -1]], positions.axis1[[0, -1]], atol=1e-4, rtol=0)
    assert positions.vectors((8, 20, 20)).shape == (3200, 16)
    assert model.towers["video"].grid_of((32, 320, 320, 3)) == (8, 20, 20)
