"""What the demo makes of uploads: dubbed films on the model's clock, heat, and sentences."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from demo_corpus import demo_index, demo_shards
from embed_runs import WORDS, embedding, run_folder
from media_files import click_wave, moving_frames, tone, write_media
from PIL import Image

from mmssl.data.samples import Record
from mmssl.demos import film, localize
from mmssl.demos.web import media, serve
from mmssl.demos.web.desk import Desk, Given, Shelf
from mmssl.index.corpus import PLACE
from mmssl.index.store import Index
from mmssl.types import UserError


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    shards = demo_shards(folder, 4, 1.5, (None, "audio", "video", None))
    return desk_over(demo_index(shards, folder), folder)


def desk_over(library, folder):
    (folder / "shelf").mkdir()
    return Desk(embedding("tiny"), Index.open(library), "clips", Shelf(folder / "shelf"), 5.0)


@pytest.fixture
def files(tmp_path):
    """Uploads of all kinds by name."""
    made = {
        "film.mp4": write_media(moving_frames(20), tone(2.0, 16000)),
        "other.mp4": write_media(moving_frames(20, seed=1), tone(2.0, 16000, 900)),
        "mute.mp4": write_media(moving_frames(20)),
        "sound.mp4": write_media(None, tone(2.0, 16000)),
        "long.mp4": write_media(moving_frames(60), tone(6.0, 16000)),
        "text.mp4": b"this is no film",
    }
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    return {name: str(tmp_path / name) for name in made}


def silent(share, what):
    assert 0 <= share <= 1
    assert what


def clip_of(desk, *modalities):
    """The row of a clip that has exactly these, text aside."""
    return next(
        clip
        for _, clip in desk.choices(modalities[0])
        if desk._clip(clip).has - {"text"} == set(modalities)
    )


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("text.mp4", ["video"], r"^text\.mp4: cannot be used: FFmpeg cannot open the file"),
        ("mute.mp4", ["audio", "video"], r"^mute\.mp4: has no sound$"),
        ("sound.mp4", ["video"], r"^sound\.mp4: has no pictures$"),
        ("long.mp4", ["video"], r"^long\.mp4: cannot be used: 6\.0 s exceed the limit of 5 s"),
    ],
)
def test_unfit_uploads_get_a_sentence(files, name, wanted, message):
    with pytest.raises(UserError, match=message):
        media.checked(files[name], wanted, 5.0)


def test_a_header_that_lies_about_the_length_is_seen_through(files, tmp_path, monkeypatch):
    header = media.media.probe
    monkeypatch.setattr(media.media, "probe", lambda data, limits: header(data))
    with pytest.raises(UserError, match=r"long\.mp4: cannot be used: .*exceed"):
        media.checked(files["long.mp4"], ["video"], 5.0)


# ---------------------------------------------------------------- what a browser plays


def wave_of(data, hz):
    with localize.opened(data) as reader:
        need = media.Need(hz, 0.0, reader.duration_s)
        return reader.duration_s, reader.clip(need).waveform[0].numpy()


def test_a_dubbed_film_has_the_other_sound_at_its_time():
    # the film starts late, the sound's clicks count from the sound's own beginning
    frames = moving_frames(20)
    film_data = write_media(frames, tone(2.0, 16000), video_at=0.5, audio_at=0.5)
    clicks = (0.4, 1.3)
    sound = write_media(None, click_wave(1.6, 16000, clicks), container="mp4")
    data = media.dubbed(film_data, sound)
    seconds, wave = wave_of(data, 16000)
    assert seconds == pytest.approx(2.0, abs=1e-3)
    loud = np.abs(wave) > 0.3
    starts = np.flatnonzero(loud & ~np.roll(loud, 1)) / 16000
    assert starts[0] == pytest.approx(0.4, abs=0.004)
    assert starts[starts > 1][0] == pytest.approx(1.3, abs=0.004)
    assert np.abs(wave[int(1.7 * 16000) :]).max() < 0.01  # silence behind the shorter sound
    with av.open(io.BytesIO(data)) as container:
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(shown) == 20
    blocks = np.stack(shown).reshape(20, 48, 4, 64, 4, 3).mean((2, 4))  # enlarged for the page
    errors = np.abs(blocks[:, None] - frames[None]).mean((2, 3, 4))
    assert (errors.argmin(1) == np.arange(20)).all()  # every picture at its place


@pytest.mark.parametrize(
    ("container", "options", "kept"),
    [
        ("mp4", {}, True),
        ("webm", {}, True),
        ("matroska", {"audio_codec": "ac3"}, False),
        ("mp4", {"pix_fmt": "yuv444p"}, False),
    ],
)
def test_what_a_browser_cannot_play_is_encoded_again(container, options, kept):
    wave = tone(2.0, 48000)
    data = write_media(moving_frames(20), wave, container=container, rate=48000, **options)
    both = frozenset({"audio", "video"})
    found = media.playable(Record("k", "k", 0, both, (), {}, data, None))
    assert found.kind == "video"
    assert (found.data == data) is kept
    with av.open(io.BytesIO(found.data)) as again:
        assert again.streams.video[0].codec_context.name in ("h264", "vp8")
        assert again.streams.audio[0].codec_context.name in ("aac", "opus")


def test_sounds_and_texts():
    sound = write_media(None, tone(1.0, 16000), container="ogg", audio_codec="libopus", rate=48000)
    found = media.playable(Record("k", "k", 0, frozenset({"audio"}), (), {}, None, sound))
    assert found == (sound, ".ogg", "audio")
    assert media.playable(Record("k", "k", 0, frozenset({"text"}), ("x",), {}, None, None)) is None


def test_the_shelf_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.demos.web.desk._KEPT", 2)
    shelf = Shelf(tmp_path)
    made = [media.Playable(bytes([k]), ".mp4", "video") for k in range(3)]
    sources = [shelf.put(found) for found in (made[0], made[1], made[0], made[2])]
    assert sources[0] == sources[2]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"\0", b"\2"}
    monkeypatch.setattr("mmssl.demos.web.desk._KEPT_BYTES", 3)
    for data in (b"ab", b"c", b"d", b"too long"):
        shelf.put(media.Playable(data, ".mp4", "video"))
        left = {path.read_bytes() for path in tmp_path.iterdir()}
        assert data in left
        assert len(left) == 1 or sum(map(len, left)) <= 3


# ---------------------------------------------------------------- search and localize


def test_a_caption_finds_its_clip(desk):
    for caption in WORDS:
        html = desk.search(Given(caption, None, None, None), ["text"], 1, silent)
        assert f'<p class="mmssl-caption">1. {caption}</p>' in html


def test_cards_are_of_different_clips_best_first(desk, files):
    """Three windows of two modalities in one clip are one card; it plays its best window."""
    given = Given("rain", files["sound.mp4"], None, None)
    html = desk.search(given, ["audio", "video"], 24, silent)
    keys = re.findall('data-key="([^"]+)"', html)
    assert len(set(keys)) == len(keys) == 4
    scores = [float(text) for text in re.findall(r"([+-]\d+\.\d) σ", html)]
    assert scores == sorted(scores, reverse=True)
    spans = re.findall(r"#t=(\d\.\d\d),(\d\.\d\d)", html)
    told = re.findall(r"(\d\.\d)–(\d\.\d) s", html)
    assert [(a[:3], b[:3]) for a, b in spans] == told
    assert len(spans) == 4


def test_media_files_are_played_from_where_they_are(files, tmp_path):
    """What has gone keeps its picture, and the page its others."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("film.mp4", "sound.mp4"):
        (folder / name).write_bytes(Path(files[name]).read_bytes())
    Image.fromarray(moving_frames(1)[0]).save(folder / "still.png")
    (folder / "film.txt").write_text(WORDS[0])
    desk = desk_over(demo_index(folder, tmp_path), tmp_path)

    def cards():
        html = desk.search(Given("a dog", None, None, None), ["video", "audio"], 9, silent)
        return dict(re.findall(r'data-key="([^"]+)">(.*?)<p class="mmssl-caption', html))

    found = cards()
    tags = {"film.mp4": "video", "sound.mp4": "audio", "still.png": "img"}
    assert {key: html[1:].split()[0] for key, html in found.items()} == tags
    shown = {path.read_bytes() for path in desk.shelf.folder.iterdir()}
    assert shown == {(folder / key).read_bytes() for key in tags}
    (folder / "film.mp4").unlink()
    found = cards()
    assert found["film.mp4"].startswith('<img src="data:image/jpeg;base64,')
    assert f"film.mp4: is not in {folder} any more" in found["film.mp4"]
    assert found["sound.mp4"].startswith("<audio")
    still = next(clip for text, clip in desk.choices("video") if "still.png" in text)
    with pytest.raises(UserError, match=r"still\.png: has no sound"):
        desk.localize(None, still, None, None, silent)
    with pytest.raises(UserError, match=r"still\.png: is a picture; choose a clip"):
        desk.localize(None, still, files["other.mp4"], None, silent)
    with pytest.raises(UserError, match="holds no row 'gone'"):
        desk.shown("gone")


