"""A user's mistake is one sentence that names file, record or flag, exit status 2, and nothing half written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import clip_config, llama_config, randomized
from drawn import draw, record, words, write
from safetensors.torch import save_file

import sample
import train
from formats import command
from weights import load, save

ROOT = Path(__file__).resolve().parent.parent
ASK, TELL = ("human", "<image>\nWhat?"), ("gpt", "A circle.")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("scenes"))
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "no_picture.png").write_text("no picture at all")
    return folder


@pytest.fixture(scope="module")
def llava(tiny_llama, tiny_clip, tmp_path_factory):
    """A whole model's folder."""
    folder = tmp_path_factory.mktemp("llava")
    loaded = load(tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu", projector_seed=0,
                  device="cpu")
    save(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def good(tiny_llama, tiny_clip, scenes):
    """The flags of a run that works; each test spoils one thing."""
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                version="v1", image_folder=scenes, data_path=scenes / "talks.json", per_device_train_batch_size=2,
                max_steps=1, use_cpu=True)


@pytest.fixture
def refusal(capsys, monkeypatch):
    """refusal(main, flags) -> the one sentence, without `error: `, with which the command stops at exit status 2."""
    def refused(main, flags):
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command.run(main)
        errors = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in errors
        prefix, sentence = errors.rstrip("\n").split("\n")[-1].split(": ", 1)
        assert prefix in ("error", "train.py", "sample.py")
        return sentence
    return refused


@pytest.fixture
def train_refusal(refusal, good, tmp_path):
    """train_refusal(flag=value, …) -> the sentence; None leaves the flag out. Checks that no model was written."""
    def refused(**changes):
        out = tmp_path / "out"
        flags = {name: value for name, value in ({"output_dir": out} | good | changes).items() if value is not None}
        sentence = refusal(train.main, words(**flags))
        left = {file.name for file in out.iterdir()} if out.exists() else set()
        assert left <= {"training_args.json", "log.jsonl", "checkpoint-1"}
        assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
        return sentence
    return refused


# -------------------------------------------------------------------------------------------------------------- records

RECORDS = {
    "missing picture": (record("x7", "nowhere.png", ASK, TELL), ["missing picture", "nowhere.png does not exist"]),
    "broken picture": (record("x7", "broken.png", ASK, TELL), ["broken.png cannot be read"]),
    "a picture that is none": (record("x7", "no_picture.png", ASK, TELL), ["no_picture.png cannot be read"]),
    "without conversations": ({"id": "x7", "image": "a.png"}, ["no conversations", "expected"]),
    "empty conversations": (record("x7", None), ["no conversations", "expected"]),
    "a turn without text": ({"id": "x7", "conversations": [{"from": "human"}]}, ["turn 1", "expected from and value"]),
    "unknown role": (record("x7", None, ("robot", "Hi"), TELL), ["turn 1 is from 'robot'", "expected human or gpt"]),
    "two turns of one": (record("x7", None, ASK, ASK, TELL), ["turn 2 is from human", "in turn"]),
    "nothing to learn": (record("x7", None, ("human", "Hi")), ["nothing to learn", "no answer"]),
    "more pictures than tags": (record("x7", ["a.png", "b.png"], ASK, TELL), ["`image` lists 2", "has 1 <image>"]),
    "fewer pictures than tags": (record("x7", ["a.png"], ASK, TELL, ASK, TELL), ["lists 1", "has 2 <image>"]),
    "image is no name": (record("x7", 5, ASK, TELL), ["image is no file name", "expected a string or a list"]),
    "half a surrogate pair": (record("x7", "a.png", ASK, ("gpt", "Red \ud83d")), ["half a surrogate", "character 4"]),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_bad_record_stops_the_run_and_is_named(train_refusal, tmp_path, what):
    bad, expected = RECORDS[what]
    path = write(tmp_path / "bad.json", [record("fine", "a.png", ASK, TELL), bad])
    sentence = train_refusal(data_path=path)
    assert all(part in sentence for part in ["'x7'", *expected]), sentence
    assert "picture" in what or str(path) in sentence


@pytest.mark.parametrize("what", RECORDS)
def test_a_bad_record_can_be_skipped_and_is_counted(good, tmp_path, capsys, what):
    path = write(tmp_path / "bad.json", [record("fine", "a.png", ASK, TELL), RECORDS[what][0]])
    assert train.main(words(output_dir=tmp_path / "out", on_bad_record="skip", **good | {"data_path": path})) == 0
    report, = [line for line in capsys.readouterr().out.splitlines() if "x7" in line]
    assert report.startswith("1 record")
    load(tmp_path / "out")


@pytest.mark.parametrize("content, expected", [
    (None, ["does not exist; expected a file"]), ("", ["holds no records"]), ("[]", ["holds no records"]),
    ('[{"id": "a"', ["expected a JSON array"]), ('{"id": "a"}\nno json\n', ["line 2", "expected a JSON array or"]),
    ("[3]", ["record 0", "expected an object"])])
def test_a_data_file_that_is_none(train_refusal, tmp_path, content, expected):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content)
    for flag in "data_path", "eval_data_path":
        sentence = train_refusal(**{flag: path})
        assert all(part in sentence for part in [str(path), *expected]), sentence


