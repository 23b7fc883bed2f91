"""The demo in short: from the shipped towers through both stages; the sight meter rises with the true picture only."""

import json
from pathlib import Path

import pytest

import train
from miniature.records import write_world

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, captions=4000, conversations=3500, questions=30, seed=0, report=lambda *_: None)
    return folder


def run(world, stage, model, data, out, *flags):
    """Train one stage of the recipe `miniature` with fewer steps. -> the last evaluation row of log.jsonl"""
    train.main(["--recipe", "miniature", "--stage", stage, "--model_name_or_path", str(model), "--data_path",
                str(world / data), "--image_folder", str(world), "--eval_data_path", str(world / "eval.json"),
                "--evaluation_strategy", "no", "--output_dir", str(out), "--use_cpu", "True", *flags])
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])


def test_both_stages_teach_the_model_to_see(world, tmp_path):
    first = run(world, "pretrain", ROOT / "miniature/llm", "pretrain.json", tmp_path / "stage1",
                "--vision_tower", str(ROOT / "miniature/vision"), "--max_steps", "900")
    assert first["eval_match"] >= 0.40 and first["eval_match"] >= first["eval_match_shuffled"] + 0.10
    second = run(world, "finetune", tmp_path / "stage1", "finetune.json", tmp_path / "stage2", "--max_steps", "150")
    assert second["eval_match"] >= 0.70
    assert max(second["eval_match_shuffled"], second["eval_match_blank"]) <= second["eval_match"] - 0.30


def test_the_shipped_model_answers():
    import sample
    from weights import load

    loaded = load(ROOT / "miniature/llava", dtype="float32", device="cpu")
    answer, = sample.generate(loaded, [{"messages": [("human", "What color is the cross?")], "max_new_tokens": 8,
                                        "images": [str(ROOT / "examples/scene.png")]}])
    assert answer.text == "yellow"
