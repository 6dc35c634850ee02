"""Dilated convolutions against torchaudio's mask network; padding, reach and TDCN++'s additions."""

import pytest
import torch
from torch import nn
from torchaudio.models.conv_tasnet import MaskGenerator

from mmssl.backbones.dilated import DilatedConvs, QuickPReLU

SIZES = {"hidden": 12, "kernel": 3, "blocks": 3, "repeats": 2}


def shuffled(net):
    """All weights drawn anew, gains and biases of norms included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.3)
    return net


def make(**options):
    return shuffled(DilatedConvs(6, 10, **SIZES | options).double())


def test_it_is_the_network_of_torchaudio():
    peer = MaskGenerator(10, 2, 3, 6, 12, 3, 2, "relu").double()
    net = make()
    ours, theirs = list(net.parameters()), list(peer.parameters())
    names = {n: p for n, p in peer.named_parameters()}
    pairs = {"input_norm": net.norm, "input_conv": net.enter, "output_prelu": net.leave}
    for i, block in enumerate(net.blocks):
        layers = [block.enter, block.activations[0], block.norms[0], block.along]
        layers += [block.activations[1], block.norms[1]]
        pairs |= {f"conv_layers.{i}.conv_layers.{k}": layer for k, layer in enumerate(layers)}
        pairs[f"conv_layers.{i}.skip_out"] = block.skip
        if block.residual is not None:
            pairs[f"conv_layers.{i}.res_out"] = block.residual
    with torch.no_grad():
        for name, part in pairs.items():
            for key, value in part.named_parameters():
                names[f"{name}.{key}"].copy_(value)
    head = peer.output_conv
    assert len(theirs) == len(ours) + 2  # weight and bias of the masks' convolution
    x_BNE = torch.randn(2, 20, 10, dtype=torch.float64)
    found, _ = net(x_BNE)
    masks = peer(x_BNE.transpose(1, 2))
    ours_BKN = head(found.transpose(1, 2)).relu()
    torch.testing.assert_close(ours_BKN, masks.flatten(1, 2), rtol=1e-10, atol=1e-12)


def test_the_activation_is_that_of_torch():
    ours, theirs = QuickPReLU(init=0.3).double(), nn.PReLU(init=0.3).double()
    results = []
    for part in (ours, theirs):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        y = part(x)
        y.square().sum().backward()
        results.append((y, x.grad, part.weight.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"norm": "feature", "long_skips": True}])
def test_padding_changes_nothing_before_it(options):
    net = make(**options)
    x = torch.randn(2, 14, 10, dtype=torch.float64)
    pad = torch.arange(14) >= torch.tensor([[9], [14]])
    found, hidden = net(x.masked_fill(pad[..., None], 1e3), pad, return_hidden=True)
    alone, _ = net(x[:1, :9])
    torch.testing.assert_close(found[:1, :9], alone)
    torch.testing.assert_close(found[1:], net(x[1:])[0])
    assert len(hidden) == net.layers == 6


def test_a_token_sees_both_sides_and_no_further():
    net = make()
    for part in net.modules():  # norms over time see everything
        if isinstance(part, nn.GroupNorm):
            part.forward = lambda x, pad=None: x
    x = torch.randn(1, 61, 10, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(net(x)[0][0, 30].sum(), x)
    places = seen[0].abs().sum(1).nonzero()[:, 0].tolist()
    assert places == list(range(30 - 14, 30 + 14 + 1))  # (1 + 2 + 4) * 2


def test_features_are_normed_by_themselves():
    """A channel that is ten times as loud changes nothing behind a norm of its own."""
    net = make(norm="feature")
    x = torch.randn(1, 30, 10, dtype=torch.float64)
    louder = x * torch.linspace(1, 10, 10)
    torch.testing.assert_close(net(x)[0], net(louder)[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(make()(x)[0], make()(louder)[0], rtol=1e-2)


def test_long_skips_bring_the_inputs_of_earlier_repeats():
    net = make(long_skips=True, repeats=3)
    assert [len(part) for part in net.bridges] == [0, 1, 2]
    plain = DilatedConvs(6, 10, **SIZES | {"repeats": 3}).double()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "bridges" not in k})
    x = torch.randn(1, 10, 10, dtype=torch.float64)
    assert not torch.allclose(net(x)[0], plain(x)[0])
    with torch.no_grad():
        for part in net.bridges.parameters():
            part.zero_()
    torch.testing.assert_close(net(x)[0], plain(x)[0])
