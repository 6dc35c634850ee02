"""Captions to ids."""

from mmssl.views.text import tokenise


class Letters:
    def encode(self, text, length):
        return [*list(map(ord, text))[: length - 1], 3]


def test_first_candidates():
    ids = tokenise(["ab", "cde", "f"], Letters(), 3, 2)
    assert [i.tolist() for i in ids] == [[97, 98, 3], [99, 100, 3]]
    assert tokenise(["ab"], Letters(), 9, 4)[0].tolist() == [97, 98, 3]
    assert tokenise([], Letters(), 3, 2) == []