def test_nothing_and_nowhere_are_said(desk, files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="write something"):
        desk.search(Given(" ", None, None, None), ["text"], 3, silent)
    with pytest.raises(UserError, match="choose what to look in"):
        desk.search(Given("x", None, None, None), [], 3, silent)
    with pytest.raises(UserError, match="reads only what moves"):  # the tiny run sees motion
        desk.search(Given(None, None, None, files["film.mp4"]), ["text"], 3, silent)
    path = tmp_path / "large.png"
    Image.new("1", (5000, 4000)).save(path)
    monkeypatch.setattr(Desk, "sees_stills", True)
    with pytest.raises(UserError, match=r"large\.png: .*5000 x 4000 pixels exceed"):
        desk.search(Given(None, None, None, str(path)), ["text"], 3, silent)
    with pytest.raises(UserError, match="give a video"):
        desk.localize(None, None, None, None, silent)
    with pytest.raises(UserError, match="has no sound; choose a sound"):
        desk.localize(None, clip_of(desk, "video"), None, None, silent)
    with pytest.raises(UserError, match="has no pictures"):
        desk.localize(None, clip_of(desk, "audio"), None, None, silent)
    with pytest.raises(UserError, match="nothing of the corpus"):
        desk.explore("avt", [], True, "")


def heat_in(html):
    heat = json.loads(re.search(r"data-heat='([^']+)'", html)[1])
    maps = np.frombuffer(base64.b64decode(heat["maps"]), np.uint8).reshape(heat["shape"])
    return np.array(heat["times"]), maps


