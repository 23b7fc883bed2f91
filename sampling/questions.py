"""A file of questions in, a file of answers out, in the formats of LLaVA's evaluation scripts (LLAVA.md 7.4).

    questions   JSONL of {"question_id", "image", "text"}, or records as for training, whose first turn is asked
    answers     JSONL of {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}

An answer is appended as soon as it has ended, long prompts first: a run that is stopped loses what it was about to say
and no more, and the same command goes on where it stopped. When all are there, the file is put into the questions'
order, since some scores pair the two line by line. A question that cannot be asked gets a line with an empty text and
the reason in `metadata`, so that the pairs stay pairs; the next run tries it again.

Under torchrun each rank takes its share: rank 0 writes to the file itself, rank k to FILE.rank-k beside it, and at the
end rank 0 joins them. Whatever a stopped run has left of these counts as answered, however many ranks go on.
"""

import fcntl
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from glob import escape
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from data import check_tower
from formats.command import Progress, say
from formats.files import new_file
from formats.records import read_records
from sampling.web import source
from tokenizer import IMAGE_TAG

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of shortuuid, which names the answers
HEAD = b'{"question_id": '  # every line of answers begins so


@dataclass
class Question:
    """id: as in the file; prompt: what is asked, as the answer's line repeats it; images: paths, or functions that
    fetch a picture."""

    id: int | str
    prompt: str
    images: list

    def length(self, loaded):
        """Its prompt's length, about: the tokens of the text and the places of the pictures."""
        length = 0
        with suppress(ValueError):  # half a surrogate pair, say: what is broken is told when it is asked
            length = len(loaded.tokenizer.encode(self.prompt))
        for image in self.images:
            size = (1, 1)
            if loaded.config.image_aspect_ratio == "anyres":  # elsewhere all are of one length
                with suppress(Exception), Image.open(image) as picture:  # likewise
                    size = picture.size[::-1]  # stands in the header; a URL is not fetched for this
            length += loaded.config.tokens_of(size)
        return length


def read_questions(path, image_folder="", allow_urls=False):
    """A file of questions -> {(id, prompt): Question}; TextVQA and MME ask several with one id. ValueError names the
    line that is no question, or the flag that is wrong."""
    questions = {}
    for file in read_records(path).datasets:
        for record, (begin, _) in zip(file, file.places):
            try:
                question = as_question(record, image_folder, allow_urls)
                if questions.setdefault((question.id, question.prompt), question) is not question:
                    raise ValueError(f"question {question.id!r} is asked a second time in the same words; leave it out")
            except ValueError as error:
                line = 1 + Path(file.path).read_bytes().count(b"\n", 0, begin)
                raise ValueError(f"{file.path}, line {line}: {error}") from None
    files = [image for question in questions.values() for image in question.images if isinstance(image, str)]
    if files and not any(map(os.path.isfile, files)):
        raise ValueError(f"--image_folder {image_folder or '.'}: none of the {len(files)} pictures of {path} is there; "
                         f"the first is {files[0]}")
    return questions


def as_question(record, image_folder, allow_urls):
    """One object of the file -> Question."""
    image, turns = record.get("image") or [], record.get("conversations")
    name, text = record.get("question_id"), record.get("text")
    if turns and isinstance(turns, list) and isinstance(turns[0], dict):
        name, text = record["id"], turns[0].get("value")
    names = [image] if isinstance(image, str) else image
    if not (isinstance(name, int | str) and isinstance(text, str) and isinstance(names, list)
            and all(isinstance(x, str) for x in names)):
        raise ValueError('expected {"question_id": …, "image": file name, "text": …}, or a record as for training: '
                         '{"id": …, "image": file name, "conversations": [{"from": "human", "value": …}, …]}')
    if turns and not isinstance(image, list):  # as the original asks ScienceQA; of several, the k-th tag is the k-th
        text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}"
    return Question(name, text, [source(x, allow_urls, image_folder) for x in names])


