"""What people bring: files of many kinds and dialects, and the values of their label columns."""

import gzip
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow
import pytest
from pyarrow import feather, parquet

from train.__main__ import command_of, main
from train.common.errors import DataError, UsageError
from train.config import TrainConfig
from train.data.files.options import ReadOptions
from train.data.load import load_split, load_splits
from train.data.read_rows import find_source, read_chunks
from train.data.tasks import MRPC, Task, custom_task

Rows = list[dict[str, Any]]
Capture = pytest.CaptureFixture[str]
TEXT = custom_task(("text",), "label", ("0", "1"))
FILES: dict[str, tuple[str, bytes, Rows, str]] = {
    "semicolon": (
        "a.csv",
        b"text;label\na, b;1\n",
        [{"text": "a, b", "label": "1"}],
        "UTF-8, delimiter semicolon, columns text, label",
    ),
    "tab": ("a.tsv", b"text\tlabel\na, b\t1\n", [{"text": "a, b", "label": "1"}], "delimiter tab"),
    "pipe": ("a.csv", b"text|label\na, b|1\n", [{"text": "a, b", "label": "1"}], "delimiter pipe"),
    "sep line": ("a.csv", b"sep=;\ntext;label\na,1;1\n", [{"text": "a,1", "label": "1"}], "delimiter semicolon"),
    "blanks": ("a.csv", b'text , label\n"a, ""b""" , 1\n', [{"text": 'a, "b"', "label": "1"}], "delimiter comma"),
    "two marks": ("a.csv", b"\xef\xbb\xbf" * 2 + b"text,label\na,1\n", [{"text": "a", "label": "1"}], "comma"),
    "unseen blanks": (
        "a.csv",
        "\u00a0text,\u200blabel\u2060\na,1\n".encode(),
        [{"text": "a", "label": "1"}],
        "comma",
    ),
    "nothing but an ending": (".csv", b"text,label\na,1\n", [{"text": "a", "label": "1"}], "comma"),
    "mark": ("a.CSV", b"\xef\xbb\xbftext,label\na,1\n", [{"text": "a", "label": "1"}], "with byte-order mark"),
    "cp1252": ("a.csv", "text,label\nÖl “q” 5 €,1\n".encode("cp1252"), [{"text": "Öl “q” 5 €", "label": "1"}], "1252"),
    "UTF-16": ("a.csv", "text\tlabel\nÖl\t1\n".encode("utf-16"), [{"text": "Öl", "label": "1"}], "UTF-16"),
    "UTF-16-LE": ("a.csv", "text,label\nÖl,1\n".encode("utf-16-le"), [{"text": "Öl", "label": "1"}], "UTF-16-LE"),
    "backslash": ("a.csv", b'text,label\n"a \\"b\\", c",1\n', [{"text": 'a "b", c', "label": "1"}], "comma"),
    "trailing": ("a.csv", b"text,label,,\na,1,,\nb,0\n", [{"text": t, "label": n} for t, n in ("a1", "b0")], "comma"),
    "index of R": ("a.csv", b'"text","label"\n"1","a","1"\n', [{"": "1", "text": "a", "label": "1"}], "comma"),
    "index of pandas": ("a.csv", b",text,label\n0,a,1\n", [{"": "0", "text": "a", "label": "1"}], "comma"),
    "apostrophes": (
        "a.csv",
        b"'text','label'\n'a, b','1'\n",
        [{"text": "a, b", "label": "1"}],
        "quoted by ', columns text, label",
    ),
    "no quotes": (
        "a.tsv",
        b'text\tlabel\n"a\t1\nb"\t0\n',
        [{"text": '"a', "label": "1"}, {"text": 'b"', "label": "0"}],
        "",
    ),
    "old Mac": ("a.csv", b"text,label\ra,1\r", [{"text": "a", "label": "1"}], "comma"),
    "gz": ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0), [{"text": "a", "label": "1"}], "comma"),
    "zst": ("a.jsonl.zst", pyarrow.compress(b'{"text": "a"}\n', "zstd", asbytes=True), [{"text": "a"}], "UTF-8"),
    "array": ("a.json", b'[\n {"text": "a"},\n {"text":\n "b"}]\n', [{"text": "a"}, {"text": "b"}], "UTF-8"),
    "lines": ("a.json", b'{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}], "UTF-8"),
    "long cell": (
        "a.csv",
        b"text,label\n" + b"a" * 300_000 + b",1\n",
        [{"text": "a" * 300_000, "label": "1"}],
        "comma",
    ),
}


