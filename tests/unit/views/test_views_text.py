"""Captions to ids."""

import pytest

from mmssl.specs import ViewSpec
from mmssl.types import Clip, Transcript, Word
from mmssl.views.plan import Cut
from mmssl.views.text import spoken, tokenise

# a word in the first half of each second of 10, and one phrase that lasts from 4.2 to 8.2
WORDS = [Word(float(k), k + 0.5, f"w{k}") for k in range(10)]
PHRASE = Word(4.2, 8.2, "long")


def said(words, start_s, end_s, candidates=1):
    text = " ".join(word.text for word in words)
    clip = Clip("k", "s", 0, 10.0, transcript=Transcript(text + "!", tuple(words)))
    spec = ViewSpec(modality="text", texts="transcript", candidates=candidates)
    return spoken(clip, Cut("text", spec, start_s, end_s, 0))


class Letters:
    def encode(self, text, length):
        return [*list(map(ord, text))[: length - 1], 3]


def test_first_candidates():
    ids = tokenise(["ab", "cde", "f"], Letters(), 3, 2)
    assert [i.tolist() for i in ids] == [[97, 98, 3], [99, 100, 3]]
    assert tokenise(["ab"], Letters(), 9, 4)[0].tolist() == [97, 98, 3]
    assert tokenise([], Letters(), 3, 2) == []


@pytest.mark.parametrize(
    ("start_s", "end_s", "text"),
    [
        (2.0, 4.0, ["w2 w3"]),
        (2.2, 4.3, ["w2 w3 w4"]),  # w4 lies in it with 0.3 of its 0.5 s
        (2.3, 4.2, ["w3"]),  # of w2 and w4 less than half
        (2.6, 2.9, []),  # a pause
        (0.0, 10.0, ["w0 w1 w2 w3 w4 w5 w6 w7 w8 w9!"]),  # the whole clip, as it was written
    ],
)
def test_what_is_said_in_a_cut(start_s, end_s, text):
    assert said(WORDS, start_s, end_s) == text


def test_a_phrase_that_lasts_longer_than_the_cut_is_said_in_it():
    assert said([PHRASE, Word(9.0, 9.1, "x")], 5.0, 5.5) == ["long"]
    assert said([PHRASE, Word(9.0, 9.1, "x")], 3.0, 5.0) == []


def test_candidates_are_what_is_said_nearest():
    assert said(WORDS, 4.0, 6.0, 4) == ["w4 w5", "w6 w7", "w2 w3", "w8 w9"]
    assert said(WORDS, 8.0, 10.0, 3) == ["w8 w9", "w6 w7", "w4 w5"]
    # pauses count for nothing, a phrase counts once
    assert said([WORDS[0], PHRASE, WORDS[9]], 2.0, 4.0, 4) == ["long", "w0", "w9"]


def test_a_clip_without_speech_has_no_text():
    spec = ViewSpec(modality="text", texts="transcript")
    assert spoken(Clip("k", "s", 0, 10.0), Cut("text", spec, 0.0, 1.0, 0)) == []


def test_only_text_is_read_from_transcripts():
    with pytest.raises(ValueError, match="`texts: transcript` needs a text view"):
        ViewSpec(modality="audio", texts="transcript")
