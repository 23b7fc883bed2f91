"""Evaluation while training: the loss on held-out records, and whether the model sees or only guesses.

A falling loss proves nothing about sight: a language model learns the likely answers without looking. So the first
`--eval_generate` records of each file are also asked, and their answers compared with the recorded ones: with the true
picture, with another record's (`shuffled`) and with a grey one (`blank`). Only what the first has above the others was
seen. `eval_match` is the plain mean over the kinds of short answers (every recorded answer of the kind has at most
SHORT words), so that each kind weighs the same; longer answers, hard to meet word for word, are shown apart.
"""

import math
import time
from pathlib import Path

import torch
from PIL import Image

import data
from formats.command import say
from model import IGNORE_INDEX
from sample import Request, generate

SHORT = 3  # words
PICTURES = ("true", "shuffled", "blank")


class Left(Exception):
    """A signal has ended an evaluation."""


class Judge:
    """Evaluates one model on the files of `--eval_data_path`; each gives one row of log.jsonl per evaluation."""

    def __init__(self, args, loaded):
        self.args, self.loaded, self.pause = args, loaded, lambda: None  # pause: what may raise Left between batches
        self.place, self.gather = (0, 1), lambda own: [own]  # rank and number of ranks; what each of them holds
        self.pictures = [name.strip() for name in args.eval_pictures.split(",")]
        for name in self.pictures:
            if name not in PICTURES:
                raise ValueError(f"--eval_pictures {name!r} is not known; use {', '.join(PICTURES)}, comma-separated")
        self.sets, self.told = {}, set()  # name -> Records; of which it was said what is odd about them
        for path in filter(None, (args.eval_data_path or "").split(",")):
            name = path if Path(path).stem in self.sets else Path(path).stem
            self.sets[name] = data.Records(path, args.image_folder, loaded, loaded.conv_mode, args.model_max_length,
                                           args.on_bad_record, on_bad_image=args.on_bad_image)

    @torch.no_grad()
    def rows(self, step):
        """Evaluate every file. -> rows for log.jsonl"""
        for name, records in self.sets.items():
            began = time.perf_counter()
            row = {"step": step, "eval_set": name, "eval_loss": self.loss(records)}
            if self.args.eval_generate:
                row |= self.ask(records)
            yield row | {"eval_seconds": time.perf_counter() - began}
            if records.report() and name not in self.told:
                say(f"{name}: {records.report()}")
            self.told.add(name)

    def loss(self, records):
        """Mean cross-entropy over all learned tokens of the file, whose batches the ranks share. In the last turn some
        may have none left and repeat the last batch in vain: a layer is gathered from all ranks or from none."""
        device, size = self.loaded.model.language_model.lm_head.weight.device, self.args.per_device_eval_batch_size
        batches = [range(len(records))[first: first + size] for first in range(0, len(records), size)]
        found, (rank, ranks) = [], self.place
        for turn in range(0, len(batches), ranks):
            self.pause()
            batch = records.pack([records[i] for i in batches[min(turn + rank, len(batches) - 1)]]).to(device)
            learned = int((batch.labels != IGNORE_INDEX).sum())
            loss = self.loaded.model.loss(batch).item()
            found.append((loss * learned if learned else 0.0, learned, batch.notes))
        found = [of_rank for turn in zip(*self.gather(found)) for of_rank in turn][: len(batches)]
        for _, _, notes in found:
            records.note(notes)
        return sum(loss for loss, _, _ in found) / max(1, sum(learned for _, learned, _ in found))

    def ask(self, records):
        """Generate an answer to the last question of each record and compare. -> the eval_match fields of a row"""
        asked = [records.question(i) for i in range(min(self.args.eval_generate, len(records)))]
        broken = records.notes.get(data.REPLACED, {})  # as `loss` has found out
        asked = [question for question in asked if question is not None and question.id not in broken]
        scores = {}  # picture -> kind -> [True, False, …]
        answers = []
        for pictures in self.pictures:
            shown = [(q, images) for q, images in zip(asked, self.show(asked, pictures)) if images is not None]
            requests = [Request(q.messages, images, max_new_tokens=8 + len(self.loaded.tokenizer.encode(q.answer)))
                        for q, images in shown]
            said, size = [], self.args.per_device_eval_batch_size
            for first in range(0, len(requests), size):
                self.pause()
                said += generate(self.loaded, requests[first: first + size], batch_size=size)
            by_kind = scores.setdefault(pictures, {})
            for (q, _), answer in zip(shown, said):
                by_kind.setdefault(q.kind, []).append(plain(answer.text) == plain(q.answer))
                if pictures == "true":
                    answers.append({"id": q.id, "kind": q.kind, "question": q.messages[-1][1], "expected": q.answer,
                                    "answer": answer.text})
        long = {q.kind for q in asked if len(q.answer.split()) > SHORT}
        result = {}
        for pictures, by_kind in scores.items():
            means = {kind: sum(x) / len(x) for kind, x in by_kind.items()}
            short = [mean for kind, mean in means.items() if kind not in long] or list(means.values())
            mean = sum(short) / len(short) if short else None  # None: nothing could be asked
            result["eval_match" + ("" if pictures == "true" else f"_{pictures}")] = mean
            if pictures == "true":
                result["eval_match_by_kind"] = {kind or "answers": mean for kind, mean in means.items()}
        return result | {"eval_answers": answers}

    def show(self, asked, pictures):
        """Every question's pictures: its own, those of the next with as many others, or grey; None: there are none."""
        if pictures == "true":
            return [q.images for q in asked]
        if pictures == "blank":
            processor = self.loaded.image_processor
            grey = tuple(int(255 * mean) for mean in processor.image_mean) if processor else None
            return [[Image.new("RGB", (64, 64), grey)] * len(q.images) or None for q in asked]
        others = []
        for i, q in enumerate(asked):
            rest = (r.images for r in asked[i + 1:] + asked[:i] if len(r.images) == len(q.images))
            others.append(next((images for images in rest if images and not set(images) & set(q.images)), None))
        return others


def rate(args, best, row):
    """Compare an evaluation with the best before, {step, value, since} or None. -> the best now; since: how many
    evaluations have not been better. What is null or no number is not better."""
    name, value = args.metric_for_best_model, row.get(args.metric_for_best_model)
    greater = name == "eval_match" if args.greater_is_better is None else args.greater_is_better
    sign = 1 if greater else -1
    if value is not None and math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
        return {"step": row["step"], "value": value, "since": 0}
    return best and best | {"since": best["since"] + 1}


def plain(text):
    """An answer as it is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def line(row):
    """A row as a line for the terminal: the sight meter."""
    parts = [f"eval {row['eval_set']} at step {row['step']}: loss {row['eval_loss']:.4f}"]
    if "eval_match" in row:
        meters = [f"{name} {row[key]:.3f}" for name, key in
                  (("true", "eval_match"), ("shuffled", "eval_match_shuffled"), ("blank", "eval_match_blank"))
                  if row.get(key) is not None]
        kinds = [f"{kind} {value:.2f}" for kind, value in row["eval_match_by_kind"].items()]
        parts += ["sight: " + "  ".join(meters)] + ["by kind: " + "  ".join(kinds)] * (len(kinds) > 1)
    return "  |  ".join(parts) + f"  ({row['eval_seconds']:.1f} s)"
