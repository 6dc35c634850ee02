"""APC's and VQ-APC's acceptance lists (Chung et al. 2019, 2020)."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import mutual_info_score
from small_methods import full_batch, small, small_model, values
from torch import nn
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.specs import RunSpec
from mmssl.types import UserError


def shorter(batch, *lengths):
    view = batch.views["x"]
    return replace(batch, views={"x": replace(view, lengths_P=torch.tensor(lengths))})


def published(name):
    with torch.device("meta"):
        return build_model(config.load(f"audio/{name}"), 0, None)


def test_published_sizes():
    gru = 3 * 512 * (80 + 512 + 2) + 2 * 3 * 512 * (1024 + 2)
    model = published("apc")
    assert model.tasks["future"].steps == (3,)
    assert sum(p.numel() for p in model.parameters()) == gru + 512 * 80 + 80
    model = published("vq_apc")
    assert model.tasks["future"].steps == (5,)
    codebook = 512 * 512 + 512 + 512 * 512
    assert sum(p.numel() for p in model.parameters()) == gru + codebook + 512 * 80 + 80


# ---------------------------------------------------------------- parity


class Peer(nn.Module):
    """The released modules, rebuilt of torch's parts from the papers."""

    def __init__(self, model, vq):
        super().__init__()
        blocks = model.towers["audio"].trunk.blocks
        self.layers = nn.ModuleList(
            nn.GRU(b.input_size, b.hidden_size, batch_first=True) for b in blocks
        )
        self.layers.load_state_dict(blocks.state_dict())
        target = model.tasks["future"].target
        self.out = nn.Linear(target.heads.weight_SKD.shape[-1], 80)
        state = {"weight": target.heads.weight_SKD[0], "bias": target.heads.bias_K}
        self.out.load_state_dict(state)
        self.logits = target.quantizer.logits if vq else None
        self.book = target.quantizer.codebook[0] if vq else None

    def forward(self, x_PTF, lengths, gumbel_PTV=None):
        """Features and predictions, with packed sequences as in the releases."""
        for i, layer in enumerate(self.layers):
            packed = nn.utils.rnn.pack_padded_sequence(
                x_PTF, lengths, batch_first=True, enforce_sorted=False
            )
            new, _ = nn.utils.rnn.pad_packed_sequence(
                layer(packed)[0], batch_first=True, total_length=x_PTF.shape[1]
            )
            x_PTF = new + x_PTF if i else new
        if self.logits is None:
            return x_PTF, self.out(x_PTF)
        logits = self.logits(x_PTF)
        if gumbel_PTV is None:
            return x_PTF, self.out(
                F.one_hot(logits.argmax(-1), logits.shape[-1]).float() @ self.book
            )
        soft = ((logits + gumbel_PTV) / 0.5).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).float()
        return x_PTF, self.out((hard - soft.detach() + soft) @ self.book)


def frames_of(model, batch):
    tower, view = model.towers["audio"], batch.views["x"]
    return tower.inputs(view)[:, 0], tower.frames(view)