def test_a_wrong_image_folder(train_refusal):
    assert "check --image_folder" in train_refusal(image_folder="nowhere")


@pytest.mark.parametrize("flag", ["data_path", "eval_data_path", "image_folder"])
def test_paths_are_looked_at_before_the_model_is_loaded(train_refusal, monkeypatch, flag):
    monkeypatch.setattr(train, "build_model", lambda *_: pytest.fail("the model was loaded"))
    assert "nowhere" in train_refusal(**{flag: "nowhere"})


# --------------------------------------------------------------------------------------------------------------- models


def other_tower(folder, **changes):
    """A CLIP folder of another shape."""
    transformers = pytest.importorskip("transformers")
    config = clip_config(**changes)
    randomized(transformers.CLIPVisionModel(config)).save_pretrained(folder)
    size = config.image_size
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}))
    return folder


def test_a_tower_of_another_width(train_refusal, llava, tmp_path):
    tower = other_tower(tmp_path / "wide", hidden_size=32)
    sentence = train_refusal(model_name_or_path=llava, vision_tower=tower)
    assert str(llava) in sentence and "24" in sentence and "width is 32" in sentence


def test_a_tower_of_another_picture_size_is_a_loud_warning(good, llava, tmp_path, capsys):
    tower = other_tower(tmp_path / "large", image_size=42)
    flags = good | {"model_name_or_path": llava, "vision_tower": tower}
    assert train.main(words(output_dir=tmp_path / "out", **flags)) == 0
    warning, = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "28 pixels, 4 tokens" in warning and "42 pixels, 9 tokens" in warning and str(tower) in warning


@pytest.mark.parametrize("shapes, numbers", [
    ({"0.weight": (32, 20), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}, ["20 to 32", "width is 24"]),
    ({"0.weight": (48, 24), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}, ["24 to 48", "width is 32"])])
def test_a_projector_of_another_width(train_refusal, tmp_path, shapes, numbers):
    path = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, path)
    sentence = train_refusal(pretrain_mm_mlp_adapter=path)
    assert all(part in sentence for part in [str(path), *numbers]), sentence


def test_a_projector_of_another_type(train_refusal, tmp_path):
    path = tmp_path / "mm_projector.safetensors"
    save_file({"model.mm_projector.weight": torch.zeros(32, 24), "model.mm_projector.bias": torch.zeros(32)}, path)
    sentence = train_refusal(pretrain_mm_mlp_adapter=path)
    assert "type linear, not mlp2x_gelu" in sentence and "--mm_projector_type" in sentence


@pytest.mark.parametrize("cut", [3, 200, -40])
def test_truncated_weights(train_refusal, tiny_llama, tmp_path, cut):
    folder = shutil.copytree(tiny_llama("gqa"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    sentence = train_refusal(model_name_or_path=folder)
    assert str(file) in sentence and "truncated" in sentence and "copy it again" in sentence


def test_an_unknown_family(train_refusal, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama("gqa"), tmp_path / "family")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))
    sentence = train_refusal(model_name_or_path=folder)
    assert str(folder) in sentence and "'mamba'" in sentence and "llama" in sentence


def test_a_shape_that_the_config_does_not_promise(train_refusal, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama("gqa"), tmp_path / "shape")
    (folder / "config.json").write_text(json.dumps(llama_config(num_key_value_heads=2, intermediate_size=50).to_dict()))
    sentence = train_refusal(model_name_or_path=folder)
    assert str(folder) in sentence and "the intermediate_size is 50, but the tensors have 48" in sentence


@pytest.mark.parametrize("flag", ["model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"])
def test_a_model_that_is_not_there(train_refusal, tmp_path, flag):
    sentence = train_refusal(**{flag: tmp_path / "nowhere"})
    assert str(tmp_path / "nowhere") in sentence and "does not exist" in sentence


def test_a_file_that_is_no_projector(train_refusal, tmp_path):
    (tmp_path / "README.md").write_text("a projector")
    sentence = train_refusal(pretrain_mm_mlp_adapter=tmp_path / "README.md")
    assert str(tmp_path / "README.md") in sentence and "mm_projector.bin" in sentence and ".safetensors" in sentence


def test_pictures_for_a_model_without_eyes(train_refusal):
    assert "--vision_tower" in train_refusal(vision_tower=None)


# ---------------------------------------------------------------------------------------------------------------- flags

