"""Waveforms, frames and token ids as signals."""

import pytest
import torch

from mmssl.frontends.text import FrozenTextEmbedding, TextEmbedding
from mmssl.frontends.video import Frames
from mmssl.frontends.waveform import Waveform
from mmssl.types import UserError


def test_frames_scale_to_both_ranges():
    frames = torch.zeros(1, 2, 4, 6, 3, dtype=torch.uint8)
    frames[0, 1, 2, 3] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    signed, unit = Frames("signed")(frames), Frames("unit")(frames)
    assert signed.shape == (1, 3, 2, 4, 6)
    torch.testing.assert_close(signed[0, :, 1, 2, 3], torch.tensor([1.0, -0.6, -1.0]))
    torch.testing.assert_close(unit[0, :, 1, 2, 3], torch.tensor([1.0, 0.2, 0.0]))
    assert Frames().grid((2, 4, 6, 3)) == (2, 4, 6)


def test_frames_standardised_by_the_statistics_of_imagenet():
    frames = torch.randint(256, (1, 2, 4, 6, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = ((frames / 255 - mean) / std).movedim(-1, 1)
    torch.testing.assert_close(Frames("imagenet")(frames), wanted, atol=1e-6, rtol=1e-5)


def test_folded_frames_are_channels_last_without_a_copy():
    signal = Frames()(torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8))
    folded = signal.transpose(1, 2).flatten(0, 1)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert folded.data_ptr() == signal.data_ptr()


def test_lengths_zero_the_rest():
    frames = torch.full((1, 3, 2, 2, 3), 255, dtype=torch.uint8)
    signal = Frames()(frames, torch.tensor([2]))
    assert signal[:, :, :2].min() == 1.0
    assert signal[:, :, 2:].abs().max() == 0.0
    wave = Waveform(2.0)(torch.ones(2, 5), torch.tensor([5, 3]))
    assert wave.shape == (2, 1, 5)
    assert wave.sum(dim=(1, 2)).tolist() == [10.0, 6.0]
    lengths = torch.tensor([1, 2])
    assert Waveform().out_lengths(lengths) is Frames().out_lengths(lengths)
    assert Waveform().grid((7,)) == (7,)


def test_wrong_signals_are_refused():
    with pytest.raises(UserError, match="values"):
        Frames("centred")
    for bad in (torch.zeros(1, 2, 4, 4, 3), torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(UserError, match="uint8 frames"):
            Frames()(bad)
    with pytest.raises(UserError, match="mono"):
        Waveform()(torch.zeros(2, 2, 100))


def test_embedding_is_a_lookup():
    embedding = TextEmbedding(50, 8)
    vectors, grid = embedding(torch.tensor([[3, 3, 49]]))
    assert grid == (3,) == embedding.grid((3,))
    assert torch.equal(vectors[0, 0], embedding.table.weight[3])
    assert torch.equal(vectors[0, 0], vectors[0, 1])


def test_frozen_table_trains_its_projection_only():
    table = torch.randn(20, 5)
    embedding = FrozenTextEmbedding(20, 8, 5, table)
    vectors, _ = embedding(torch.tensor([[1, 19]]))
    torch.testing.assert_close(vectors[0, 1], embedding.proj(table[19]))
    assert {name for name, _ in embedding.named_parameters()} == {"proj.weight", "proj.bias"}
    assert torch.equal(embedding.state_dict()["table"], table)


def test_frozen_table_is_drawn_from_the_generator():
    first, second = (
        FrozenTextEmbedding(20, 8, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.table, second.table)
    with pytest.raises(UserError, match="text table"):
        FrozenTextEmbedding(20, 8, 5, torch.zeros(20, 6))
