"""Length arithmetic against torch's own shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmssl.frontends.lengths import (
    conv_length,
    patch_grid,
    same_padding,
    spectrogram_frames,
    stack_field,
    stack_length,
)
from mmssl.frontends.patches import stack_lengths
from mmssl.types import UserError

layers = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4
)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), layers)
def test_stack_length_is_the_shape_of_real_convolutions(length, stack):
    x = torch.zeros(1, 1, length)
    expected = length
    for kernel, stride, padding in stack:
        if x.shape[-1] + 2 * padding < kernel:
            expected = 0
            break
        x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, kernel), None, stride, padding)
        expected = x.shape[-1]
    columns = [list(c) for c in zip(*stack, strict=True)]
    if expected:
        assert stack_length(length, *columns) == expected
        assert stack_lengths(torch.tensor([length, 0]), *columns)[0] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(400, 5000), st.integers(1, 400), st.integers(1, 300))
def test_frames_equal_torch_stft_and_unfold(samples, win, hop):
    wave = torch.zeros(samples)
    n_fft = win + win % 2 + 2
    stft = torch.stft(wave, n_fft, hop, return_complex=True, window=torch.ones(n_fft))
    assert spectrogram_frames(samples, win, hop, "center") == stft.shape[-1]
    assert spectrogram_frames(samples, win, hop, "valid") == wave.unfold(0, win, hop).shape[0]
    assert spectrogram_frames(samples, win, hop, "pad_end") == len(range(0, samples, hop))


@settings(max_examples=40, deadline=None)
@given(layers)
def test_field_equals_the_gradient_of_one_output(stack):
    columns = [list(c) for c in zip(*stack, strict=True)]
    field = stack_field(*columns)
    x = torch.zeros(1, 1, field.size + 40 * field.stride, requires_grad=True)
    y = x
    for kernel, stride, padding in stack:
        y = torch.nn.functional.conv1d(y, torch.ones(1, 1, kernel), None, stride, padding)
    place = y.shape[-1] // 2
    y[0, 0, place].backward()
    (touched,) = torch.nonzero(x.grad[0, 0], as_tuple=True)
    assert int(touched[-1]) <= place * field.stride + field.first + (field.size - 1) / 2
    assert int(touched[0]) >= place * field.stride + field.first - (field.size - 1) / 2
    if all(kernel >= stride for kernel, stride, _ in stack):
        middle = (int(touched[0]) + int(touched[-1])) / 2
        assert middle == pytest.approx(place * field.stride + field.first)
        assert int(touched[-1] - touched[0]) + 1 == field.size


def test_twice_the_stride_centres_each_cell():
    assert stack_field([4, 4, 4], [2, 2, 2], [1, 1, 1]).first == 3.5
    assert stack_field([8, 4], [4, 2], [2, 1]).first == 3.5
    assert stack_field([3, 3, 3], [2, 2, 2], [1, 1, 1]).first == 0.0


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 30))
def test_same_padding_divides_the_length(kernel, stride, cells):
    if kernel >= stride and (stride > 1 or kernel % 2):
        length = conv_length(cells * stride, kernel, stride, same_padding(kernel, stride))
        assert length == cells


def test_patch_grid_cuts_the_remainder_and_names_what_is_wrong():
    assert patch_grid((33, 230, 224), (4, 16, 16)) == (8, 14, 14)
    with pytest.raises(UserError, match="smaller than one patch"):
        patch_grid((3, 224, 224), (4, 16, 16))
    with pytest.raises(UserError, match="2 axes"):
        patch_grid((32, 224, 224), (16, 16))
    with pytest.raises(UserError, match="framing"):
        spectrogram_frames(16000, 400, 160, "centre")


@pytest.mark.parametrize(
    ("samples", "win", "hop", "framing", "frames"),
    [
        (16000, 400, 160, "valid", 98),  # COLA's release
        (48000, 512, 242, "valid", 197),  # L3-Net
        (48000, 2048, 242, "center", 199),  # OpenL3, mel
        (153600, 2048, 1024, "pad_end", 150),  # MMV
    ],
)
def test_published_frame_counts(samples, win, hop, framing, frames):
    assert spectrogram_frames(samples, win, hop, framing) == frames
