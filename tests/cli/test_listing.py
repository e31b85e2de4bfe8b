"""What holds for answers to programs: numbers are numbers, every row has every key, and nothing else is printed."""

import csv
import io
import json
from datetime import UTC, datetime

import pytest

from pipeline.cli.listing import Column, Form, Listing
from pipeline.errors import UserError

ROWS = [
    {"name": "a, b", "score": {"value": 1.5, "low": 1.0, "high": 2.0}, "count": 1234, "ks": [8, 12]},
    {"name": 'c "d"', "score": None, "count": None, "ks": []},
    {"name": "é", "score": {"value": float("nan"), "low": 0.0, "high": float("inf")}, "count": 0, "ks": (1,)},
]
LISTING = Listing(
    [
        Column("name", lambda row: row["name"]),
        Column("score", lambda row: row["score"], show=lambda found: f"{found['value']:.1f}", interval=True),
        Column("count", lambda row: row["count"], "how many"),
        Column("ks", lambda row: row["ks"]),
        Column("", lambda row: "in words", "described"),
        Column("hidden", lambda row: 7, None),
    ],
    ROWS,
)
KEYS = ["name", "score", "score_low", "score_high", "count", "ks", "hidden"]


def test_json_has_every_key_in_every_row_and_null_for_what_is_not_known(capsys):
    LISTING.write(Form.JSON)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [list(row) for row in found] == [KEYS] * 3
    assert list(found[0].values()) == ["a, b", 1.5, 1.0, 2.0, 1234, [8, 12], 7]
    assert list(found[1].values()) == ['c "d"', None, None, None, None, [], 7]
    assert found[2]["score"] is None and found[2]["score_high"] is None and found[2]["name"] == "é"


def test_csv_has_the_same_in_the_same_order(capsys):
    LISTING.write(Form.CSV)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [
        KEYS,
        ["a, b", "1.5", "1.0", "2.0", "1234", "8 12", "7"],
        ['c "d"', "", "", "", "", "", "7"],
        ["é", "", "0.0", "", "0", "1", "7"],
    ]


def test_no_rows_are_an_empty_list_and_a_line_of_names(capsys):
    Listing(LISTING.columns, []).write(Form.JSON)
    assert capsys.readouterr().out == "[]\n"
    Listing(LISTING.columns, []).write(Form.CSV)
    assert capsys.readouterr().out == ",".join(KEYS) + "\n"


def test_json_has_what_stands_beside_the_rows(capsys):
    LISTING.write(Form.JSON, "scores", {"made": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "rows": 3, "none": None})
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["made", "rows", "none", "scores"] and len(found["scores"]) == 3
    assert datetime.fromisoformat(found["made"]) == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_people_get_a_table(capsys):
    LISTING.show("scores")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["name", "score", "how", "many", "ks", "described"]
    assert lines[4] == ["a,", "b", "1.5", "1,234", "8,", "12", "in", "words"]
    assert lines[5] == ["c", '"d"', "-", "-", "-", "in", "words"]


def test_only_one_form_can_be_asked_for():
    assert Form.of(False, False) is Form.TEXT and Form.of(True, False) is Form.JSON and Form.of(False, True) is Form.CSV
    with pytest.raises(UserError, match="--json and --csv: give one of them"):
        Form.of(True, True)