@pytest.mark.parametrize("name", ["apc", "vq_apc"])
@pytest.mark.parametrize("training", [False, True])
def test_features_loss_and_gradients_of_the_released_modules(name, training):
    ahead = {"apc": 3, "vq_apc": 5}[name]
    model = small_model(small(f"audio/{name}")).train(training)
    batch = shorter(full_batch(model.spec, 3), 6400, 4000, 6400)
    peer = Peer(model, name == "vq_apc")
    x_PTF, lengths_P = frames_of(model, batch)
    gumbel = None
    if training and name == "vq_apc":
        quantizer, seeds = model.tasks["future"].target.quantizer, batch.views["x"].seeds_P
        uniform = quantizer.noise(seeds, x_PTF.shape[1], "future/gumbel")[:, :, 0]
        gumbel = -(-uniform.clamp(min=2.0**-25).log()).log()
    features, guess = peer(x_PTF, lengths_P, gumbel)
    tokens = model.passes(batch, 0.0).tokens("x")
    valid = ~tokens.pad_PN
    assert valid.sum(1).tolist() == lengths_P.tolist() == [38, 23, 38]
    torch.testing.assert_close(tokens.x_PND[valid], features[valid], rtol=0, atol=1e-5)
    error = (guess[:, :-ahead] - x_PTF[:, ahead:]).abs()[valid[:, ahead:]]
    term = model.tasks["future"](model.passes(batch, 0.0), batch)[""]
    assert int(term.count) == 80 * sum(n - ahead for n in (38, 23, 38))
    torch.testing.assert_close(term.sum / term.count, error.mean(), rtol=1e-5, atol=1e-6)
    error.mean().backward()
    (term.sum / term.count).backward()
    for ours, theirs in zip(model.towers["audio"].trunk.blocks, peer.layers, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if p.grad is None:  # evaluation of VQ-APC sends none through the choice
                assert (name, training) == ("vq_apc", False)
                continue
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what is seen


class Given(nn.Module):
    """A front-end that hands over what stands in the place of the waveform: (P, T * F)."""

    first_centre = 0.0

    def __init__(self, bands):
        super().__init__()
        self.bands = bands

    def grid(self, shape):
        return shape[0] // self.bands, self.bands

    def out_lengths(self, lengths_P):
        return lengths_P // self.bands

    def forward(self, x_PS, lengths_P=None):
        return x_PS.view(x_PS.shape[0], 1, -1, self.bands)


def given(name, bands, hidden, *overrides, seed=0):
    """A method on frames of so many bands that are given as they are, and a batch of zeros."""
    key = "towers.audio"
    sizes = [f"{key}.cut.patch=[1, {bands}]", f"{key}.backbone.width_in={bands}"]
    sizes += [f"{key}.backbone.width={hidden}", f"{key}.backbone.layers=1"]
    spec = config.load(f"audio/{name}", [*sizes, "views.x.crop_s=0.4", *overrides])
    model = small_model(spec, seed)
    model.towers["audio"].signal = Given(bands)
    return model


def batch_of(model, frames_PTF, seed=0):
    batch = full_batch(model.spec, len(frames_PTF), seed)
    view = batch.views["x"]
    data = frames_PTF.flatten(1)
    lengths = torch.full((len(data),), data.shape[1])
    seeds = view.seeds_P + 1000 * seed
    return replace(batch, views={"x": replace(view, data=data, lengths_P=lengths, seeds_P=seeds)})


@pytest.mark.parametrize("name", ["apc", "vq_apc"])
def test_no_token_sees_later_frames_and_no_loss_reads_padding(name):
    model = small_model(small(f"audio/{name}", "towers.audio.backbone.layers=3"))
    model.towers["audio"].signal = Given(80)
    model = model.double().train()
    frames = torch.randn(2, 20, 80, dtype=torch.float64, requires_grad=True)
    tokens = model.passes(batch_of(model, frames), 0.0).tokens("x")
    tokens.x_PND[0, 12].sum().backward()
    seen = frames.grad[0].abs().sum(-1)
    assert seen[:13].gt(0).all()
    assert seen[13:].eq(0).all()
    batch = batch_of(model, frames.detach())
    view = replace(batch.views["x"], lengths_P=torch.tensor([20 * 80, 9 * 80]))
    noisy = view.data.clone()
    noisy[1, 9 * 80 :] = 7.0
    ours, theirs = (
        values(model, replace(batch, views={"x": replace(view, data=data)}))
        for data in (view.data, noisy)
    )
    assert ours == theirs


def test_the_target_is_data():
    """What is predicted gets no gradient: that of the last frames, which predict nothing, is 0."""
    model = given("apc", 4, 8).double()
    frames = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    batch = batch_of(model, frames)
    model.tasks["future"](model.passes(batch, 0.0), batch)[""].sum.backward()
    assert frames.grad[:, :17].abs().sum(-1).gt(0).all()
    assert frames.grad[:, 17:].eq(0).all()


# ---------------------------------------------------------------- what is learned


def trained(model, draw, steps, lr):
    """Mean terms of the last 20 steps, each on new frames."""
    optimiser = torch.optim.Adam(model.train().parameters(), lr)
    sums = {}
    for step in range(steps):
        batch = batch_of(model, draw(step), step)
        loss, terms = model(batch, step, steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= steps - 20:
            for key, t in terms.items():
                sums[key] = sums.get(key, 0.0) + float(t.sum / t.count) / 20
    return sums


def walk(step, rows=8, frames=60, bands=4, keep=0.9):
    """Independent AR(1) bands of unit variance."""
    noise = torch.randn(rows, frames, bands, generator=torch.Generator().manual_seed(step))
    x = [noise[:, 0]]
    for t in range(1, frames):
        x.append(keep * x[-1] + math.sqrt(1 - keep**2) * noise[:, t])
    return torch.stack(x, 1)


def test_three_frames_of_a_walk_are_predicted_as_well_as_can_be():
    """Zero costs 0.798, copying 0.587, the best guess 0.9^3 x 0.546: below is a leak."""
    error = trained(given("apc", 4, 16, "tasks.future.first=3"), walk, 120, 2e-2)["future"]
    best = math.sqrt(2 / math.pi * (1 - 0.9**6))
    assert best == pytest.approx(0.546, abs=1e-3)
    assert best - 0.006 < error < 0.565


def test_one_code_says_nothing():
    """V = 1: a constant, which costs the mean deviation of the bands."""
    one = ("entries=1", "width=8")
    model = given("vq_apc", 4, 8, *(f"tasks.future.target.quantizer.{k}" for k in one))
    found = trained(model, walk, 40, 3e-2)
    assert found["future"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.03)
    assert found["future.perplexity"] == pytest.approx(1.0, abs=1e-6)


def chain(step, rows=8, frames=30):
    """States of a slow Markov chain and their noisy spectra."""
    generator = torch.Generator().manual_seed(step)
    states = [torch.randint(4, (rows,), generator=generator)]
    for _ in range(frames - 1):
        jump = torch.rand(rows, generator=generator) < 0.05
        other = torch.randint(4, (rows,), generator=generator)
        states.append(torch.where(jump, other, states[-1]))
    states = torch.stack(states, 1)
    means = 2 * torch.eye(4) - 0.5
    noise = torch.randn(rows, frames, 4, generator=generator)
    return states, means[states] + 0.2 * noise


def test_states_and_codes_say_the_same():
    """First values decide whether all four codes stay in use, as they do in four draws of five."""
    found = []
    for seed in range(3):
        four = ("entries=4", "width=16")
        overrides = [f"tasks.future.target.quantizer.{k}" for k in four]
        model = given("vq_apc", 4, 16, "tasks.future.first=1", *overrides, seed=seed)
        trained(model, lambda step: chain(step)[1], 300, 1e-2)
        states, frames = chain(10_000, rows=32)
        ids = codes_of(model.eval(), frames, 0)
        joint = torch.zeros(4, 4).index_put_(
            (states.flatten(), ids.flatten()), torch.ones(states.numel()), accumulate=True
        )
        assert float((joint.amax(1) / joint.sum(1)).min()) > 0.98  # every state has one code
        found.append(mutual_info_score(None, None, contingency=joint.numpy()))
    assert max(found) > 1.25, found  # nats, of ln 4 = 1.386
    assert min(found) > 0.8


def codes_of(model, frames, seed):
    seen = []
    quantizer = model.tasks["future"].target.quantizer
    hook = quantizer.register_forward_hook(lambda *a: seen.append(a[2].ids_PNG[..., 0]))
    model(batch_of(model, frames, seed), 0, 10)
    hook.remove()
    return seen[0]


def test_training_draws_noise_of_the_rows_seeds_and_evaluation_none():
    model, frames = given("vq_apc", 4, 16), chain(0)[1]
    first, again, other = (codes_of(model.train(), frames, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(codes_of(model.eval(), frames, 0), codes_of(model, frames, 1))


# ---------------------------------------------------------------- towers


def test_apc_on_the_shared_transformer():
    """Another backbone is one line, and a map of the frames to its width."""
    shared = "shared={width: 16, layers: 1, head_size: 8, causal: true}"
    lines = ("towers.audio.backbone=shared", "towers.audio.cut.project=true", shared)
    model = small_model(config.load("audio/apc", ["views.x.crop_s=0.4", *lines]))
    assert values(model, full_batch(model.spec, 3))["future"] == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["towers.audio.cut.patch=[1, 40]"], r"patches: 40 numbers .* that reads 80; make them"),
        (
            ["towers.audio.backbone=shared", "shared={width: 80, layers: 1, head_size: 8}"],
            r"tasks\.future: the backbone of towers\.audio sees .* recurrent or causal_conv",
        ),
        (
            ["towers.audio.positions.kind=conv", "towers.audio.positions.groups=8"],
            r"tasks\.future: the positions of towers\.audio are convolutions that look ahead",
        ),
    ],
)
def test_towers_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load("audio/apc", overrides), 0, None)


def test_recurrent_towers_know_their_layers():
    from mmssl.build.policy import policy_of

    tree = small("audio/apc", "towers.audio.backbone.layers=3").model_dump(by_alias=True)
    tree["towers"]["audio"] |= {"layer_decay": 0.5}
    model = small_model(RunSpec.model_validate(tree))
    found = {name: rate for name, (rate, _) in policy_of(model.spec, model).items()}
    rates = [found[f"towers.audio.own_trunk.blocks.{i}.weight_hh_l0"] for i in range(3)]
    assert rates == [0.125, 0.25, 0.5]
