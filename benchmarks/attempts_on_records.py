"""Attempts on records: the attacks of kind 14, with odd files, folders, records and columns (run by attacks.py)."""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.attacks import Attack, World, behind


def of_files() -> Iterator[Attack]:
    """Kind 14: files whose content does not fit their name."""
    good = b'{"instruction": "q", "output": "a"}\n' * 5
    packed = gzip.compress(good * 1000)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO(b""))
    deep = b'{"instruction": "q", "output": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}"
    contents = {
        "a.jsonl.gz": {"half a .gz": packed[:-20], "zeros behind a .gz": packed + bytes(99)},
        "b.jsonl.gz": {"packed twice": gzip.compress(packed)},
        "a.tar.gz": {"an archive": gzip.compress(tar.getvalue())},
        "a.parquet": {"a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
        "a.jsonl": {
            "a page of the web": b"<!DOCTYPE html><title>Sign in</title>",
            "a data base": b"SQLite format 3\0" + bytes(100),
            "NaN": b'{"instruction": "q", "output": "a", "x": NaN}\n',
            "a key twice": b'{"instruction": "q", "output": "a", "output": "b"}\n',
            "no UTF-8": b'{"instruction": "\xed\xa0\x80", "output": "a"}\n',
            "lines that end in a carriage return": good.replace(b"\n", b"\r"),
            "zeros behind the last line": good + bytes(100),
        },
        "a.csv": {
            "zeros in a cell": b"instruction,output\na\0,b\n",
            "a quote for a separator": b'sep="\ninstruction,output\na,b\n',
            "a quote that never closes": b'instruction,output\n"a,b\n' * 3,
        },
        "a.json": {
            "an array that never closes": b"[" + good.splitlines()[0],
            "records of 900 levels": b"[" + b",".join([deep] * 3) + b"]",
            "a text": b'"x"',
        },
    }
    for file_name, by_name in contents.items():
        for name, content in by_name.items():

            def file(world: World, file_name: str = file_name, content: bytes = content) -> None:
                world.data = world.folder / file_name
                world.data.write_bytes(content)

            # With a template from a file, the records are encoded in another process, and arrays have to be sent there.
            def own_template(world: World, file: Callable[..., None] = file) -> list[str]:
                file(world)
                source = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
                (world.folder / "t.jinja").write_text(source)
                return world.inspect("--template", world.folder / "t.jinja")

            yield from behind(14, "inspect", {name: file})
            yield Attack(14, f"{name}, in another process", own_template, (0, 2))


def of_records() -> Iterator[Attack]:
    """Kind 14: values that some data sets have in place of a text."""
    asks, tells = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    talk = {"messages": [asks, tells]}
    call = {"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f", "arguments": {"a": [None, [{}]]}}}]}
    answer = {"role": "tool", "content": "x", "tool_call_id": [1]}
    records: dict[str, dict[str, Any]] = {
        "variables that are taken": {**talk, "chat_template_kwargs": {"messages": [], "self": 1, "": 2, "a b": 3}},
        "a variable in place of a function": {**talk, "chat_template_kwargs": {"raise_exception": 5}},
        "thinking as a text": {**talk, "enable_thinking": "no"},
        "documents as a number": {**talk, "documents": 5},
        "tools of no kind": {**talk, "tools": [{"name": ""}, {"function": {"name": 5}}, 7, None]},
        "calls with an odd id": {"messages": [asks, call, answer, tells]},
        "a role that is a list": {"messages": [{"role": ["user"], "content": "q"}, tells]},
        "lists in a content": {"messages": [asks, {"role": "assistant", "content": [["a"]]}]},
        "a picture by its path": {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}, tells]
        },
        "a weight of a googol": {"messages": [asks, {**tells, "weight": 10**100}]},
        "a pair of nothing": {"prompt": [], "chosen": [], "rejected": []},
        "a pair of numbers": {"conversations": [5], "chosen": 1, "rejected": 2},
        "our own marks": {"instruction": "\ufdd0control5\ufdd1 \ufdd4", "output": "\ufdd5\ufdd0"},
        "half a character": {"instruction": "\ud800", "output": "\udfff"},
    }
    odd = {name: lambda world, record=record: world.records(record, record) for name, record in records.items()}
    yield from behind(14, "inspect", odd)


