"""benches: rows compare the same numbers on both sides, and come out as a table, as JSON and as a picture."""

import json
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from benches import __main__ as benches  # noqa: E402
from benches import loading  # noqa: E402
from formats import command  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_both_loaders_read_the_same_weights(tmp_path):
    loading.make(tmp_path / "x", loading.SMALL, torch.float32)
    ours, theirs = (loading.measured(who, tmp_path / "x", "bfloat16") for who in ("ours", "transformers"))
    assert ours["checksum"] == theirs["checksum"] != 0
    assert ours["seconds"] > 0 and ours.keys() == theirs.keys()


def run(monkeypatch, *arguments):
    row = {"ours": 0.5, "peer": 1.0, "peer_name": "peer", "unit": "s", "error": 0.0}
    rows = {"a": lambda smoke: row, "b": lambda smoke: row | {"peer": 0.25 if smoke else 0.5}}
    monkeypatch.setattr(benches, "ROWS", {"cpu": rows, "gpu": {}})
    monkeypatch.setattr(sys, "argv", ["benches", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        command.run(benches.main)
    return end.value.code or 0


def test_rows_as_table_json_and_picture(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "cpu", "--smoke", "--json", tmp_path / "x.json", "--png", tmp_path / "x.png") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["ratio"] for row in rows] == [2.0, 0.5]
    assert rows[0].keys() == {"row", "ours", "peer", "peer_name", "unit", "ratio", "error", "versions"}
    assert Image.open(tmp_path / "x.png").size == (1000, 60 + 2 * 76)
    assert run(monkeypatch, "cpu", "b") == 0 and capsys.readouterr().out.startswith("b ")
    assert run(monkeypatch, "cpu", "c") == 2 and "no cpu row c; there are a, b" in capsys.readouterr().err