FLAGS = {
    "missing": ({"data_path": None}, ["--data_path is missing"]),
    "unknown": ({"learning-rat": 1}, ["unknown argument --learning_rat", "did you mean --learning_rate?"]),
    "no number": ({"learning_rate": "fast"}, ["--learning_rate", "'fast'"]),
    "no boolean": ({"bf16": "perhaps"}, ["--bf16", "expected True or False"]),
    "too small": ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps 0", "1 or more"]),
    "unknown schedule": ({"lr_scheduler_type": "sine"}, ["--lr_scheduler_type", "'sine'", "cosine"]),
    "unknown stage": ({"stage": "both"}, ["--stage", "'both'", "pretrain"]),
    "unknown recipe": ({"recipe": "fast", "stage": "pretrain"}, ["--recipe", "'fast'", "v1.5"]),
    "unknown template": ({"version": "v9"}, ["'v9'", "v1"]),
    "not a number": ({"learning_rate": "nan"}, ["--learning_rate is nan", "from 0 on"]),
    "a negative rate": ({"learning_rate": -1}, ["--learning_rate is -1.0"]),
    "no steps": ({"max_steps": 0}, ["nothing to do", "--max_steps 0"]),
    "unknown feature": ({"mm_vision_select_feature": "foo"}, ["'foo'", "cls_patch"]),
    "unknown aspect": ({"image_aspect_ratio": "wide"}, ["wide", "pad or square"]),
    "unknown projector": ({"mm_projector_type": "mlp"}, ["mlp", "linear"]),
    "unknown evaluation picture": ({"eval_pictures": "true,wrong"}, ["--eval_pictures 'wrong'", "shuffled"]),
    "unknown on_bad_record": ({"on_bad_record": "cry"}, ["--on_bad_record", "'cry'", "skip"]),
    "unknown layer": ({"mm_vision_select_layer": -9}, ["mm_vision_select_layer -9", "3 layers"]),
    "contradiction": ({"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, ["drop one"]),
    "not built": ({"sep_image_conv_front": True}, ["--sep_image_conv_front True is not built yet"]),
    "nothing left to train": ({"vision_tower": None, "tune_mm_mlp_adapter": True}, ["nothing is left to train"]),
    "unknown optimiser": ({"optim": "sgd"}, ["--optim", "'sgd'", "adamw_torch"]),
}


@pytest.mark.parametrize("what", FLAGS)
def test_a_wrong_flag_is_named(train_refusal, what):
    changes, expected = FLAGS[what]
    sentence = train_refusal(**changes)
    assert all(part in sentence for part in expected), sentence


def test_an_output_folder_that_holds_a_model_is_left_alone_unless_told(refusal, good, llava, tmp_path):
    out = shutil.copytree(llava, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    sentence = refusal(train.main, words(output_dir=out, **good))
    assert str(out) in sentence and "--overwrite_output_dir" in sentence
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert train.main(words(output_dir=out, overwrite_output_dir=True, **good)) == 0


def test_a_run_that_fails_midway_names_the_records_and_another_can_follow(train_refusal, good, tmp_path):
    sentence = train_refusal(learning_rate=1e30, max_steps=5)
    assert sentence.startswith("step 2: the loss is nan on records ")
    assert train.main(words(output_dir=tmp_path / "next", **good)) == 0


# ------------------------------------------------------------------------------------------------------------ sample.py

QUESTIONS = {
    "missing picture": (["--image", "nowhere.png"], ["nowhere.png does not exist"]),
    "broken picture": (["--image", "{scenes}/broken.png"], ["broken.png cannot be read"]),
    "too many tags": (["--image", "{scenes}/a.png", "--prompt", "<image> <image>"], ["1 pictures for 2 <image> tags"]),
    "unknown flag": (["--imge", "x.png"], ["unknown argument --imge", "did you mean --image?"]),
    "unknown template": (["--conv_mode", "v9"], ["'v9'"]),
    "unknown dtype": (["--dtype", "float4"], ["--dtype 'float4'", "bfloat16"]),
    "no such model": (["--model_name_or_path", "nowhere"], ["nowhere does not exist"]),
    "not built": (["--bits", "3"], ["--bits 3"]),
    "no tokens": (["--max_new_tokens", "0"], ["--max_new_tokens 0"]),
    "attention without a picture": (["--attention", "map.png"], ["--attention needs a picture"]),
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_a_wrong_question_is_refused(refusal, llava, scenes, what):
    flags, expected = QUESTIONS[what]
    flags = [flag.format(scenes=scenes) for flag in flags]
    sentence = refusal(sample.main, ["--model_name_or_path", llava, "--prompt", "Hi", "--device", "cpu", *flags])
    assert all(part in sentence for part in expected), sentence


def test_json_goes_with_one_question(refusal, llava):
    assert "give --prompt" in refusal(sample.main, ["--model_name_or_path", llava, "--json"])


def test_a_picture_for_a_model_without_eyes(refusal, tiny_llama, scenes):
    flags = ["--model_name_or_path", tiny_llama("gqa"), "--image", scenes / "a.png", "--prompt", "Hi"]
    assert "no vision tower" in refusal(sample.main, flags)


# ----------------------------------------------------------------------------------------------------- the real command


def test_the_command_itself_says_one_line_and_no_traceback_even_after_sharding(good, tmp_path):
    flags = words(output_dir=tmp_path / "out", **good | {"learning_rate": 1e30, "max_steps": 5})
    ended = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.rstrip().split("\n")[-1].startswith("error: step 2: the loss is nan")