def heat_of(desk, path, sound=None):
    model, views = desk.model.model, desk.model.spec.views
    swap = sound and Path(sound).read_bytes()
    return localize.heat_of(model, views, Path(path).read_bytes(), path, swap)


def test_the_stage_shows_the_maps_of_the_command(desk, files):
    times, maps = heat_in(desk.localize(files["film.mp4"], None, None, None, silent))
    found = heat_of(desk, files["film.mp4"])
    assert times == pytest.approx(found.times_N, abs=1e-3)
    assert maps == pytest.approx(255 * film.levels(found.maps_NHW), abs=0.51)
    assert maps.max() == 255


def test_another_sound_is_drawn_on_the_scale_of_the_own(desk, files):
    page = desk.localize(files["film.mp4"], None, files["other.mp4"], None, silent)
    own, other = (heat_of(desk, files["film.mp4"], s) for s in (None, files["other.mp4"]))
    assert np.abs(own.maps_NHW - other.maps_NHW).max() > 1e-3
    levels = film.levels(other.maps_NHW, film.scale(own.maps_NHW))
    assert heat_in(page)[1] == pytest.approx(255 * levels, abs=0.51)


def test_a_mute_film_is_localized_with_a_sound_of_the_corpus(desk, files):
    clip = clip_of(desk, "audio", "video")
    page = desk.localize(files["mute.mp4"], None, None, clip, silent)
    record = desk._record(desk.index.row(clip, PLACE))
    data, views = Path(files["mute.mp4"]).read_bytes(), desk.model.spec.views
    expected = localize.heat_of(desk.model.model, views, data, "x", record.video)
    assert heat_in(page)[1] == pytest.approx(255 * film.levels(expected.maps_NHW), abs=0.51)


# ---------------------------------------------------------------- starting


def test_gradio_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mmssl.demos.web.pages", raising=False)
    with pytest.raises(UserError, match=r"install the extra `demo`: pip install 'mmssl\[demo\]'"):
        serve.start(serve.DemoSpec(), tmp_path)


def test_what_cannot_be_served_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no such run folder; train one with `make quickstart`"):
        serve.desk_of(serve.DemoSpec(run=str(tmp_path / "none")), tmp_path)
    run_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"names no shards of tests; give some with data=FOLDER"):
        serve.desk_of(serve.DemoSpec(run=str(tmp_path / "run")), tmp_path)
    options = serve.DemoSpec(run=str(tmp_path / "run"), data=str(tmp_path / "shards"))
    with pytest.raises(UserError, match="shards: no such folder"):
        serve.desk_of(options, tmp_path)
    with pytest.raises(UserError, match="no index; make one with mmssl index build"):
        serve.desk_of(serve.DemoSpec(db=str(tmp_path)), tmp_path)
    with pytest.raises(UserError, match="data and which cannot be chosen for an index"):
        serve.desk_of(serve.DemoSpec(db="x", data="y", which="last"), tmp_path)
    with pytest.raises(UserError, match=r"did you mean `port=\.\.\.`"):
        serve.main(["prt=1"])


def test_the_index_is_made_once_and_gone_on_with(tmp_path, monkeypatch):
    shards = demo_shards(tmp_path, 3, 1.0)
    run_folder(tmp_path / "run")
    options = serve.DemoSpec(run=str(tmp_path / "run"), data=str(shards))
    first = serve.desk_of(options, tmp_path)
    assert first.index.folder.parent == tmp_path / "run" / "demo"
    assert first.held == {"audio": 3, "video": 3, "text": 3}
    (tmp_path / "shelf").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr("mmssl.index.vectors._Maker.write", None)  # is not called again
        again = serve.desk_of(options, tmp_path)
    assert again.index.record.built == first.index.record.built
    assert again.held == first.held
    (tmp_path / "shelf").rmdir()
    given = serve.desk_of(serve.DemoSpec(db=str(first.index.folder)), tmp_path)
    assert given.model.hash == first.model.hash  # of the run that the index names
    run_folder(tmp_path / "other", "avt/mmv_fac")
    other = serve.DemoSpec(db=str(first.index.folder), run=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"holds vectors of .*; name the run with run=RUN"):
        serve.desk_of(other, tmp_path)


def test_a_taken_port_is_said():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: cannot be listened on"):
            serve._free_port("127.0.0.1", port)
    assert 0 < serve._free_port("127.0.0.1", 0) < 65536
