"""The demo in a real Chromium: search, play, localize, swap the sound, explore."""

import io
import re
import urllib.request

import numpy as np
import pytest
from chromium import launched
from demo_corpus import demo_index, demo_shards
from embed_runs import WORDS, run_folder
from media_files import moving_frames, tone, write_media
from PIL import Image

CLIPS, SECONDS = 4, 2.5
TITLE = "mmssl · tiny"


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("gradio", reason="gradio is missing: pip install 'mmssl[demo]'")
    try:
        with launched() as browser:
            yield browser
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def url(chromium, tmp_path_factory):
    from mmssl.demos.web import serve

    folder = tmp_path_factory.mktemp("demo")
    shards = demo_shards(folder, CLIPS, SECONDS)
    run_folder(folder / "run")
    (folder / "files").mkdir()
    options = serve.DemoSpec(
        run=str(folder / "run"), data=str(shards), port=0, max_mb=1, max_seconds=8
    )
    page = serve.start(options, folder / "files")
    yield page.local_url
    page.close()


@pytest.fixture
def page(chromium, url):
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(30_000)
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.get_by_role("heading", name=TITLE).wait_for()
    yield page
    foreign = [u for u in page.asked if not u.startswith((url, "data:", "blob:"))]
    assert foreign == []
    assert page.errors == []
    page.close()


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(write_media(moving_frames(30), tone(3.0, 16000)))
    return path


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def upload(page, where, path):
    page.set_input_files(f"{where} input[type=file]", path)
    page.locator(f"{where} video, {where} .file-preview, {where} audio").first.wait_for(
        state="attached"
    )


def complains(page, sentence):
    """Wait for a message; nothing else may be said than that, or that a player gave up."""
    told = page.get_by_test_id("toast-text")
    told.filter(has_text=sentence).first.wait_for()
    assert all(t.startswith(sentence) or t == "Video not playable" for t in told.all_inner_texts())
    for close in page.get_by_test_id("toast-close").all():
        close.click()
    told.first.wait_for(state="detached")


def played(medium):
    """Play a medium for half a second; seconds that went by, width and bytes of sound."""
    return medium.evaluate(
        """async (m) => {
            m.muted = true;
            await m.play();
            const from = m.currentTime;
            await new Promise((done) => setTimeout(done, 700));
            const facts = [m.currentTime - from, m.videoWidth, m.webkitAudioDecodedByteCount];
            m.pause();
            return facts;
        }"""
    )


def test_search_by_text_and_play(page, tmp_path):
    page.locator("#look-in").get_by_label("text").check()
    page.fill("#query-text input, #query-text textarea", WORDS[2])
    page.click("#search-go")
    page.locator(".mmssl-card").first.wait_for()
    assert page.locator(".mmssl-card").count() == CLIPS
    captions = page.locator(".mmssl-card .mmssl-caption").all_inner_texts()
    assert captions[0] == f"1. {WORDS[2]}"
    assert sorted(text[3:] for text in captions) == sorted(WORDS)
    seconds, width, sound = played(page.locator(".mmssl-card video").first)
    assert 0.1 < seconds < 2
    assert width == 32
    assert sound > 0
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot(path=tmp_path / "search.png"))))
    assert shot.shape[:2] == (900, 1200)
    assert len(np.unique(shot.reshape(-1, shot.shape[2]), axis=0)) > 1000


def test_a_result_has_the_time_of_its_window(page, tmp_path):
    path = tmp_path / "query.wav"
    path.write_bytes(write_media(None, tone(1.0, 16000, 400), container="wav",
                                 audio_codec="pcm_s16le"))  # fmt: skip
    page.locator("#look-in").get_by_label("video").uncheck()
    upload(page, "#query-sound", path)
    page.click("#search-go")
    page.locator(".mmssl-card").first.wait_for()
    spans = {"0.0–1.0 s": "#t=0.00,1.00", "1.0–2.0 s": "#t=1.00,2.00", "1.5–2.5 s": "#t=1.50,2.50"}
    for card in page.locator(".mmssl-card").all():
        facts = card.locator(".mmssl-facts").inner_text()
        assert facts.startswith("audio")
        part = next(part for span, part in spans.items() if span in facts)
        assert card.locator("video").get_attribute("src").endswith(part)


def test_the_microphone_and_a_film_together(page, film):
    upload(page, "#query-video", film)
    page.get_by_label("Record audio").click()
    page.locator("#query-sound").get_by_text("Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.locator("#query-sound .stop-button").click()
    page.wait_for_timeout(1000)
    page.click("#search-go")
    page.locator(".mmssl-card").first.wait_for()
    assert page.locator(".mmssl-card").count() == CLIPS


def test_a_picture_that_says_nothing_and_nothing_at_all(page, tmp_path):
    page.click("#search-go")
    complains(page, "write something, or give a sound")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "still.png")
    upload(page, "#query-image", tmp_path / "still.png")
    page.click("#search-go")
    complains(page, "this model reads only what moves")


def hot(page):
    """Share of the canvas that is drawn on, as it is said and as its pixels show it."""
    page.wait_for_timeout(200)
    said = float(page.locator(".mmssl-stage").get_attribute("data-hot"))
    seen = page.locator(".mmssl-stage canvas").evaluate(
        """(canvas) => {
            const {width, height} = canvas;
            const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            return data.filter((value, k) => k % 4 === 3 && value > 0).length / width / height;
        }"""
    )
    assert seen <= said + 1e-4  # faint heat may round to nothing
    return said


