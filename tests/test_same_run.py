"""Another trainer, small and plain, on transformers' own modules, as the original's Trainer runs them: every way to
train that is not among the recorded runs must give its losses, gradient norms and weights."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn import draw, record, rows_of, run_train, words, write
from torch import nn
from torch.nn import functional as F

import data
import train
from formats.layouts import our_name
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from training import flags
from weights import load


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Thirteen records: captions, talks of several lengths, four without a picture, one with two."""
    folder = draw(tmp_path_factory.mktemp("scenes"))
    records = json.loads((folder / "talks.json").read_text())
    for i, words_in_answer in enumerate((3, 9, 1, 5, 2, 7, 4, 6)):
        picture = None if i % 3 == 2 else f"{'abcde'[i % 5]}.png"
        question = "Tell me." if picture is None else "<image>\nTell me."
        answer = "the circle is red and the picture is white".split()[:words_in_answer]
        records.append(record(f"more{i}", picture, ("human", question), ("gpt", " ".join(answer))))
    write(folder / "records.json", records)
    return folder


@pytest.fixture(scope="module")
def options(tiny_llama, tiny_clip, scenes):
    return dict(model_name_or_path=tiny_llama("gqa"), vision_tower=tiny_clip, mm_projector_type="mlp2x_gelu",
                image_folder=scenes, data_path=scenes / "records.json", version="v1", per_device_train_batch_size=2,
                learning_rate=2e-3, warmup_ratio=0.03, lr_scheduler_type="cosine", num_train_epochs=1,
                model_max_length=256, log_samples=True, save_strategy="no")


class Peer(nn.Module):
    """transformers' LlamaForCausalLM and CLIPVisionModel with a projector between them: padded, with a mask."""

    def __init__(self, args, projector):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.language_model = transformers.LlamaForCausalLM.from_pretrained(args.model_name_or_path)
        self.vision_tower = transformers.CLIPVisionModel.from_pretrained(args.vision_tower)
        wide, width = self.vision_tower.config.hidden_size, self.language_model.config.hidden_size
        linear = args.mm_projector_type == "linear"
        self.mm_projector = nn.Linear(wide, width) if linear else nn.Sequential(
            nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        self.mm_projector.load_state_dict(projector)
        self.args = args
        if args.mm_use_im_start_end:
            for matrix in self.language_model.get_input_embeddings(), self.language_model.get_output_embeddings():
                mean = matrix.weight.data.mean(0, keepdim=True)
                matrix.weight = nn.Parameter(torch.cat([matrix.weight.data, mean, mean]))

    def choose(self):
        """What the original trains."""
        args = self.args
        self.vision_tower.requires_grad_(args.unfreeze_mm_vision_tower)
        self.language_model.requires_grad_(not args.tune_mm_mlp_adapter)
        self.mm_projector.requires_grad_(not args.freeze_mm_mlp_adapter)
        if args.tune_mm_mlp_adapter and args.mm_use_im_start_end:
            self.language_model.get_input_embeddings().requires_grad_(True)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def features(self, pixel_values):
        """(P, 3, S, S) -> (P, N, D) from the tower's last state but one."""
        hidden = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return self.mm_projector(hidden if self.args.mm_vision_select_feature == "cls_patch" else hidden[:, 1:])

    def loss(self, examples):
        """The mean over the learned tokens; a record without a picture is given a grey one that it does not see."""
        rows, targets, unseen = [], [], 0
        for example in examples:
            pixels = example.pixel_values if example.pictures else torch.zeros(1, 3, 28, 28)
            features, row, target = list(self.features(pixels)), [], []
            for token, label in zip(example.ids, example.labels):
                if token == IMAGE_TOKEN_INDEX:
                    row.append(features.pop(0))
                    target += [IGNORE_INDEX] * len(row[-1])
                else:
                    row.append(self.language_model.get_input_embeddings()(torch.tensor([token])))
                    target.append(label)
            rows.append(torch.cat(row))
            targets.append(torch.tensor(target))
            unseen = unseen + 0 * sum(f.sum() for f in features)
        x, target = nn.utils.rnn.pad_sequence(rows, True), nn.utils.rnn.pad_sequence(targets, True, IGNORE_INDEX)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], True)
        logits = self.language_model(inputs_embeds=x, attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()) + unseen


