"""Public corpora as they lie on a disk: exact rows of small trees, and what is missing."""

import json
import os
from pathlib import Path

import pytest

from data_tools.manifest import read_rows
from data_tools.manifest.__main__ import main, write_manifest
from data_tools.manifest.corpus import Corpus
from data_tools.manifest.layouts import LAYOUTS
from mmssl.types import UserError

ID = "a-b_c0123XY"  # an id of YouTube has eleven characters


def tree(root, *names):
    """Empty files."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def read(layout, root):
    out = root.parent / f"{root.name}.jsonl"
    coverage = write_manifest(layout, root, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, coverage


@pytest.fixture
def root(tmp_path):
    return tmp_path / "c"


def test_audioset(root):
    tree(root, f"audio/{ID}_30.wav", f"video/{ID}_30.mp4", "Y01234567890.wav", "stray.wav")
    (root / "eval_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n"
        "# num_ytids=20371, num_segs=20371\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        f'{ID}, 30.000, 40.000, "/m/09x0r,/t/dd1"\n'
        'gone-567890, 0.000, 10.000, "/m/09x0r"\n'
    )
    (root / "balanced_train_segments.csv").write_text('01234567890, 5.000, 15.000, "/m/09x0r"\n')
    (root / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd1,"Inside, small room"\n'
    )
    rows, coverage = read("audioset", root)
    assert rows == [
        {
            "media": "c/Y01234567890.wav",
            "source": "01234567890",
            "split": "balanced_train",
            "meta": {"labels": ["Speech"]},
        },
        {
            "media": f"c/video/{ID}_30.mp4",  # of a video and its sound, the video
            "source": ID,
            "split": "eval",
            "meta": {"labels": ["Speech", "Inside, small room"]},
        },
    ]
    assert coverage.missing == [("eval", "gone-567890 at 0.000 s")]
    assert coverage.unlisted == [f"audio/{ID}_30.wav", "stray.wav"]
    assert coverage.table().splitlines()[1] == "eval: 1 of 2 listed clips (50.0%)"


@pytest.mark.parametrize(
    "name", ["000030", "30", "30.0", "30.000", "30000", "30_40", "30.000_40.000", "30000_40000"]
)
def test_audioset_names_of_download_scripts(root, name):
    tree(root, f"{ID}_{name}.flac")
    (root / "eval_segments.csv").write_text(f'{ID}, 30.000, 40.000, "/m/09x0r"\n')
    assert [row["media"] for row in read("audioset", root)[0]] == [f"c/{ID}_{name}.flac"]


def test_vggsound(root):
    tree(root, f"video/{ID}_000041.mp4")
    (root / "vggsound.csv").write_text(
        f'{ID},41,"dog barking, yapping",test\n{ID},100,people marching,train\n'
    )
    rows, coverage = read("vggsound", root)
    assert rows == [
        {
            "media": f"c/video/{ID}_000041.mp4",
            "source": ID,
            "split": "test",
            "meta": {"label": "dog barking, yapping"},
        }
    ]
    assert coverage.missing == [("train", f"{ID}_000100")]
    assert (root.parent / "c.missing.txt").read_text() == f"train\t{ID}_000100\n"


def test_kinetics_lists_and_folders(root):
    tree(root, f"val/{ID}_000010_000020.mp4", "train/abseiling/11111111111_000001_000011.mp4")
    rows, coverage = read("kinetics", root)  # without lists the folders say what is what
    assert [(row["split"], row["meta"]["label"]) for row in rows] == [("train", "abseiling")]
    assert coverage.unlisted == [f"val/{ID}_000010_000020.mp4"]
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (root / "val.csv").write_text(f"{head}air drumming,{ID},10,20,validate,0\n")
    (root / "train.csv").write_text(f"{head}abseiling,11111111111,1,11,train,0\n")
    (root / "labels.csv").write_text("id,name\n0,abseiling\n")
    rows, coverage = read("kinetics", root)
    assert rows == [
        {
            "media": "c/train/abseiling/11111111111_000001_000011.mp4",
            "source": "11111111111",
            "split": "train",
            "meta": {"label": "abseiling"},
        },
        {
            "media": f"c/val/{ID}_000010_000020.mp4",
            "source": ID,
            "split": "val",
            "meta": {"label": "air drumming"},
        },
    ]
    assert coverage.unlisted == coverage.missing == []


def test_howto100m(root, monkeypatch):
    tree(root, f"videos/{ID}.mp4", "videos/22222222222.webm")
    said = {
        ID: {"start": [0.5, 2.0], "end": [2.5, 1.0], "text": ["first cut", "the bread"]},
        "gone-567890": {"start": [0], "end": [1], "text": ["x"]},
        "22222222222": {"start": [1.0], "end": [2.0], "text": [" "]},
    }
    (root / "raw_caption.json").write_text(json.dumps(said, indent=1))
    (root / "HowTo100M_v1.csv").write_text(
        f"video_id,category_1,category_2,rank,task_id\n{ID},Food,Bread,3,17\n"
    )
    monkeypatch.setattr("data_tools.manifest.corpus._CHUNK", 7)  # entries over many chunks
    rows, coverage = read("howto100m", root)
    assert rows == [
        {
            "media": f"c/videos/{ID}.mp4",
            "source": ID,
            "language": "en",
            "transcript": {"words": [[0.5, 2.5, "first cut"], [2.0, 2.0, "the bread"]]},
            "meta": {"category_1": "Food", "category_2": "Bread", "rank": "3", "task_id": "17"},
        },
        {
            "media": "c/videos/22222222222.webm",
            "source": "22222222222",
            "language": "en",
            "meta": {},
        },
    ]
    assert coverage.missing == [("", "gone-567890")]
    (root / "raw_caption.json").write_text('{"a": {"start": [], "end": [], "text": []}, "b": {')
    with pytest.raises(UserError, match=r"raw_caption\.json: no JSON object, behind the entry 'a'"):
        read("howto100m", root)


def test_msrvtt(root):
    tree(root, "all/video0.mp4", "all/video7.mp4")
    url = "https://www.youtube.com/watch?v="
    listed = {
        "videos": [
            {"video_id": "video0", "category": 9, "url": url + ID, "split": "train"},
            {"video_id": "video7", "category": 2, "url": url + ID, "split": "validate"},
            {"video_id": "video8", "category": 2, "url": url + "x", "split": "validate"},
        ],
        "sentences": [
            {"video_id": "video0", "caption": "a man drives", "sen_id": 0},
            {"video_id": "video7", "caption": "a cat", "sen_id": 1},
            {"video_id": "video0", "caption": "a car", "sen_id": 2},
        ],
    }
    for name in ("train_val_videodatainfo.json", "MSRVTT_data.json"):  # the second repeats all
        (root / name).write_text(json.dumps(listed))
    rows, coverage = read("msrvtt", root)
    assert rows == [
        {
            "media": "c/all/video0.mp4",
            "captions": ["a man drives", "a car"],
            "source": ID,
            "split": "train",
            "language": "en",
            "meta": {"category": 9},
        },
        {
            "media": "c/all/video7.mp4",
            "captions": ["a cat"],
            "source": ID,
            "split": "val",
            "language": "en",
            "meta": {"category": 2},
        },
    ]
    assert coverage.missing == [("val", "video8")]


def test_voxceleb(root):
    tree(
        root,
        "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
        "dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
        "vox1_test_wav/wav/id10270/5r0dWxy17C8/00003.wav",
        "notes.wav",
    )
    rows, coverage = read("voxceleb", root)
    assert rows == [
        {
            "media": "c/dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
            "sound": "c/dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
            "source": "id00012/21Uxsk56VDQ",
            "split": "dev",
            "meta": {"speaker": "id00012", "video": "21Uxsk56VDQ", "utterance": "00001"},
        },
        {
            "media": "c/vox1_test_wav/wav/id10270/5r0dWxy17C8/00003.wav",
            "source": "id10270/5r0dWxy17C8",
            "split": "test",
            "meta": {"speaker": "id10270", "video": "5r0dWxy17C8", "utterance": "00003"},
        },
    ]
    assert coverage.unlisted == ["notes.wav"]


def test_lrw(root):
    tree(root, "lipread_mp4/ABOUT/train/ABOUT_00001.mp4", "lipread_mp4/ABOUT/val/ABOUT_00001.mp4")
    rows, _ = read("lrw", root)
    assert rows[0] == {
        "media": "c/lipread_mp4/ABOUT/train/ABOUT_00001.mp4",
        "caption": "ABOUT",
        "source": "lipread_mp4/ABOUT/train/ABOUT_00001",
        "split": "train",
        "language": "en",
        "meta": {"word": "ABOUT"},
    }
    assert [row["split"] for row in rows] == ["train", "val"]


def test_flickr_soundnet(root):
    tree(root, "audio/11.wav", "frames/11.jpg", "Data/22/22.wav", "Data/22/2.jpg")
    tree(root, "Data/22/10.jpg", "33.mp4", "33.wav", "audio/44.wav", "frames/55/a.jpg")
    rows, coverage = read("flickr_soundnet", root)
    assert rows == [
        {"media": "c/33.mp4", "source": "33"},
        {
            "media": ["c/Data/22/2.jpg", "c/Data/22/10.jpg"],
            "sound": "c/Data/22/22.wav",
            "source": "22",
        },
        {"media": "c/frames/11.jpg", "sound": "c/audio/11.wav", "source": "11"},
    ]
    assert coverage.missing == [("", "44")]
    assert coverage.unlisted == ["33.wav"]


def test_clotho(root):
    tree(root, *(f"{x}/Rain drops.wav" for x in ("development", "evaluation", "validation")))
    head = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    for split in ("development", "evaluation", "validation"):
        (root / f"clotho_captions_{split}.csv").write_text(
            f'{head}Rain drops.wav,{split},"b, c",d,e,f\n'
        )
    (root / "clotho_metadata_development.csv").write_bytes(
        "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
        'Rain drops.wav,rain;caf\xe9,4711,https://x,"[1, 2]",me,CC0\n'.encode("latin-1")
    )
    (root / "clotho_metadata_validation.csv").write_text(
        "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
        "Rain drops.wav,rain,Not found,Not found,x,Not found,Not found\n"
    )
    rows, _ = read("clotho", root)
    assert rows.pop()["source"] == "Rain drops"  # no recording of that number is known
    assert rows == [
        {
            "media": "c/development/Rain drops.wav",
            "captions": ["development", "b, c", "d", "e", "f"],
            "source": "4711",
            "split": "development",
            "language": "en",
            "licence": "CC0",
            "meta": {"keywords": ["rain", "café"]},
        },
        {
            "media": "c/evaluation/Rain drops.wav",
            "captions": ["evaluation", "b, c", "d", "e", "f"],
            "source": "Rain drops",
            "split": "evaluation",
            "language": "en",
            "meta": {},
        },
    ]


def test_audiocaps(root):
    tree(root, f"val/{ID}.wav")
    (root / "val.csv").write_text(
        f'audiocap_id,youtube_id,start_time,caption\n1,{ID},30,"a dog, barking"\n2,{ID},30,a dog\n'
        "3,gone-567890,10,rain\n"
    )
    rows, coverage = read("audiocaps", root)
    assert rows == [
        {
            "media": f"c/val/{ID}.wav",
            "captions": ["a dog, barking", "a dog"],
            "source": ID,
            "split": "val",
            "language": "en",
        }
    ]
    assert coverage.missing == [("val", "gone-567890 at 10 s")]


def test_librispeech(root, monkeypatch):
    folder = "LibriSpeech/train-clean-100/19/198"
    tree(root, f"{folder}/19-198-0000.flac")
    (root / folder / "19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n19-198-0001 X\n")
    rows, coverage = read("librispeech", root)
    assert rows == [
        {
            "media": f"c/{folder}/19-198-0000.flac",
            "caption": "NORTHANGER ABBEY",
            "source": "19-198",
            "split": "train_clean_100",
            "language": "en",
            "meta": {"speaker": "19", "chapter": "198"},
        }
    ]
    assert coverage.missing == [("train_clean_100", "19-198-0001")]
    monkeypatch.chdir(root / "LibriSpeech/train-clean-100")
    assert [clip.row["split"] for clip in LAYOUTS["librispeech"](Corpus(Path()))] == [
        *("train_clean_100", "train_clean_100")
    ]


def test_fsdd(root):
    tree(root, "recordings/3_jackson_4.wav", "recordings/3_jackson_5.wav")
    rows, _ = read("fsdd", root)
    assert rows[0] == {
        "media": "c/recordings/3_jackson_4.wav",
        "source": "recordings/3_jackson_4",
        "split": "test",
        "meta": {"digit": "3", "speaker": "jackson", "take": "4"},
    }
    assert rows[1]["split"] == "train"


def test_esc(root):
    tree(root, "audio/1-100032-A-0.wav", "audio/2-200-B-7.wav")
    tree(root, "meta/none")
    (root / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "2-200-B-7.wav,2,7,cat,False,200,B\n"
    )
    assert len(read("esc50", root)[0]) == 2
    rows, _ = read("esc10", root)
    assert rows == [
        {
            "media": "c/audio/1-100032-A-0.wav",
            "source": "100032",
            "meta": {"category": "dog", "fold": "1", "src_file": "100032", "take": "A"},
        }
    ]


def test_esc_in_folders_of_classes(root):
    tree(root, "dog_bark/1-100032-A.ogg")
    rows, _ = read("esc10", root)
    assert rows == [
        {
            "media": "c/dog_bark/1-100032-A.ogg",
            "source": "100032",
            "meta": {"category": "dog_bark", "fold": "1", "src_file": "100032", "take": "A"},
        }
    ]


def test_a_corpus_elsewhere_is_named_by_whole_paths(root, tmp_path):
    tree(root, "3_jackson_4.wav")
    out = tmp_path / "other" / "m.jsonl"
    write_manifest("fsdd", root, out)
    assert json.loads(out.read_text())["media"] == str(root.resolve() / "3_jackson_4.wav")


LISTED = ("audiocaps", "audioset", "clotho", "howto100m", "librispeech", "msrvtt", "vggsound")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_something_else_is_refused(root, layout):
    tree(root, "x.txt")
    message = "copy it there" if layout in LISTED else f"no clip of the layout {layout} is there"
    with pytest.raises(UserError, match=message):
        read(layout, root)
    assert not (root.parent / "c.jsonl").exists()


def test_wrong_lists_are_named(root):
    tree(root, "a.wav")
    (root / "eval_segments.csv").write_text("abc, 1.0\n")
    with pytest.raises(UserError, match=r"eval_segments\.csv: row 1 has too few cells"):
        read("audioset", root)
    (root / "eval_segments.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"eval_segments\.csv: unreadable CSV"):
        read("audioset", root)
    (root / "vggsound.csv").write_text(f"{ID},1,a,test\nid,start,label,split\n")
    with pytest.raises(UserError, match=r"vggsound\.csv:2: is no list of vggsound: .*'start'"):
        read("vggsound", root)
    (root / "val.csv").write_text("id,caption\n1,rain\n")
    with pytest.raises(UserError, match=r"val\.csv:2: is no list of audiocaps: lacks 'youtube_id'"):
        read("audiocaps", root)
    (root / "MSRVTT_data.json").write_text('{"videos": []}')
    with pytest.raises(UserError, match=r"MSRVTT_data\.json: is no list of msrvtt: lacks 'sent"):
        read("msrvtt", root)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read("fsdd", root.parent / "nowhere")


def test_a_name_that_is_not_utf8_is_found_again(root):
    name = os.fsdecode(b"train/cat/\xff0123456789.mp4")
    tree(root, name)
    read("kinetics", root)
    (row,) = read_rows(root.parent / f"{root.name}.jsonl")
    assert row.media == root.parent / root.name / name


def test_command(root, tmp_path, capsys):
    tree(root, f"{ID}_000041.mp4")
    (root / "vggsound.csv").write_text(f"{ID},41,a,test\n{ID},50,a,test\n{ID},60,a,test\n")
    assert main(["vggsound", str(root), str(tmp_path / "m.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "m.jsonl: 1 clips\ntest: 1 of 3 listed clips (33.3%)\n" in told
    assert "listed in" in told
    assert main(["fsdd", str(root), str(tmp_path / "m.jsonl")]) == 2
    assert "no clip of the layout fsdd is there" in capsys.readouterr().err