def read(path: Path, **forced: str) -> tuple[Rows, str]:
    source = find_source(path, options=ReadOptions.parse(**forced))
    return [dict(row) for chunk in read_chunks(source, 3) for row in chunk.rows], source.description


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_read_as_it_is_written(kind: str, tmp_path: Path) -> None:
    name, content, rows, description = FILES[kind]
    (tmp_path / name).write_bytes(content)
    found, said = read(tmp_path / name)
    assert (found, description in said) == (rows, True), said


def test_what_is_written_far_from_the_start_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a,1\n" * 100_000 + '"b, ""c""",0\n"d \\"e\\"",1\n"f \\"",0\n"g\nh",1\n')
    found, _ = read(path)
    assert [row["text"] for row in found[100_000:]] == ['b, "c"', 'd "e"', 'f "', "g\nh"]
    # In a file without quoted cells a quote that is text does not swallow what follows.
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "a\t1\n" * 100_000 + '"b\t1\nc\t0\nd"\t1\n')
    with pytest.raises(DataError, match=r"row 100001 \(line 100002\): .* add --quote none"):
        load_split(TEXT, "", tmp_path / "a.tsv")
    assert read(tmp_path / "a.tsv", quote="none")[0][-3:] == [
        {"text": text, "label": label} for text, label in (('"b', "1"), ("c", "0"), ('d"', "1"))
    ]


OTHER_ENCODINGS = [
    ("cp1254", "film\ng\u00fczel film, \u00e7ok be\u011fendim", "'be\u00f0endim' in line 3"),
    ("cp1254", "\u00e7al\u0131\u015f\u0131yor", "in line 2"),
    ("cp1250", "skv\u011bl\u00fd p\u0159\u00edb\u011bh", "'skv\u00ecl\u00fd' in line 2"),
    ("cp1250", "foarte bun \u015fi ieftin", "'\u00bai' in line 2"),
    ("cp1250", "via\u0163a mea", "'via\u00fea' in line 2"),
    ("cp1250", "Kova\u010devi\u0107", "in line 2"),
    ("cp1251", "The movie \u0411\u0440\u0430\u0442 was excellent and enjoyable for everyone who saw it", "in line 2"),
]


@pytest.mark.parametrize(("encoding", "text", "words"), OTHER_ENCODINGS)
def test_what_is_no_word_in_windows_1252_is_asked_about(encoding: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"label|text\n0|{text}\n".replace("film\n", "film\n1|").encode(encoding))
    with pytest.raises(
        DataError, match=rf"read as Windows-1252 it holds .*{words}, .* Name its --encoding, such as cp12"
    ):
        read(path)
    assert text.splitlines()[-1] == read(path, encoding=encoding)[0][-1]["text"]


@pytest.mark.parametrize(
    "text",
    [
        "Það er svolítið skrýtið að ég hafi þýtt bókina á íslensku og æft mig",
        "Tað er rættiliga stuttligt at síggja føroyskt á skrift í dag",
        "Rødgrød med fløde på en smuk allé, fôr og Müller, ÅRHUS",
        "Grüße vom Cafégäste-Übergang, Crème für 5 µm, Nº 3",
        "Où était l'œuvre naïve ? À Noël, ça brûlait ; Nicolaÿ, Lætitia",
        "El niño pingüino comió 1º y 2ª; MARÍA Mª José",
        "Ações e reuniões: você põe à prova, avó e avô",
        "Perché così? Venerdì, lì, più, è tutto già finito",
        "Qüestió catalana: això és col·lecció, pèl, camió, raïm",
        "Coöperatie, één, geïnd, reëel, vóór, enquête",
        "Smörgåsbord, idé och Ångström; yö, šakki, õhtu",
        "Björk Guðmundsdóttir, Motörhead, Beyoncé, São Paulo, Žižek, Brontë, piñata, ˆˆ € ™",
        "Tìr nan Òg, sìth agus dè; Llŷr".replace("ŷ", "y"),
    ],
)
def test_words_of_western_europe_are_read_as_windows_1252(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(f"label|text\n0|{text}\n".encode("cp1252"))
    rows, said = read(tmp_path / "a.csv")
    assert rows == [{"label": "0", "text": text}]
    (sample,) = re.findall(r"Windows-1252, read as Unicode, .*, with words such as '(.*)'$", said)
    assert sample in text


SWALLOWED: list[tuple[str, str]] = [
    ('label,text\npos,"open\nneg,c\npos,d"\nneg,e\n', "row 1 (line 2)"),
    ('label,text\npos,"open, wide\nneg,d"\nneg,e\n', "row 1 (line 2)"),
    ('text,label\na,pos\n"b,neg\nc,pos\nd",neg\n', "row 2 (line 3)"),
    ('text;label\na;pos\n"b;neg\nc";pos\nd;neg\n', "row 2 (line 3)"),
    ('id|a|b|label\n1|x|y|0\n2|"x|y|1\n3|z"|y|0\n4|z|y|1\n', "row 2 (line 3)"),
]


@pytest.mark.parametrize(("content", "place"), SWALLOWED)
def test_a_quote_that_swallows_rows_is_refused(content: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{re.escape(place)}: .* lines that are rows themselves.* add --quote none"):
        load_split(custom_task((path.read_text()[:5].strip(",;|id"),), "label", ("neg", "pos")), "", path)
    rows, _ = read(path, quote="none")
    assert len(rows) == content.count("\n") - 1
    assert len(read(path, quote='"')[0]) < len(rows)


@pytest.mark.parametrize(
    "cell",
    [
        "Hello\nI like it, much",
        "Dear Sir,\nthanks, and\nneg, I must say",
        "neg,b,c\npos",
        "Thanks\nKind regards,Jo",
        "neg\npos\n",
        ",\n,",
    ],
)
def test_texts_of_several_lines_are_texts(cell: str, tmp_path: Path) -> None:
    for columns in (["label", "text"], ["text", "label"]):
        rows = [{"label": label, "text": text} for label, text in (("pos", "a"), ("neg", cell), ("pos", cell))]
        pd.DataFrame(rows)[columns].to_csv(tmp_path / "a.csv", index=False)
        assert read(tmp_path / "a.csv")[0] == rows


@pytest.mark.parametrize(
    ("rows", "is_numbered"),
    [
        (["1,a,x", "2,b,y", "3,c,x"], True),
        (["0,a,x", "1,b,y", "2,c"], True),
        (["1,Hello, world", "0,Bye, world"], False),
        (["0,Hello, world", "1,Bye, world", "1,Or, so"], False),
        (["1,a,x", "3,b,y"], False),
    ],
)
def test_row_numbers_without_a_name_follow_one_another(rows: list[str], is_numbered: bool, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["label,text", *rows]))
    source = find_source(tmp_path / "a.csv")
    (chunk,) = read_chunks(source, 9)
    assert chunk.columns == (["", "label", "text"] if is_numbered else ["label", "text"])
    assert ("it has 3 cells" in chunk.unreadable.get(0, "")) != is_numbered


WRONG: list[tuple[str, bytes, str]] = [
    ("a.csv", "text,label\nПривет мир,1\n".encode("cp1251"), "name its --encoding"),
    ("a.csv", "text,label\nzażółć gęślą jaźń and more,1\n".encode("cp1250"), "name its --encoding"),
    ("a.csv", "text,label\nÖl ".encode() + b"\xd6l,1\n", "line 2, byte 16 of the file is not UTF-8"),
    ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0)[:-4], "cannot be unpacked"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', "line 1: there is no comma between two objects"),
    ("a.json", b'[{"text": "a"},\n', "line 2 is no JSON"),
    ("a.json", b'{\n "text": "a",\n "label": 1\n}\n', "line 1: a JSON object goes on over several lines"),
    ("a.json", b'{"text": {"0": "a"}, "label": {"0": 1}}', "holds one JSON object of columns, not rows"),
    ("a.json", b'{"text": ["a", "b"], "label": [1, 0]}\n', "holds one JSON object of columns, not rows"),
    ("a.jsonl", b'{"text": "a"\n{"text": "b", "label": 1}\n', "row 1 (line 1): it is no JSON"),
    ("a.csv", b"text,label\na,1\ntext,label\nb,0\n", "row 2 (line 3): it is the first line again"),
    ("a.csv", b"\xef\xbb\xbftext,label\na,1\n\xef\xbb\xbftext, label\nb,0\n", "it is the first line again"),
    ("a.csv", "text,label\n\u200b\ufeff,1\n".encode(), "row 1 (line 2): column 'text' holds no text"),
    ("a.csv", "text,label\nEs f\u00e4hrt,1\n".encode("mac_roman"), "name its --encoding"),
    ("a.csv", "text,label\nEs f\u00e4hrt,1\n".encode("cp850"), "name its --encoding"),
    ("a.csv", b"text,label,label\na,1,2\n", "has two columns 'label', the 2. and the 3. Rename one"),
    ("a.csv", b"text,label, label \na,1,2\n", "has two columns 'label', the 2. and the 3. Rename one"),
    ("a.jsonl", b'{"text": "a", "label": 1, "label": 0}\n', "it has 'label' twice, as its 2. and its 3. name"),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_what_would_be_read_wrongly_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_split(TEXT, "", tmp_path / name)
    assert words in str(refusal.value)


def test_what_is_forced_is_not_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text;la|bel\nПривет;1|'2'\n".encode("cp1251"))
    assert read(path, encoding="cp1251", delimiter="pipe", quote="'")[0] == [{"text;la": "Привет;1", "bel": "2"}]
    for name, value in (
        ("delimiter", "ab"),
        ("delimiter", '"'),
        ("encoding", "utf-9"),
        ("encoding", "base64"),
        ("quote", "ab"),
    ):
        with pytest.raises(UsageError, match=f"--{name} .*: (give|there is no)"):
            ReadOptions.parse(**{name: value})


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,1\nb\nc,0\n"d,1\n ,0\ne,7\nf,0,1\n' + "g\n" * 20)
    with pytest.raises(DataError) as refusal:
        load_split(TEXT, "", path)
    head, *rows, more = str(refusal.value).splitlines()
    assert head.startswith("25 rows cannot be used. Fix or remove them")
    assert [row.split(": ")[0].rpartition(", ")[2] for row in rows] == [
        f"row {n} (line {n + 1})" for n in (2, 4, 5, 6, *range(7, 23))
    ]
    reasons = ("it has 1 cells", "cannot be read as csv", "'text' holds no text", "label '7'", "it has 3 cells")
    assert all(reason in row for reason, row in zip(reasons, rows, strict=False))
    assert more == "  and 5 more"


def write_table(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_arrows_types_are_texts_and_labels(suffix: str, tmp_path: Path) -> None:
    texts = pyarrow.array(["ä b", "c"])
    path = tmp_path / f"a{suffix}"
    for column in (
        texts.cast("large_string"),
        texts.dictionary_encode(),
        texts.cast("binary"),
        texts.cast("large_binary"),
    ):
        for labels in ([1.0, 0.0], [True, False], ["1", "0.0"], [b"1", b"0"]):
            write_table(path, pyarrow.table({"text": column, "label": labels}))
            split = load_split(TEXT, "", path)
            assert (list(split["text"]), list(split["label"])) == (["ä b", "c"], [1, 0])


def test_names_of_classes_and_saved_data_sets_are_read(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, 1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    other_rows = tmp_path / "b.parquet"
    rows.select([1, 0]).to_parquet(other_rows)
    for file in (tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "splits" / "train"):
        config = TrainConfig(out=tmp_path, train_file=file, validation_file=other_rows, text_columns=("text",))
        splits = load_splits(config)
        assert splits.task.labels == ("pos", "neg")  # as the file orders them
        assert (list(splits.train["text"]), list(splits.train["label"])) == (["a", "b", "d"], [1, 0, 1])
    with pytest.raises(DataError, match=r"splits holds several splits \(train\). Give the folder of one"):
        load_split(TEXT, "train", tmp_path / "splits")
    with pytest.raises(DataError, match="row 1: label 'neg' in column 'label' is none of"):
        load_split(custom_task(("text",), "label", ("a", "pos")), "", tmp_path / "a.parquet")
    # Another order of the names does not turn them round.
    other = custom_task(("text",), "label", ("neg", "pos"))
    assert list(load_split(other, "", tmp_path / "a.parquet")["label"]) == [0, 1, 0]


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    for number, text in enumerate("abc"):
        (tmp_path / f"part-{number}.csv").write_text(f"text,label\n{text},1\n")
    for path in (tmp_path / "part-*.csv", tmp_path):
        assert list(load_split(TEXT, "", path)["text"]) == ["a", "b", "c"]
    words = find_source(tmp_path).description
    assert words == f"{tmp_path / 'part-0.csv'} and 2 more: UTF-8, delimiter comma, columns text, label"
    (tmp_path / "part-1.csv").write_text("\ufefftext;label\nb;1\n")
    assert list(load_split(TEXT, "", tmp_path)["text"]) == ["a", "b", "c"]
    words = find_source(tmp_path).description
    assert re.fullmatch(r".*part-0\.csv and 1 more: UTF-8, .*; .*part-1\.csv: UTF-8 with .*semicolon.*", words)
    (tmp_path / "part-3.csv").write_text("text,label\nd,7\n")
    with pytest.raises(DataError, match=r"part-3\.csv, row 1 \(line 2\): label '7'"):
        load_split(TEXT, "", tmp_path)
    with pytest.raises(DataError, match="there is no such file"):
        load_split(TEXT, "", tmp_path / "no-*.csv")


HUB = [f"{split}-00000-of-00001.csv" for split in ("train", "validation", "test")]
FOLDERS: list[tuple[list[str], str, str]] = [
    (HUB, "", r"holds several splits \(test, train, validation\)\. Give the files of one .*, such as '.*/d/\*train\*'"),
    (HUB, "*.csv", r"holds several splits"),
    (["dev.csv", "test.csv"], "", r"holds several splits \(dev, test\).*/d/\*dev\*'"),
    (["dataTrain.csv", "dataVal.csv"], "", "holds several splits"),
    (["a.csv", "a.csv.gz"], "", r"a\.csv and a\.csv\.gz have one name"),
    (["a.csv", "a.csv.gz"], "a*", r"a\.csv and a\.csv\.gz have one name"),
    (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "", r"of the 3 files train-…-of-3 there are 2\. Fetch"),
    (["train-00000-of-00002.csv", HUB[1]], "train*", r"of the 2 files"),
]


@pytest.mark.parametrize(("names", "pattern", "words"), FOLDERS)
def test_files_that_are_no_one_data_set_are_refused(names: list[str], pattern: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in names:
        content = b"text,label\na,1\n"
        (tmp_path / "d" / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=words):
        load_split(TEXT, "train", tmp_path / "d" / pattern)


@pytest.mark.parametrize(
    ("names", "pattern", "shown"),
    [
        (HUB, "train*", ": 1 rows\n"),
        (HUB, "[tv]*", ": 3 rows in 3 files: test-00000-of-00001.csv, train-"),
        (
            ["latest.csv", "training.csv", "contest.csv"],
            "",
            "3 rows in 3 files: contest.csv, latest.csv, training.csv\n",
        ),
        (["train-1-of-2.csv", "train-2-of-2.csv"], "", "2 rows in 2 files"),
        (["x-00000-of-00003.csv", "x-00001-of-00003.csv"], "x-0000[01]*", "2 rows in 2 files"),
        (["x-00000-of-00003.csv"], "x-00000-of-00003.csv", "1 rows\n"),
        ([f"p{n}.csv" for n in range(7)], "", "7 rows in 7 files: p0.csv, p1.csv, p2.csv, p3.csv, p4.csv …\n"),
    ],
)
def test_files_of_one_data_set_are_counted(
    names: list[str], pattern: str, shown: str, tmp_path: Path, capsys: Capture
) -> None:
    for name in names:
        (tmp_path / name).write_text("text,label\na,1\n")
    load_split(TEXT, "train", tmp_path / pattern)
    assert shown in capsys.readouterr().out


def write_labels(folder: Path, values: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": value}) + "\n" for n, value in enumerate(values)))
    return path


def labels_of(
    folder: Path, values: list[Any], *, task: Task | None = None, **config: Any
) -> tuple[tuple[str, ...], list[Any]]:
    path = write_labels(folder, values)
    if task is not None:
        return task.labels, list(load_split(task, "", path)["label"])
    other = folder / "other.jsonl"  # the same rows twice, as a copy of the training file is refused
    other.write_text(2 * path.read_text())
    settings = TrainConfig(out=folder, train_file=path, validation_file=other, text_columns=("text",), **config)
    splits = load_splits(settings)
    return splits.task.labels, list(splits.train["label"])


def test_values_that_are_no_class_are_left_out_or_refused(tmp_path: Path, capsys: Capture) -> None:
    signs = [(value, "empty") for value in ("", " ", "\u200b", None, float("nan"))] + [(-1, "-1"), (-1.0, "-1")]
    for nothing, sign in [*signs, *((text, text) for text in ("-1", "-", "nan", "NA", "N/A", "NULL", "<NA>"))]:
        assert labels_of(tmp_path, [0, 1, nothing] + [1] * 17) == (("0", "1"), [0] + [1] * 18)
        assert f"left out 1 of 20 rows, whose 'label' is {sign}: they have no label." in capsys.readouterr().out
        with pytest.raises(DataError, match=f"it is {sign} in all 2 rows"):
            labels_of(tmp_path, [nothing, nothing], task=TEXT)
    assert labels_of(tmp_path, [0, 1, "NA", "", 1], labels=("0", "1"))[1] == [0, 1, 1]
    told = capsys.readouterr().out
    assert (
        "left out 2 of 5 rows, whose 'label' is NA or empty: they have no label. If NA is a class, it is one of" in told
    )
    assert labels_of(tmp_path, [-1, 0, 1], labels=("-1", "0", "1")) == (("-1", "0", "1"), [0, 1, 2])
    assert labels_of(tmp_path, ["NA", "x", "na"], labels=("na", "x")) == (("na", "x"), [0, 1, 0])
    assert labels_of(tmp_path, ["None", "x"])[0] == ("None", "x")
    with pytest.raises(DataError, match=r"1 labels beside -1.*--labels=-1,1"):
        labels_of(tmp_path, [-1, 1, 1, -1])
    for value in (
        ["a"],
        ["a", "b"],
        [],
        "['a', 'b']",
        '["a"]',
        "[]",
        "[0 1 0]",
        "[1. 0.]",
        "('a',)",
        "{'a'}",
        "['a' 'b']",
    ):
        with pytest.raises(DataError, match="train with kind multi_label"):
            labels_of(tmp_path, ["a", value])
        with pytest.raises(DataError, match="train with kind multi_label"):
            labels_of(tmp_path, [value], task=TEXT)


def test_several_labels_are_names(tmp_path: Path) -> None:
    """In a list, or in the list that pandas writes into a CSV file; not a 0 or 1 for each label."""
    (tmp_path / "a.csv").write_text('text;label\na;[\'x\', \'Y\']\nb;[]\nc;"[""y""]"\nd;x, y\n')
    (tmp_path / "b.csv").write_text("text;label\nA;['x', 'y']\nb;[]\nc;[\"y\"]\nd;x, Y\n")
    config = TrainConfig(
        out=tmp_path,
        train_file=tmp_path / "a.csv",
        validation_file=tmp_path / "b.csv",
        text_columns=("text",),
        kind="multi_label",
    )
    with pytest.raises(DataError, match="labels 'y' and 'Y', which differ"):
        load_splits(config)
    splits = load_splits(replace(config, merge_labels=True))
    assert splits.task.labels == ("x", "y")
    assert list(splits.train["label"]) == list(splits.validation["label"]) == [[1, 1], [0, 0], [0, 1], [1, 1]]
    for value, words in (([1, 0, 1], "names a label twice"), ([1.0, 0.0], "no list"), ([True, False], "no list")):
        with pytest.raises(DataError, match=words):
            labels_of(tmp_path, [value, [0, 1]], kind="multi_label")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([-1, 0, 1, -1], r"2 labels beside -1, .*, in 2 rows\. .* name all: --labels=-1,0,1, else .* --labels=0,1"),
        ([-2, -1, 0, 1, 2] * 9, "4 labels beside -1.*--labels=-2,-1,0,1,2, else"),
    ],
)
def test_a_frequent_sign_of_no_label_may_be_a_class(values: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        labels_of(tmp_path, values)
    for given in re.findall(r"--labels=\S+[^\s,]", str(refusal.value)):  # as the message says, on the command line
        flags = ["--train-file", "a", "--validation-file", "a", "--out", "a", "--text-columns", "text", given]
        labels = main.parse(flags).labels
        assert labels_of(tmp_path, values, labels=labels)[0] == labels
    # SNLI's classes are 0 to 2. Empty cells are no class, however many they are, nor is what a validation file holds.
    assert labels_of(tmp_path, [-1, 0, 1, 2, -1]) == (("0", "1", "2"), [0, 1, 2])
    assert labels_of(tmp_path, [0, 1, "", None, ""]) == (("0", "1"), [0, 1])
    assert list(load_split(TEXT, "validation", write_labels(tmp_path, [0, -1, 1]))["label"]) == [0, 1]


LISTS: list[tuple[list[Any], list[tuple[int, ...]]]] = [
    (["['x' 'y']", "['y']", "[]"], [(1, 1), (0, 1), (0, 0)]),
    (["['x'\n \"y\"]", "['y']"], [(1, 1), (0, 1)]),
    (["('x', 'y')", "('y',)", "()"], [(1, 1), (0, 1), (0, 0)]),
    (["{'x', 'y'}", "{'y'}", "set()"], [(1, 1), (0, 1), (0, 0)]),
    (["x,y", "NaN", "NULL", "", None, float("nan")], [(1, 1), *[(0, 0)] * 5]),
    ([["x", "y"], None, ["y"], []], [(1, 1), (0, 0), (0, 1), (0, 0)]),
]


@pytest.mark.parametrize(("values", "sets"), LISTS)
def test_lists_are_read_as_python_and_numpy_print_them(
    values: list[Any], sets: list[tuple[int, ...]], tmp_path: Path, capsys: Capture
) -> None:
    assert labels_of(tmp_path, values, kind="multi_label") == (("x", "y"), [list(row) for row in sets])
    told = capsys.readouterr().out
    assert "\n2 labels: x, y\n" in told
    assert ("in 2 of 6 rows 'label' is NULL or NaN, which is taken for no label" in told) == ("NaN" in values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *(([text, "y"], "is no list of labels") for text in ("{x, y}", "[x]", "(x, y)", "'x', 'y'", '["x" y]', "{'x'")),
        (["array(['x', 'y'], dtype=object)", "y"], "is no list of labels"),
        (["['x' 'y' ... 'z']", "y"], "is no list of labels"),
        *(([f"x{sep}y", "y", "x"], f"If '{sep.strip()}' stands between") for sep in (";", "|", "; ", " / ")),
        (["x;y", "y;x"], "write a comma there, or lists in JSON lines or Parquet.*with --labels"),
        ([[1, 0], [0, 1]], "has the same labels in every row"),
        (["[1, 0]", "[0, 1]"], "has the same labels in every row"),
    ],
)
def test_lists_that_are_written_in_other_ways_are_refused(values: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        labels_of(tmp_path, values, kind="multi_label")


@pytest.mark.parametrize(
    "values",
    [
        ["Sales (EU), (other)", "Sales (EU)", "drivers'", "'90s"],
        [":)", ":(", "a) first"],
        ["food/drink", "food", "food/other"],
        ["pos/food", "neg/food", "pos/service", "neg/service"],
        ["x;y", "x", "y", "x, y"],
        [["x;y"], ["x"], ["y"]],
    ],
)
def test_names_with_brackets_and_separators_are_names(values: list[Any], tmp_path: Path) -> None:
    names = {name.strip() for value in values for name in (value if isinstance(value, list) else value.split(","))}
    assert set(labels_of(tmp_path, values, kind="multi_label")[0]) == names
    joined = ["x;y", "x", "y"]
    assert labels_of(tmp_path, joined, kind="multi_label", labels=tuple(joined))[1][0] == [1, 0, 0]


def test_of_many_labels_the_first_are_listed(tmp_path: Path, capsys: Capture) -> None:
    labels_of(tmp_path, list(range(12)))
    assert "\n12 labels: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more\n" in capsys.readouterr().out


SPELLINGS = [
    ["pos", "Pos", "neg"],
    ["pos", "pos ", "neg"],
    [" neg", "pos", "NEG"],
    ["pos", "pos\u00a0", "neg"],
    ["pos", "pos\u200b", "neg"],
    ["pos", "\uff50\uff4f\uff53", "neg"],
]


@pytest.mark.parametrize("values", SPELLINGS)
def test_spellings_of_one_label_are_refused_or_merged(values: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which differ in case or blanks alone, .*\. Add --merge-labels .* --labels"):
        labels_of(tmp_path, values)
    merged, indices = labels_of(tmp_path, [*values, "pos", "neg", "pos", "neg"], merge_labels=True)
    assert merged == ("neg", "pos")
    assert indices[:3] == [int("neg" not in value.lower()) for value in values]
    assert labels_of(tmp_path, values, labels=("neg", "pos"))[1] == indices[:3]


def test_spellings_that_look_alike_are_shown_by_their_codes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels 'caf\\xe9' and 'cafe\\u0301'"):
        labels_of(tmp_path, ["caf\u00e9", "cafe\u0301", "tea"])
    for values in (["not  equal", "not equal", "equal"], ["01", "1", "0"], [True, 1, False], ["TRUE", "0", "1"]):
        with pytest.raises(DataError, match="or as Unicode or numbers are written"):
            labels_of(tmp_path, values)


def test_truth_and_whole_numbers_are_one_class_in_any_spelling(tmp_path: Path) -> None:
    assert labels_of(tmp_path, [True, False]) == (("false", "true"), [1, 0])
    truth = custom_task(("text",), "label", ("False", "True"))
    assert labels_of(tmp_path, [True, "true", "TRUE", 1, "1", False, "false", 0], task=truth)[1] == [1] * 5 + [0] * 3
    assert labels_of(tmp_path, [True, 1.0, "1.0", "1", False], task=TEXT)[1] == [1, 1, 1, 1, 0]
    assert labels_of(tmp_path, [1.0, 2.0, 10.0])[0] == ("1", "2", "10")
    pair: Callable[..., Any] = lambda n: {"sentence1": "a", "sentence2": "b", "label": n}  # noqa: E731
    (tmp_path / "pair.jsonl").write_text("\n".join(json.dumps(pair(value)) for value in (1.0, "Equivalent", 0, -1)))
    assert list(load_split(MRPC, "", tmp_path / "pair.jsonl")["label"]) == [1, 1, 0]


def test_a_thousand_labels_are_told_apart(tmp_path: Path) -> None:
    assert len(labels_of(tmp_path, [f"l{n}" for n in range(1000)])[0]) == 1000
    with pytest.raises(UsageError, match="between 2 and 1000 labels can be told apart, not 1001"):
        labels_of(tmp_path, [f"l{n}" for n in range(1001)])


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        ("text,label", "--text-columns text --label-column label"),
        ("label,text", "--text-columns text --label-column label"),
        ("id,text,label", "--text-columns text --label-column label"),
        ("id,text,gold", "--text-columns text --label-column gold"),
        ("a b,label", "--text-columns and --label-column"),
    ],
)
def test_other_columns_than_the_tasks_are_named_in_flags(columns: str, flags: str, tmp_path: Path) -> None:
    cells = {"id": "{n}7{n}", "text": "a longer text {n}", "label": "1", "gold": "pos", "a b": "x"}
    rows = [",".join(cells[name].format(n=n) for name in columns.split(",")) for n in range(3)]
    (tmp_path / "a.csv").write_text("\n".join([columns, *rows]))
    with pytest.raises(DataError, match=rf"Task mrpc reads sentence1, sentence2, label\. For a file .*{flags}\.$"):
        load_splits(TrainConfig(out=tmp_path, train_file=tmp_path / "a.csv", validation_file=tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("text,label\nc,1\nd,0\n", ""),
        (
            "text,label\nc,1\na,0\nb,0\n",
            "2 of 3 validation rows are training rows too, so the scores flatter the adapter",
        ),
        ("text,label\nb,0\na,1\n", "2 of 2 validation rows"),
        ("text;label\na;1\nb;0\n", "2 of 2 validation rows"),
    ],
)
def test_rows_of_training_and_validation_are_compared(rows: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "v.csv").write_text(rows)
    config = TrainConfig(
        out=tmp_path, text_columns=("text",), train_file=tmp_path / "t.csv", validation_file=tmp_path / "v.csv"
    )
    load_splits(config)
    told = capsys.readouterr().out
    assert words in told
    assert bool(words) == ("flatter" in told)


def test_a_column_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    for name, text in (("a.csv", "x"), ("b.csv", "other")):
        (tmp_path / name).write_text(f'"review, long",b c,label\n{text},y,1\nz,w,0\n')
    files = [
        "--train-file",
        str(tmp_path / "a.csv"),
        "--validation-file",
        str(tmp_path / "b.csv"),
        "--out",
        str(tmp_path),
    ]
    for flags in (
        ["--text-columns", '"review, long",b c'],
        ["--text-columns", '"review, long"', "--text-columns", "b c"],
    ):
        config = main.parse([*files, *flags])
        assert config.text_columns == ("review, long", "b c")
        assert list(load_splits(config).train["review, long"]) == ["x", "z"]
        assert main.parse(shlex.split(command_of(config))[3:]) == config