def optimizer_of(trained, args, norms):
    """AdamW in the original's groups: decay for all but biases and what is in a norm, own rates for some parts."""
    groups = []
    for name, p in trained.items():
        rate = {"mm_projector": args.mm_projector_lr, "vision_tower": args.mm_vision_tower_lr}.get(name.split(".")[0])
        decay = 0.0 if "bias" in name or name in norms else args.weight_decay
        groups.append({"params": [p], "lr": rate or args.learning_rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def peer_run(peer, args, examples, batches, epochs):
    """The steps of the original's Trainer: the counter of micro-batches runs on across epochs. -> [(loss, norm)]"""
    from transformers import get_scheduler
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    trained, accumulate = peer.choose(), args.gradient_accumulation_steps
    norms = {f"{name}.{leaf}" for name, module in peer.named_modules()
             if isinstance(module, nn.LayerNorm | LlamaRMSNorm) for leaf, _ in module.named_parameters()}
    optimizer = optimizer_of(trained, args, norms)
    total = math.ceil(epochs * (len(batches) // epochs // accumulate))
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, math.ceil(args.warmup_ratio * total), total)
    steps, losses = [], []
    for batch in batches:
        loss = peer.loss([examples[name] for name in batch])
        (loss / accumulate).backward()
        losses.append(loss.item())
        if len(losses) == accumulate and len(steps) < total:
            norm = nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps.append((sum(losses) / accumulate, norm.item()))
            losses = []
    return steps


# ------------------------------------------------------------------------------------------------- the mean over tokens


def same_curve(rows, others):
    """The same losses and gradient norms at every step."""
    for key in "loss", "grad_norm", "learned_tokens":
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=1e-5), key


def test_the_mean_over_tokens_knows_no_micro_batches(options, scenes, tmp_path):
    """Eight records a step: at once, in parts, one by one, on two ranks."""
    records = json.loads((scenes / "records.json").read_text())
    records += [again | {"id": again["id"] + "'"} for again in records[-3:]]
    options = options | {"data_path": write(scenes / "sixteen.json", records), "loss_average": "tokens",
                         "num_train_epochs": 2}
    shapes = {"1x8": (8, 1), "2x4": (2, 4), "8x1": (1, 8)}
    two = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
         *words(use_cpu=True, output_dir=tmp_path / "ranks", **options | {"gradient_accumulation_steps": 2},
                deepspeed="zero2.json", max_grad_norm=1.0)], cwd=Path(train.__file__).parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    runs = {name: run_train(tmp_path / name, **options | {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": steps})
        for name, (size, steps) in shapes.items()}
    assert two.wait(60) == 0, two.stderr.read()
    for rows in runs["2x4"], runs["8x1"], rows_of(tmp_path / "ranks"):
        same_curve(rows, runs["1x8"])
        assert len(rows) == 4 and sum(rows[0]["ids"], []) == runs["1x8"][0]["ids"][0]
    plain = run_train(tmp_path / "mean", **options | {"loss_average": "microbatch", "gradient_accumulation_steps": 4})
    assert plain[0]["loss"] != pytest.approx(runs["1x8"][0]["loss"], rel=1e-3)  # short answers weigh more


# ------------------------------------------------------------------------------------------------------------- variants

VARIANTS = {
    "accumulation of 2 over two epochs": {"gradient_accumulation_steps": 2, "num_train_epochs": 2},
    "accumulation of 3 over two epochs": {"gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "groups": {"group_by_modality_length": True, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
    "weight decay": {"weight_decay": 0.3},
    "projector's rate": {"mm_projector_lr": 2e-2, "weight_decay": 0.1},
    "frozen projector": {"freeze_mm_mlp_adapter": True},
    "linear schedule": {"lr_scheduler_type": "linear"},
    "constant schedule": {"lr_scheduler_type": "constant"},
    "checkpointing": {"gradient_checkpointing": True, "warmup_ratio": 0.3},
    "linear projector, stage 1": {"mm_projector_type": "linear", "tune_mm_mlp_adapter": True},
    "class token": {"mm_vision_select_feature": "cls_patch"},
    "another seed": {"seed": 7},
    "new words, stage 1": {"mm_use_im_start_end": True, "tune_mm_mlp_adapter": True, "version": "llava_v0"},
    "tower": {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 5e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_run_as(variant, options, tmp_path):
    options = options | VARIANTS[variant]
    args = flags.parse(words(output_dir=tmp_path, **options))
    start = train.build_model(args, torch.device("cpu"))
    records = data.Records(args.data_path, args.image_folder, start, args.conv_mode, args.model_max_length)
    examples = {example.id: example for example in (records[i] for i in range(len(records)))}
    peer = Peer(args, {name: p.detach().clone() for name, p in start.model.mm_projector.named_parameters()})
    rows = run_train(tmp_path, **options)

    epochs, size = int(args.num_train_epochs), args.per_device_train_batch_size
    if args.group_by_modality_length:  # the order has tests of its own
        batches = [ids for row in rows for ids in row["ids"]]
        batches += [batches[0]] * (epochs * math.ceil(len(examples) / size) - len(batches))
    else:
        torch.manual_seed(args.seed)
        loader = torch.utils.data.DataLoader(list(examples), size, shuffle=True, collate_fn=list)
        batches = [batch for _ in range(epochs) for batch in loader]
    expected = peer_run(peer, args, examples, batches, epochs)
    assert len(rows) == len(expected) and sum((row["ids"] for row in rows), []) == batches[:sum(
        len(row["ids"]) for row in rows)]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in expected], rel=1e-5)

    theirs = {our_name(name): p for name, p in peer.named_parameters()}
    for name, p in load(tmp_path).model.named_parameters():
        if not name.endswith("k_proj.bias"):  # which softmax cannot see: its gradient is rounding alone
            assert (p - theirs[name]).abs().max() < 1e-5, name