def piece(questions, count, index):
    """Of a list cut into `count` pieces of equal length, the last one shorter, the one with this index, from 0 on."""
    size = -(-len(questions) // max(1, count))
    if count < 1 or not 0 <= index * size < len(questions):
        raise ValueError(f"--num_chunks {count} --chunk_idx {index}: there is no such chunk; {len(questions)} questions"
                         f" make {-(-len(questions) // size)} of {size}, counted from 0")
    return questions[index * size: (index + 1) * size]


class AnswerFile:
    """The answers so far, in a file that grows by whole lines, and beside it those of other ranks.

    questions: {(id, prompt): Question}, all that it may answer; model: the path of who answers."""

    def __init__(self, path, questions, model, rank=0):
        *folders, last = str(model).strip("/").split("/")
        self.model_id = f"{folders[-1]}_{last}" if last.startswith("checkpoint-") and folders else last
        self.path, self.questions = Path(path), questions
        self.own = self.path if rank == 0 else self.path.with_name(f"{self.path.name}.rank-{rank}")
        self.path.touch()
        self.file = open(self.own, "ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {self.own}: another run writes to it; wait, or name another file") from None

    def parts(self):
        """The files of the other ranks."""
        return sorted(self.path.parent.glob(f"{escape(self.path.name)}.rank-*"))

    def read(self):
        """-> {key: row} of all files; of several answers to a question the last one counts, and a last line that was
        not written to its end is cut off. ValueError: these are other answers."""
        rows = {}
        for path in [self.path, *self.parts()]:
            place = 0
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                whole = line.endswith(b"\n")
                try:
                    row = json.loads(line)
                    key = row["question_id"], row["prompt"]
                    ours = key in self.questions and row["model_id"] == self.model_id and "metadata" in row
                except (LookupError, TypeError):
                    ours = False
                except ValueError:  # no JSON: the beginning of a line, if it is the last
                    ours = not whole and line[:len(HEAD)] == HEAD[:len(line)]
                if not ours:
                    raise ValueError(f"--out {path}, line {number} is no answer of {self.model_id} to one of these "
                                     "questions; name another file")
                if whole:
                    rows[key], place = row, place + len(line)
                elif path == self.own:
                    self.file.truncate(place)
        return rows

    def add(self, question, answer):
        """Append an answer, its text or its error, whole or not at all."""
        line = as_line({
            "question_id": question.id, "prompt": question.prompt, "text": "" if answer.error else answer.text,
            "answer_id": "".join(secrets.choice(ALPHABET) for _ in range(22)), "model_id": self.model_id,
            "metadata": {"error": answer.error} if answer.error else {}})
        size = os.fstat(self.file.fileno()).st_size
        try:
            while line:
                line = line[self.file.write(line):]
        except OSError as error:
            self.file.truncate(size)
            raise ValueError(f"{self.own} cannot be written ({error.strerror}); the answers in it are whole, and the "
                             "same command goes on from there once there is room") from None

    def finish(self):
        """Join all files into one, in the questions' order. -> {key: row}"""
        rows, parts = self.read(), self.parts()
        with new_file(self.path, replace=True) as temporary:
            temporary.write_bytes(b"".join(as_line(rows[key]) for key in self.questions if key in rows))
        for part in parts:
            part.unlink()
        return rows


def as_line(row):
    """A row as the original writes it."""
    return json.dumps(row).encode() + b"\n"


def answer_file(args, load, ask):
    """Answer the questions of args.data_path into args.out. -> exit status: 1 if there are some without an answer

    load() -> loaded. ask(loaded, questions, on_answer) calls on_answer(i, answer) as soon as there is one."""
    if not args.out or not Path(args.out).parent.is_dir() or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: --data_path needs a file for the answers, in an existing folder")
    questions = read_questions(args.data_path, args.image_folder, args.allow_urls)
    if Path(args.out).resolve() == Path(args.data_path).resolve():
        raise ValueError(f"--out {args.out} is the file of questions; name another one for the answers")
    keys = piece(list(questions), args.num_chunks, args.chunk_idx)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    file = AnswerFile(args.out, questions, (args.adapter or [args.model_name_or_path])[0], rank)
    done = {key for key, row in file.read().items() if "error" not in row["metadata"]}
    todo = [questions[key] for key in keys[rank::world] if key not in done]
    if skipped := len(done.intersection(keys)):
        say(f"{skipped} of {len(keys)} questions are answered in {args.out} already")
    try:
        if todo:
            if world > 1 and torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            loaded, progress = load(), Progress("answering", len(todo), of_bytes=False)
            if any(question.images for question in todo):
                check_tower(loaded.image_processor)
            todo.sort(key=lambda question: question.length(loaded), reverse=True)
            ask(loaded, todo, lambda i, answer: (file.add(todo[i], answer), progress.advance(1)))
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first waits for the slowest
            dist.barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        say(f"\nstopped; what is answered is in {args.out}, and the same command goes on from there")
        return 130
    if rank:
        return 0
    rows, never = file.finish(), {"metadata": {"error": "never asked"}}
    errors = list(filter(None, (rows.get(key, never)["metadata"].get("error") for key in keys)))
    say(f"{len(keys) - len(errors)} answers are in {args.out}" + (
        f", and {len(errors)} questions without one ({errors[0]}); the same command asks them again" if errors else ""))
    return 1 if errors else 0