def of_folders() -> Iterator[Attack]:
    """Kind 14: folders of data files."""
    infos: list[dict[str, Any]] = [
        {"file_name": "a.jsonl", "formatting": ["alpaca"]},
        {"file_name": "a\0.jsonl"},
        {"file_name": "../data.jsonl"},
        {"file_name": "x" * 5000},
        {"file_name": "a.jsonl", "columns": [1], "tags": 5},
    ]
    readmes = ["configs: 5", "configs: [{config_name: [1]}]", "dataset_info: 7", ": [", "date: 2024-02-30"]
    readmes.append("x: " + "[" * 9999)
    fillings: dict[str, Callable[[Path], object]] = {
        "a link to itself": lambda folder: (folder / "b.jsonl").symlink_to(folder / "b.jsonl"),
        "a link to the folder": lambda folder: (folder / "loop").symlink_to(folder),
        "a link to nothing": lambda folder: (folder / "b.jsonl").symlink_to("/nowhere"),
        "a pipe": lambda folder: os.mkfifo(folder / "b.jsonl"),
        "a device": lambda folder: (folder / "b.jsonl").symlink_to("/dev/zero"),
        "an empty file": lambda folder: (folder / "b.jsonl").write_text(""),
        "another kind of file": lambda folder: (folder / "b.csv").write_text("instruction,output\na,b\n"),
        "a saved data set of no state": lambda folder: (folder / "state.json").write_text("[]"),
        **{
            f"dataset_info.json {str(info)[:60]}": lambda folder, info=info: (folder / "dataset_info.json").write_text(
                json.dumps({"mine": info})
            )
            for info in infos
        },
        **{
            f"README.md {text[:30]}": lambda folder, text=text: (folder / "README.md").write_text(f"---\n{text}\n---\n")
            for text in readmes
        },
    }
    for name, fill in fillings.items():

        def folder(world: World, fill: Callable[[Path], object] = fill) -> None:
            (world.folder / "data").mkdir()
            world.data = Path(shutil.move(world.data, world.folder / "data")).parent
            fill(world.data)

        yield from behind(14, "inspect", {f"a folder with {name}": folder})


def of_columns() -> Iterator[Attack]:
    """Kind 14: column types that records normally do not have."""

    def nested(levels: int) -> pyarrow.Array:
        kind: pyarrow.DataType = pyarrow.int64()
        for _ in range(levels):
            kind = pyarrow.list_(kind)
        return pyarrow.nulls(2, kind)

    columns: dict[str, Callable[[], pyarrow.Array]] = {
        "a year beyond all": lambda: pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
        "a zone nobody knows": lambda: pyarrow.array([0, 0], pyarrow.timestamp("s", "Nowhere/Land")),
        "a span beyond all": lambda: pyarrow.array([2**62, 0], pyarrow.duration("s")),
        "a day beyond all": lambda: pyarrow.array([2**30, 0], pyarrow.date32()),
        "300 levels": lambda: nested(300),
        "a map": lambda: pyarrow.array([[("a", 1), ("a", 2)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "bytes": lambda: pyarrow.array([b"\xff", None]),
        "nothing": lambda: pyarrow.nulls(2),
    }
    for name, column in columns.items():

        def file(world: World, column: Callable[[], pyarrow.Array] = column) -> None:
            world.data = world.folder / "a.parquet"
            table = {"instruction": ["q", "r"], "output": ["a", "b"], "x": column()}
            pyarrow.parquet.write_table(pyarrow.table(table), world.data)

        yield from behind(14, "inspect", {f"a column of {name}": file})


def of_repetition() -> Iterator[Attack]:
    """Kind 14: small files whose rows become thousands of large texts."""
    text = ["z" * 10**6]

    def dictionary() -> pyarrow.Array:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 50_000, pyarrow.int32()), text)

    columns: dict[str, Callable[[], pyarrow.Array]] = {
        "a dictionary": dictionary,
        "a run": lambda: pyarrow.RunEndEncodedArray.from_arrays([50_000], text),
        "a dictionary in a list": lambda: pyarrow.ListArray.from_arrays(
            pyarrow.array(range(50_001), pyarrow.int32()), dictionary()
        ),
    }
    for name, column in columns.items():
        for ending in ("arrow", "parquet"):
            if ending == "parquet" and name == "a run":
                continue  # Parquet has no run-end encoded columns

            def file(world: World, column: Callable[[], pyarrow.Array] = column, ending: str = ending) -> None:
                world.data = world.folder / f"a.{ending}"
                table = pyarrow.table({"instruction": column(), "output": ["a"] * 50_000})
                if ending == "parquet":
                    pyarrow.parquet.write_table(table, world.data)
                    return
                with pyarrow.ipc.new_file(world.data, table.schema) as writer:
                    writer.write_table(table)

            yield from behind(14, "inspect", {f"{name} of one text in {ending}": file}, (2,))


MAKERS = (of_files, of_records, of_folders, of_columns, of_repetition)
