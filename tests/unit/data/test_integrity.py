"""Checksums, the the ledger and the quarantine."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmssl.data import integrity
from mmssl.data.integrity import DamagedSampleError, Ledger, canonical, seal, unseal

RECORD = {"key": "a-0-0", "source": "é", "index": 3, "meta": {"x": [0.1, 1e-9, "crc32c_self"]}}
MEMBERS = {"mp4": bytes(range(256)), "txt": b"a caption"}


def sealed(record=RECORD, members=MEMBERS):
    return {**members, "json": seal(record, members)}


def test_known_checksum():
    """RFC 3720, B.4: 32 bytes of zeros, and "123456789"."""
    assert integrity.crc32c(bytes(32)) == "8a9136aa"
    assert integrity.crc32c(b"123456789") == "e3069283"


def test_intact_sample_passes():
    record = unseal("a-0-0", sealed())
    assert {k: record[k] for k in RECORD} == RECORD


def test_every_single_bit_flip_is_found():
    """A json whose meaning is the same (1e-9, 1E-9) is no damage: the canonical form counts."""
    fields = sealed()
    intact = unseal("a-0-0", fields)
    for name, data in fields.items():
        for place in range(len(data)):
            for bit in (0, 5, 7):
                damaged = bytearray(data)
                damaged[place] ^= 1 << bit
                try:
                    same = unseal("a-0-0", {**fields, name: bytes(damaged)}) == intact
                except DamagedSampleError:
                    continue
                assert same
                assert name == "json"


def test_reformatted_json_passes_because_the_canonical_form_counts():
    tree = json.loads(sealed()["json"])
    assert unseal("a-0-0", {**MEMBERS, "json": json.dumps(tree, indent=3).encode()}) == tree


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**MEMBERS}, "json"),
        ({**MEMBERS, "json": b"[1]"}, "json"),
        ({**MEMBERS, "json": b"[" * 100_000}, "json"),
        ({**MEMBERS, "json": b'{"key":"a-0-0"}'}, "crc"),
        ({**MEMBERS, "json": b'{"key":NaN}'}, "crc"),
        ({**sealed(), "extra": b""}, "members"),
        ({"json": sealed()["json"]}, "members"),
        ({**sealed(), "mp4": b"another clip"}, "crc"),
    ],
)
def test_reasons(fields, reason):
    with pytest.raises(DamagedSampleError) as caught:
        unseal("a-0-0", fields)
    assert caught.value.reason == reason


def test_json_of_another_sample_is_found():
    with pytest.raises(DamagedSampleError, match="belongs to 'a-0-0'") as caught:
        unseal("b-0-0", sealed())
    assert caught.value.reason == "key"


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
        max_leaves=8,
    )
)
def test_any_meta_survives(meta):
    try:
        canonical({"m": meta})
    except UnicodeEncodeError:  # lone surrogates cannot be stored as UTF-8
        return
    fields = {"json": seal({"key": "k", "m": meta}, {})}
    assert unseal("k", fields)["m"] == meta


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("a_b-12ef-0", True),
        ("a", True),
        ("A-1-0", False),
        ("a.b", False),
        ("a/b", False),
        ("a b", False),
        ("-a", False),
        ("a--b", False),
        ("", False),
        ("ä", False),
        ("a" * 201, False),
    ],
)
def test_keys(key, valid):
    assert integrity.valid_key(key) is valid


def test_ledger_counts_and_appends(tmp_path):
    ledger = Ledger(tmp_path / "logs" / "skipped.jsonl")
    for key in "abc":
        ledger.add("crc" if key == "b" else "decode", key=key)
    assert ledger.counts == {"decode": 2, "crc": 1}
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert lines == [
        {"reason": r, "key": k} for k, r in zip("abc", ("decode", "crc", "decode"), strict=True)
    ]
    silent = Ledger()
    silent.add("crc")
    assert silent.counts == {"crc": 1}


def test_ledger_tells_what_is_new():
    ledger = Ledger()
    ledger.add("crc")
    ledger.add("tar")
    assert ledger.fresh() == {"crc": 1, "tar": 1}
    ledger.add("crc")
    assert ledger.fresh() == {"crc": 1}
    assert ledger.fresh() == {}
    with pytest.raises(AssertionError):
        ledger.add("no such reason")


def test_quarantine_is_read_from_all_ranks_lists(tmp_path):
    one = integrity.Quarantine(tmp_path / "quarantine-00000.jsonl")
    one.add("a", "timeout", "slow")
    two = integrity.Quarantine(tmp_path / "quarantine-00001.jsonl")
    assert two.keys == {"a"}
    two.add("b", "crash", "gone")
    with two.path.open("ab") as file:
        file.write(b'{"key": "c", "rea')  # the disk was full
    one.read()
    assert one.keys == {"a", "b"}
    silent = integrity.Quarantine()
    silent.add("c", "memory", "large")
    assert silent.keys == {"c"}
