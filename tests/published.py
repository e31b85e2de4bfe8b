"""Files of made-up rows in the shapes in which the authors of data sets publish them."""

import gzip
import json
from pathlib import Path


def write_lines(path: Path, lines: list[str]) -> Path:
    """A text file, packed where its name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    return write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def write_dialogsum(folder: Path, train: int = 20, dev: int = 5, test: int = 6) -> Path:
    """`DialogSum_Data` of github.com/cylnlp/dialogsum: three summaries of a dialogue in the test file, else one."""
    start = 0
    for split, count, numbers in (("train", train, [""]), ("dev", dev, [""]), ("test", test, [1, 2, 3])):
        rows = [
            {"fname": f"{split}_{i - start}", "dialogue": f"#Person1#: w{i} w2 ?\n#Person2#: w3 w{i} ."}
            | {f"{name}{number}": f"w{i} w5 w{number or 6}" for number in numbers for name in ("summary", "topic")}
            for i in range(start, start + count)
        ]
        write_jsonl(folder / f"dialogsum.{split}.jsonl", rows)
        start += count
    write_jsonl(folder / "dialogsum.hiddentest.dialogue.jsonl", [{"fname": "hidden_0", "dialogue": "#Person1#: w1"}])
    return folder


def write_multi30k(folder: Path, train: int = 20, val: int = 5, test: int = 6, packed: bool = True) -> Path:
    """`data/task1/raw` of github.com/multi30k/dataset: a file a language, line by line parallel."""
    start = 0
    for split, count in (("train", train), ("val", val), ("test_2016_flickr", test), ("test_2017_flickr", test)):
        for language, word in (("en", "w2"), ("de", "w5"), ("fr", "w7")):
            lines = [f"w{i} {word} ." for i in range(start, start + count)]
            write_lines(folder / f"{split}.{language}{'.gz' * packed}", lines)
        start += count
    return folder
