"""training/features.py: a run with stored features is the run without them, and never are stale ones used."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import clip_config, randomized
from drawn import COLOURS, draw, record, rows_of, run_train, words, write
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import assert_same_run, ports, process

import train
from formats import files
from training import features
from vision import ClipVision


@pytest.fixture
def given(tiny_llama, tiny_clip, tmp_path):
    """Flags of a run of two epochs that shows the tower one picture at a time, so that equal means to the last bit."""
    (tmp_path / "scenes").mkdir()
    scenes = draw(tmp_path / "scenes")
    records = [record for record in json.loads((scenes / "talks.json").read_text()) if record["id"] != "two"]
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, data_path=write(scenes / "single.json", records), version="v1",
                per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-2, num_train_epochs=2,
                model_max_length=128, save_steps=2, log_samples=True)


@pytest.fixture
def looks(monkeypatch):
    """The number of views that the tower is shown, one entry per call."""
    shown, forward = [], ClipVision.forward

    def look(tower, pixels):
        shown.append(len(pixels))
        return forward(tower, pixels)

    monkeypatch.setattr(ClipVision, "forward", look)
    return shown


@pytest.fixture
def plain(given, tmp_path):
    """The folder of the run without stored features."""
    run_train(tmp_path / "plain", **given)
    return tmp_path / "plain"


def stored(cache):
    """{picture: features} of all files."""
    return {name: tensor for path in cache.glob("*/*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("options", [
    {}, {"dataloader_num_workers": 2}, {"mm_vision_select_feature": "cls_patch"}, {"image_aspect_ratio": "anyres"},
    {"gradient_accumulation_steps": 2}], ids=str)
def test_the_course_is_the_same(options, given, looks, tmp_path, capsys):
    given |= options
    run_train(tmp_path / "plain", **given)
    looks.clear(), capsys.readouterr()
    run_train(tmp_path / "cached", cache_features=tmp_path / "cache", **given)
    assert_same_run(tmp_path / "cached", tmp_path / "plain")
    assert "features of 3 pictures are in" in (said := capsys.readouterr().err) and "3 are new" in said
    found = stored(tmp_path / "cache")
    assert len(found) == 3 and all(x.dtype == torch.float32 for x in found.values())
    grey = [1, 1]  # in each epoch one batch is without a picture
    assert sorted(looks[:3]) == sorted(map(len, found.values())) and looks[3:] == grey
    looks.clear()
    run_train(tmp_path / "again", cache_features=tmp_path / "cache", **given)
    assert_same_run(tmp_path / "again", tmp_path / "plain")
    assert looks == grey and "0 are new" in capsys.readouterr().err


def test_batches_and_records_of_several_pictures(given, tmp_path):
    given |= {"data_path": given["image_folder"] / "talks.json", "per_device_train_batch_size": 3}
    plain = run_train(tmp_path / "plain", **given)
    cached = run_train(tmp_path / "cached", cache_features=tmp_path / "cache", dataloader_num_workers=1, **given)
    for key in "loss", "grad_norm":
        assert [row[key] for row in cached] == pytest.approx([row[key] for row in plain], rel=1e-5)
    assert len(stored(tmp_path / "cache")) == 5


def test_bfloat16_keeps_bfloat16(given, tmp_path):
    plain = run_train(tmp_path / "plain", bf16=True, **given)
    cached = run_train(tmp_path / "cached", bf16=True, cache_features=tmp_path / "cache", **given)
    assert all(x.dtype == torch.bfloat16 for x in stored(tmp_path / "cache").values())
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in plain], rel=1e-3)


def test_a_killed_run_goes_on_with_what_is_stored(given, plain, tmp_path):
    cached = given | {"cache_features": tmp_path / "cache", "output_dir": tmp_path / "out"}
    run = process("step", (0, cached))
    assert run.wait(180) == -signal.SIGKILL, run.stderr.read()
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [1, 2, 3, 4, 5]
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").glob("*/*"))
    assert train.main(words(use_cpu=True, **cached)) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").glob("*/*")) == before
    assert_same_run(tmp_path / "out", plain)


def test_two_ranks_share_the_work_and_the_files(given, tmp_path):
    port, other = ports(2)
    runs = [process("", (port, given | {"output_dir": tmp_path / "two", "cache_features": tmp_path / "cache"}),
                    (other, given | {"output_dir": tmp_path / "plain"}), rank=rank) for rank in (0, 1)]
    assert [run.wait(180) for run in runs] == [0, 0], [run.stderr.read() for run in runs]
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 2 and len(stored(tmp_path / "cache")) == 3
    assert_same_run(tmp_path / "two", tmp_path / "plain")


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    lambda path: os.truncate(path, 100), lambda path: path.write_bytes(b"")], ids=["a bit", "cut", "empty"])
def test_a_damaged_file_is_found_and_computed_again(damage, given, plain, looks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features, "FILE_BYTES", 0)  # a file per picture
    run_train(tmp_path / "first", cache_features=tmp_path / "cache", **given)
    paths = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    assert len(paths) == 3
    whole, content = sorted(stored(tmp_path / "cache")), paths[1].read_bytes()
    damage(paths[1])
    looks.clear(), capsys.readouterr()
    run_train(tmp_path / "second", cache_features=tmp_path / "cache", **given)
    assert f"{paths[1]} is damaged: it is removed, and its features are computed again" in capsys.readouterr().err
    assert_same_run(tmp_path / "second", plain)
    assert sorted(stored(tmp_path / "cache")) == whole and paths[1].read_bytes() == content
    assert looks == [1] * 3  # that picture, and grey ones


def test_too_little_room_is_said_before_anything_is_stored(given, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=r"--cache_features .*cache: 3 pictures of 0.000 GB need about 0.000 GB, and "):
        run_train(tmp_path / "out", cache_features=tmp_path / "cache", **given)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_write_that_fails_names_the_path_and_leaves_nothing(given, tmp_path, monkeypatch):
    def full(path, content):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cache/.* could not be written: .*No space left"):
        run_train(tmp_path / "out", cache_features=tmp_path / "cache", **given)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_what_a_stopped_write_has_left_is_removed(tmp_path, capsys):
    for name, age in (("left", 100), ("another_runs", 10)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert features.stored(tmp_path) == {} and [path.name for path in tmp_path.iterdir()] == ["another_runs"]
    assert "left was never completed: it is removed" in capsys.readouterr().err


def test_what_features_depend_on_is_part_of_their_names(given, tiny_clip, tmp_path, capsys):
    def new(**options):
        capsys.readouterr()
        run_train(tmp_path / "out", cache_features=tmp_path / "cache", overwrite_output_dir=True, max_steps=1,
                  **given | options)
        return int(capsys.readouterr().err.split(" are new")[0].rsplit(" ", 1)[-1])

    transformers = pytest.importorskip("transformers")
    assert (new(), new(freeze_backbone=True, model_max_length=100)) == (3, 0)
    assert (new(bf16=True), new(image_aspect_ratio="pad"), new(mm_vision_select_layer=-1),
            new(mm_vision_select_feature="cls_patch")) == (3, 3, 3, 3)
    other = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    assert new(vision_tower=other) == 0  # the same tower elsewhere
    (other / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]}')
    assert new(vision_tower=other) == 3
    model = randomized(transformers.CLIPVisionModel(clip_config()))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.fc1.bias"))[0] += 1e-3
    shutil.rmtree(other)
    model.save_pretrained(other)
    shutil.copy(tiny_clip / "preprocessor_config.json", other)
    assert new(vision_tower=other) == 3
    Image.new("RGB", (40, 30), "purple").save(given["image_folder"] / "a.png")
    assert new() == 1
    os.utime(given["image_folder"] / "b.png", (1, 1))
    assert (new(), new()) == (1, 0)


def test_a_broken_picture_is_trainings_matter(given, tmp_path, capsys):
    (given["image_folder"] / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"record 'turns': picture .*b.png cannot be read"):
        run_train(tmp_path / "stop", cache_features=tmp_path / "cache", **given)
    plain = run_train(tmp_path / "plain", on_bad_image="skip", **given)
    cached = run_train(tmp_path / "skip", on_bad_image="skip", cache_features=tmp_path / "cache", **given)
    assert [(row["loss"], row["ids"]) for row in cached] == [(row["loss"], row["ids"]) for row in plain]
    assert len(stored(tmp_path / "cache")) == 2


def test_a_picture_that_changes_during_the_run_is_not_mistaken(given, tmp_path, monkeypatch):
    """Its features are of before; so the run goes on with them, as it began."""
    rows = run_train(tmp_path / "plain", **given)
    begin = train.Loop.begin

    def paint(loop, folder):
        begin(loop, folder)
        for name in COLOURS:
            Image.new("RGB", (40, 30), "purple").save(given["image_folder"] / name)

    monkeypatch.setattr(train.Loop, "begin", paint)
    cached = run_train(tmp_path / "cached", cache_features=tmp_path / "cache", **given)
    assert [row["loss"] for row in cached] == [row["loss"] for row in rows]


@pytest.mark.parametrize("options, sentence", [
    ({"unfreeze_mm_vision_tower": True}, "stores what a frozen vision tower says of pictures, and this run trains it"),
    ({"vision_tower": None}, "and this run has none")])
def test_what_cannot_be_stored_is_refused(options, sentence, given, tmp_path):
    text = record("text", None, ("human", "How many?"), ("gpt", "Many."))
    given |= {"data_path": write(tmp_path / "text.json", [text])} | options
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(ValueError, match="--cache_features") as error:
        run_train(tmp_path / "out", cache_features=tmp_path / "cache", **given)
    assert sentence in str(error.value)


def test_an_unreadable_picture_that_comes_back_does_not_stand_beside_features(given, tmp_path, monkeypatch):
    path, begin = given["image_folder"] / "b.png", train.Loop.begin
    content = path.read_bytes()
    path.write_bytes(b"no picture")
    monkeypatch.setattr(train.Loop, "begin", lambda loop, folder: (begin(loop, folder), path.write_bytes(content)))
    with pytest.raises(ValueError, match="record 'turns': picture b.png could not be read when features were stored"):
        run_train(tmp_path / "stop", cache_features=tmp_path / "cache", **given)
