import pytest

from mmssl.eval.options import parse
from mmssl.eval.suites import EvalSpec
from mmssl.types import UserError


def test_words_become_typed_options():
    found = parse(EvalSpec, ["limit=40", "random=false", "data=a=b", "which=last"])
    assert (found.limit, found.random, found.data, found.which) == (40, False, "a=b", "last")
    assert parse(EvalSpec, []) == EvalSpec()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("limt=4", "did you mean `limit=...`"),
        ("limit", "no such option"),
        ("limit=-1", "limit=-1"),
        ("limit=many", "limit=many"),
        ("which=newest", "which=newest"),
    ],
)
def test_mistakes_are_named(word, message):
    with pytest.raises(UserError, match=message):
        parse(EvalSpec, [word])


def test_a_key_given_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        parse(EvalSpec, ["seed=1", "seed=2"])