def set_threshold(page, value):
    field = page.locator("#threshold input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_localize_threshold_and_another_sound(page, film, tmp_path):
    tab(page, "Localize")
    upload(page, "#localize-video", film)
    page.evaluate(
        """() => {
            const stage = document.querySelector("#stage");
            window.told = "";
            const note = () => { window.told += stage.innerText; };
            new MutationObserver(note).observe(stage, {subtree: true, childList: true});
        }"""
    )
    page.click("#localize-go")
    stage = page.locator(".mmssl-stage")
    stage.wait_for()
    page.wait_for_function("document.querySelector('.mmssl-stage').dataset.hot !== undefined")
    told = page.evaluate("window.told")
    assert re.search(r"(checking|places and sound|preparing the video) - \d+\.\d%", told), told
    shares = []
    for value in (0, 0.3, 0.6, 1):
        set_threshold(page, value)
        shares.append(hot(page))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert shares[-1] < 0.1
    seconds, width, sound = played(page.locator(".mmssl-stage video"))
    assert 0.1 < seconds < 2
    assert width == 64
    assert sound > 0

    before = stage.get_attribute("data-heat")
    source = page.locator(".mmssl-stage video").get_attribute("src")
    noise = 0.3 * np.random.default_rng(0).standard_normal(32000).astype("f4")
    other = tmp_path / "other.wav"
    other.write_bytes(write_media(None, noise, container="wav", audio_codec="pcm_s16le"))
    page.click("#swap-go")
    complains(page, "give another sound")
    upload(page, "#swap-sound", other)
    page.click("#swap-go")
    page.wait_for_function(
        "(old) => document.querySelector('.mmssl-stage video').getAttribute('src') !== old",
        arg=source,
    )
    assert stage.get_attribute("data-heat") != before
    assert played(page.locator(".mmssl-stage video"))[2] > 0


def test_bad_files_get_a_sentence(page, tmp_path):
    tab(page, "Localize")
    bad = {
        "text.mp4": (b"this is no film", "text.mp4: cannot be used: FFmpeg cannot open the file"),
        "mute.mp4": (write_media(moving_frames(10)), "mute.mp4: has no sound"),
        "long.mp4": (
            write_media(moving_frames(90), tone(9.0, 16000)),
            "long.mp4: cannot be used: 9.0 s exceed the limit of 8 s",
        ),
    }
    for name, (data, sentence) in bad.items():
        (tmp_path / name).write_bytes(data)
        upload(page, "#localize-video", tmp_path / name)
        page.click("#localize-go")
        complains(page, sentence)
        page.locator("#localize-video").get_by_label("Clear").click()


def test_files_beyond_the_limit_are_refused(page, url):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="big.mp4"\r\n\r\n'
        + bytes(2**20 + 1)
        + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(
            urllib.request.Request(f"{url}gradio_api/upload", body, headers), timeout=30
        )
    assert error.value.code == 413


def test_the_page_reaches_nothing_else(page, url):
    assert url.startswith("http://127.0.0.1:")
    refused = page.evaluate(
        "() => fetch('http://localhost:9/').then(() => 'reached', (error) => error.message)"
    )
    assert refused == "Failed to fetch"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{url}gradio_api/file=http://127.0.0.1:9/x", timeout=30)
    assert error.value.code == 404


def test_media_files_of_an_index_that_is_there(chromium, film, tmp_path):
    """They are played from where they lie; a picture is shown."""
    from mmssl.demos.web import serve

    media = tmp_path / "media"
    media.mkdir()
    film.rename(media / "film.mp4")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(media / "still.png")
    (tmp_path / "files").mkdir()
    options = serve.DemoSpec(db=str(demo_index(media, tmp_path)), port=0)
    served = serve.start(options, tmp_path / "files")
    page = chromium.new_page()
    page.goto(served.local_url)
    page.fill("#query-text input, #query-text textarea", WORDS[2])
    page.click("#search-go")
    page.locator(".mmssl-card").nth(1).wait_for()
    assert page.locator(".mmssl-card").count() == 2
    assert played(page.locator(".mmssl-card video"))[1] == 64
    page.wait_for_function("document.querySelector('.mmssl-card img').naturalWidth === 40")
    page.close()
    served.close()


def test_explore(page):
    tab(page, "Explore")
    page.locator(".mmssl-map circle").first.wait_for()
    for modality, windows in (("audio", 3), ("video", 3), ("text", 1)):
        assert page.locator(f"circle.mmssl-{modality}").count() == windows * CLIPS
    dot = page.locator("circle.mmssl-video").nth(4)
    caption = WORDS[1]
    assert caption in dot.locator("title").text_content()
    dot.click(force=True)
    page.locator(".mmssl-player").wait_for()
    assert page.locator(".mmssl-player .mmssl-caption").inner_text() == f"{caption} · 1.0–2.0 s"
    words = page.get_by_label("Highlight captions with")
    words.fill("DOG barks")
    words.press("Enter")
    page.wait_for_function("document.querySelector('.mmssl-faint')")
    bright = page.locator(".mmssl-map circle:not(.mmssl-faint)")
    assert bright.count() == 7
    assert set(bright.locator("title").all_text_contents()) == {
        f"{m} {s}{WORDS[0]}"
        for m, s in [("text", ""), *((m, f"{a}–{b} s ") for m in ("audio", "video")
                     for a, b in (("0.0", "1.0"), ("1.0", "2.0"), ("1.5", "2.5")))]
    }  # fmt: skip
