"""APC and VQ-APC against s3prl's network with the same weights (Chung et al. 2019, 2020).

The module is the one that s3prl's upstreams run; `s3prl.nn.rnn_apc` computes the same, but its
package asks for an older torchaudio. What differs, and is kept out of the comparison:
- s3prl drops out behind the last layer, too (ours: between layers, as APC's authors); here 0.
- Behind a row's end it gives zeros or the bias of the last map; ours means nothing there.
- Each of its groups has logits of its own slice of the features, ours of all: a block-diagonal map.
- It leaves out the loss. Here the frames are cut as the authors do: x_1 ... x_{T-n} are heard.
"""

from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

from mmssl.targets.later import Heard

s3prl = pytest.importorskip(
    "s3prl.upstream.apc.apc", reason="pip install --no-deps -r tests/peers.txt"
)

WIDTH, ENTRIES = 16, 24
SAMPLES = (6400, 4000, 5200)  # of the rows; 38, 23 and 31 frames


def ours(name, groups):
    sizes = ["towers.audio.backbone.layers=3"]
    if groups:
        book = {"groups": groups, "entries": ENTRIES, "width": WIDTH}
        sizes += [f"tasks.future.target.quantizer.{k}={v}" for k, v in book.items()]
    model = small_model(small(f"audio/{name}", *sizes))
    if groups:
        own = torch.eye(groups).repeat_interleave(ENTRIES, 0).repeat_interleave(WIDTH // groups, 1)
        quantizer = model.tasks["future"].target.quantizer
        with torch.no_grad():
            quantizer.logits.weight.mul_(own)
            quantizer.logits.bias.normal_(std=0.2)
    batch = full_batch(model.spec, len(SAMPLES))
    view = replace(batch.views["x"], lengths_P=torch.tensor(SAMPLES))
    return model, replace(batch, views={"x": view})


def twin(model, groups):
    """s3prl's network, holding our weights."""
    vq = None
    if groups:
        vq = {"codebook_size": [ENTRIES] * groups, "code_dim": [WIDTH // groups] * groups}
        vq["gumbel_temperature"] = 0.5
    peer = s3prl.APC(80, WIDTH, 3, 0.0, True, vq)
    target = model.tasks["future"].target
    state = {
        f"rnn_layers.{k}": v for k, v in model.towers["audio"].trunk.blocks.state_dict().items()
    }
    state |= {"postnet.weight": target.heads.weight_SKD[0], "postnet.bias": target.heads.bias_K}
    for g in range(groups):
        logits, book = target.quantizer.logits, target.quantizer.codebook
        rows, slice_ = slots(g, groups)
        state[f"vq_layers.{g}.vq_logits.weight"] = logits.weight[rows, slice_]
        state[f"vq_layers.{g}.vq_logits.bias"] = logits.bias[rows]
        state[f"vq_layers.{g}.codebook_CxE.weight"] = book[g].T
    peer.load_state_dict(state)
    return peer.train(model.training)


def slots(group, groups):
    """Rows of our map to logits that belong to a group, and what of the features it reads."""
    width = WIDTH // groups
    return (
        slice(group * ENTRIES, (group + 1) * ENTRIES),
        slice(group * width, (group + 1) * width),
    )


class Peer:
    """A run of s3prl's network: the output of every layer and the prediction, (P, T, ...)."""

    def __init__(self, network, x_PTF, lengths_P):
        entered = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
            for layer in network.rnn_layers[1:]
        ]
        self.guess, last = network(x_PTF, lengths_P, testing=not network.training)
        frames = x_PTF.shape[1]
        below = [pad_packed_sequence(x, batch_first=True, total_length=frames)[0] for x in entered]
        self.layers = [*below, last]
        for hook in hooks:
            hook.remove()


def same_noise(monkeypatch, model, batch, frames):
    """torch's Gumbel numbers are minus the log of exponential ones: those of our rows' seeds."""
    quantizer = model.tasks["future"].target.quantizer
    uniform = quantizer.noise(batch.views["x"].seeds_P, frames, "future/gumbel")
    exponential_PTGV = -uniform.clamp(min=2.0**-25).log()
    turn = [0]

    def exponential_(x_PTV):
        group, turn[0] = turn[0] % quantizer.groups, turn[0] + 1
        return x_PTV.copy_(exponential_PTGV[:, : x_PTV.shape[1], group])

    monkeypatch.setattr(torch.Tensor, "exponential_", exponential_)


CASES = [("apc", 0, False), ("apc", 0, True)]
CASES += [("vq_apc", groups, training) for groups in (1, 2) for training in (False, True)]


@pytest.mark.parametrize(("name", "groups", "training"), CASES)
def test_layers_and_predictions(monkeypatch, name, groups, training):
    """Every layer, residual and all, and what the last map says, at all frames of rows."""
    model, batch = ours(name, groups)
    model.train(training)
    tower, target = model.towers["audio"], model.tasks["future"].target
    x_PTF, lengths_P = tower.inputs(batch.views["x"])[:, 0], tower.frames(batch.views["x"])
    if groups and training:
        same_noise(monkeypatch, model, batch, x_PTF.shape[1])
    with torch.no_grad():
        peer = Peer(twin(model, groups), x_PTF, lengths_P)
        passes = model.passes(batch, 0.0)
        tokens = passes.tokens("x")
        valid = ~tokens.pad_PN
        _, layers = tower.trunk(x_PTF, tokens.pad_PN, return_hidden=True)
        truth = target.truth(Heard("future", "x", "x", tokens, valid, passes))
        guess = target.heads(truth.context_PND, 0)
    assert valid.sum(1).tolist() == lengths_P.tolist() == [38, 23, 31]
    for mine, theirs in zip(layers, peer.layers, strict=True):
        torch.testing.assert_close(mine[valid], theirs[valid], rtol=0, atol=1e-5)
    assert float((layers[2] - layers[1])[valid].abs().max()) > 0.1
    torch.testing.assert_close(tokens.x_PND[valid], peer.layers[-1][valid], rtol=0, atol=1e-5)
    torch.testing.assert_close(guess[valid], peer.guess[valid], rtol=0, atol=1e-5)
    if groups:  # the codes are not all one and the same
        assert len(truth.codes.ids_PNG[valid].unique(dim=0)) > 3


@pytest.mark.parametrize(("name", "groups", "training"), CASES)
def test_loss_and_gradients(monkeypatch, name, groups, training):
    """L1 of the frames so far ahead, over the frames of rows that have one."""
    model, batch = ours(name, groups)
    model.train(training)
    tower, task = model.towers["audio"], model.tasks["future"]
    ahead = {"apc": 3, "vq_apc": 5}[name]
    x_PTF, lengths_P = tower.inputs(batch.views["x"])[:, 0], tower.frames(batch.views["x"])
    if groups and training:
        same_noise(monkeypatch, model, batch, x_PTF.shape[1])
    network = twin(model, groups)
    peer = Peer(network, x_PTF[:, :-ahead], lengths_P - ahead)
    seen = torch.arange(peer.guess.shape[1]) < (lengths_P - ahead)[:, None]
    want = nn.functional.l1_loss(peer.guess[seen], x_PTF[:, ahead:][seen])
    term = task(model.passes(batch, 0.0), batch)[""]
    loss = term.sum / term.count
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-5)
    want.backward()
    loss.backward()
    target = task.target
    pairs = [(target.heads.weight_SKD.grad[0], network.postnet.weight.grad)]
    for g in range(groups):
        theirs, (rows, slice_) = network.vq_layers[g], slots(g, groups)
        pairs.append((target.quantizer.codebook.grad[g].T, theirs.codebook_CxE.weight.grad))
        if training:  # evaluation sends none through the choice
            mine = target.quantizer.logits.weight.grad[rows, slice_]
            pairs.append((mine, theirs.vq_logits.weight.grad))
    if training or not groups:
        blocks = zip(tower.trunk.blocks, network.rnn_layers, strict=True)
        for mine, theirs in blocks:
            pairs += [
                (p.grad, q.grad)
                for p, q in zip(mine.parameters(), theirs.parameters(), strict=True)
            ]
    for mine, theirs in pairs:
        assert mine.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)
