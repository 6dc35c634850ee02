"""Entries of a configuration: both directions, defaults, refusals."""

import pytest

from mmssl.interop.entries import Key, flat, nested, one, only, read, real, write
from mmssl.types import UserError

NAMES = {"tower": "towers.ear", "view": "views.x"}


def halves(config):
    if config["width"] % 2:
        raise ValueError("here a width is even")
    return (config["width"] // 2,)


KEYS = (
    one("layers", 12, "tower.backbone.layers"),
    one("rate", 0.1, "tower.dropout", "tower.cut.dropout"),
    one("norm", "group", "tower.norm", only=("group", "layer")),
    Key("width", 8, ("tower.half",), (), halves, lambda run: 2 * run["tower.half"]),
    only("act", "silu", "swish", absent="gelu"),
    Key("secret", None, write=lambda run: 7),
)


def test_both_directions_say_the_same():
    config = {"layers": 3, "rate": 0.2, "norm": "layer", "width": 6, "act": "swish", "other": 1}
    run = read(KEYS, config, "c.json")
    assert run == {
        "tower.backbone.layers": 3,
        "tower.dropout": 0.2,
        "tower.cut.dropout": 0.2,
        "tower.norm": "layer",
        "tower.half": 3,
    }
    written = write(KEYS, run, NAMES)
    said = {key: value for key, value in config.items() if key != "other"}
    assert written == {**said, "act": "silu", "secret": 7}
    assert read(KEYS, written, "c.json") == run


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "c.json: `act` is 'gelu', here there is only 'silu' or 'swish'"),
        ({"act": "silu", "norm": "batch"}, "`norm` is 'batch', .* only 'group' or 'layer'"),
        ({"act": "silu", "width": 5}, "c.json: `width` is 5: here a width is even"),
        ({"act": "silu", "width": "wide"}, "c.json: `width` is 'wide': "),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        read(KEYS, config, "c.json")


RUN = {"tower.backbone.layers": 3, "tower.dropout": 0.0, "tower.norm": "group", "tower.half": 3}


def refuse(run):
    raise ValueError("no")


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        (KEYS, {"tower.norm": "none"}, r"towers\.ear\.norm: 'none' has no .* `norm` can only be"),
        ((one("rows", 1, "view.rows"),), {}, r"views\.x\.rows: is not one number, as `rows`"),
        ((Key("bad", 1, write=refuse),), {}, r"towers\.ear as `bad`: no"),
    ],
)  # fmt: skip
def test_what_they_cannot_say_is_refused(keys, change, message):
    with pytest.raises(UserError, match=message):
        write(keys, {**RUN, **change}, NAMES)


def test_trees_and_paths():
    tree = {"a": {"b": 1, "c": [1, 2]}, "d": {}}
    assert flat(tree, "t") == {"t.a.b": 1, "t.a.c": [1, 2], "t.d": {}}
    assert nested(flat(tree, "t")) == {"t": tree}
    assert real("tower.a.b", NAMES) == "towers.ear.a.b"
    assert real("dead.a", NAMES) == "dead.a"
