"""The motion channel: what differs from the clip's background."""

import torch

from mmssl.frontends.video import Frames, background, median_of_nine, motion


def test_median_network_equals_the_median():
    x = torch.randint(0, 256, (9, 5, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(median_of_nine(list(x)), x.median(0).values)


def test_background_removes_what_moves_and_the_channel_shows_it():
    still = torch.randint(0, 200, (1, 1, 8, 16, 3), generator=torch.Generator().manual_seed(1))
    frames = still.repeat(1, 16, 1, 1, 1).to(torch.uint8)
    for t in range(16):
        frames[0, t, 2:5, t] = 255
    assert torch.equal(background(frames)[:, 0], still[:, 0].to(torch.uint8))
    moved = motion(frames)[0, ..., 0] > 0.2
    for t in range(16):
        expected = torch.zeros(8, 16, dtype=torch.bool)
        expected[2:5, t] = True
        assert torch.equal(moved[t], expected)


def test_a_still_clip_has_no_motion_and_colours_keep_their_channels():
    frames = torch.randint(0, 256, (2, 1, 4, 4, 3), dtype=torch.uint8).repeat(1, 5, 1, 1, 1)
    out = Frames(channels="rgb_motion")(frames)
    assert out.shape == (2, 4, 5, 4, 4)
    assert float(out[:, 3].abs().max()) == 0.0
    torch.testing.assert_close(out[:, :3], Frames()(frames))
    torch.testing.assert_close(out[:, 3:], Frames(channels="motion")(frames))


def test_the_foreground_is_the_colours_weighed_by_the_motion():
    frames = torch.randint(0, 256, (2, 9, 4, 4, 3), dtype=torch.uint8)
    rgb, moving = Frames()(frames), Frames(channels="motion")(frames)
    out = Frames(channels="foreground")(frames)
    torch.testing.assert_close(out, torch.cat([rgb * moving, moving], dim=1))
    assert (
        float(Frames(channels="foreground")(frames[:, :1].expand(-1, 9, -1, -1, -1)).abs().max())
        == 0.0
    )


def test_frames_behind_the_end_do_not_count():
    frames = torch.randint(0, 256, (1, 12, 4, 4, 3), dtype=torch.uint8)
    alone = motion(frames[:, :7])
    padded = motion(frames, torch.tensor([7]))
    assert torch.equal(padded[:, :7], alone)
