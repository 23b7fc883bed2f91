"""Records in files: read where they stand, however many there are; written whole; made from other data sets.

The published mix is a JSON array of 665,298 records, a gigabyte. As Python's objects it would take several, and as much
again in every process that reads pictures ahead. So a file is parsed once, for its mistakes and for where each record
stands, and a record once more when it is wanted.
"""

import csv
import json
import os
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from formats.files import new_file
from tokenizer import IMAGE_TAG

EXPECTED = "expected a JSON array or one JSON object per line"
PIECE = 1 << 22  # characters of a file that are looked at together
BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")  # two records


def read_records(paths, seed=42):
    """The records of files as for `find_files`, in order, read when asked for; of a share, those that `seed` draws."""
    return ConcatDataset([RecordFile(path, share, seed) for path, share in find_files(paths)])


def find_files(paths):
    """Files, several or comma-separated -> [(path, share of its records)]. ValueError: it is not there, no share."""
    found = []
    for name in ",".join(map(str, [paths] if isinstance(paths, str | Path) else paths)).split(","):
        head, _, text = name.rpartition(":")
        path, text = (head, text) if os.path.isfile(head) else (name, "1")
        share = float(text) if re.fullmatch(r"\d+\.?\d*|\.\d+", text) else 0
        if not 0 < share <= 1:
            raise ValueError(f"{name}: a share of a file, like 0.5, is a number that is more than 0 and at most 1")
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist; expected a file of records")
        found.append((path, share))
    return found


class RecordFile:
    """The records of one file: file[i] is read and parsed when asked for. Kept are 24 bytes each: where it stands."""

    def __init__(self, path, share, seed):
        self.path = path
        try:
            self.stamp, places = os.stat(path).st_mtime_ns, find_records(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text ({error}); {EXPECTED}") from None
        if not len(places):
            raise ValueError(f"{self.path} holds no records; {EXPECTED}")
        self.numbers = np.arange(len(places))
        if share < 1:
            drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
            self.numbers = drawn[: max(1, round(share * len(places)))].sort().values.numpy()
        self.places = places[self.numbers]  # (n, 2): the bytes of the file where a record begins and ends

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        begin, end = self.places[i].tolist()
        with open(self.path, "rb", buffering=0) as file:  # opened each time: nothing here belongs to one process
            if os.fstat(file.fileno()).st_mtime_ns != self.stamp:
                raise ValueError(f"{self.path} has changed since it was opened; start again")
            file.seek(begin)
            return {"id": str(self.numbers[i])} | json.loads(file.read(end - begin))


def find_records(path):
    """Where the records of a file begin and end: (n, 2) int64, in bytes. ValueError names the file and the line."""
    decode, found, lines = json.JSONDecoder().raw_decode, array("q"), 1
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read(PIECE)
        head = re.match(r"[\ufeff\s]*(\[?)", text)
        at, place = head.end(), len(head[0].encode())  # the same place, in `text` and in the file's bytes
        while True:
            begin = BETWEEN.match(text, at).end()
            try:
                record, end = decode(text, begin)
            except ValueError as error:
                if more := file.read(max(PIECE, len(text) - at)):  # perhaps the rest of it is still to come
                    lines += text.count("\n", 0, at)
                    text, at = text[at:] + more, 0
                    continue
                if re.compile(r"\s*\]\s*" if head[1] else r"\s*").fullmatch(text, at):
                    return np.array(found).reshape(-1, 2)
                lines += text.count("\n", 0, error.pos if head[1] else begin)
                raise ValueError(f"{path}, line {lines}: {EXPECTED} ({error.msg})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: record {len(found) // 2} is {str(record)[:40]!r}; expected an object")
            place += begin - at
            found.extend((place, place := place + len(text[begin:end].encode())))
            at = end


def write_records(path, records):
    """Write an iterable of records as a JSON array, one to a line, whole or not at all."""
    with new_file(path, replace=True) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            file.write((",\n" if number else "[\n") + json.dumps(record, ensure_ascii=False))
        if not file.tell():
            raise ValueError(f"{path} is not written: no record would be in it")
        file.write("\n]\n")


def add_tag(record):
    """A record whose picture would not be shown, because no text has an `<image>`, gets one before its question."""
    turns = record["conversations"]
    if not isinstance(record.get("image"), str) or any(IMAGE_TAG in turn["value"] for turn in turns):
        return record
    first = next((turn for turn in turns if turn.get("from") == "human"), turns[0])
    tagged = first | {"value": f"{IMAGE_TAG}\n{first['value']}"}
    return record | {"conversations": [tagged if turn is first else turn for turn in turns]}


# ---------------------------------------------------------------------------- other data sets (LLAVA.md 9.3 to 9.5)

ASKED = ("QCM", "CQM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")  # Question, Context, Multiple choice,
SAID = {"A": "", "AL": "E", "AE": "L", "ALE": "LE", "AEL": "EL", "LA": "L", "EA": "E", "LEA": "LE", "ELA": "EL",
        "LEPA": ""}  # Lecture, Explanation, Answer -> the reasons given; AL and AE are swapped as in the original


def talk(name, image, turns):
    """A record of (question, answer) turns; image: a path or nothing."""
    texts = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    return {"id": str(name), **({"image": image} if image else {}), "conversations": texts}


def load(*path):
    """A JSON file."""
    return json.loads(Path(*path).read_text(encoding="utf-8-sig"))


def from_scienceqa(folder, *, split="train", prompt_format="QCM-LEA"):
    """problems.json and pid_splits.json of a folder, word for word as the original converts them."""
    problems, names = load(folder, "problems.json"), load(folder, "pid_splits.json")[split]
    asked, _, said = prompt_format.partition("-")
    if asked not in ASKED or said not in SAID:
        raise ValueError(f"prompt_format {prompt_format}: expected one of {ASKED}, a dash, one of {tuple(SAID)}")
    for name in names:
        problem, texts = problems[name], []
        why = {"L": problem["lecture"].replace("\\n", "\n"), "E": problem["solution"].replace("\\n", "\n")}
        choices = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", problem["choices"]))
        parts = {"Q": f"Question: {problem['question']}\n", "M": f"Options: {choices}\n",
                 "C": f"Context: {problem['hint'].strip() or 'N/A'}\n"}
        question = "".join(parts.get(part) or f"BECAUSE: {' '.join(map(why.get, part))}\n"
                           for part in re.findall("[QCM]|[LE]+", asked))
        letter, because = "ABCDE"[problem["answer"]], " ".join(map(why.get, SAID[said]))
        answer = (f"Answer: {because} The answer is {letter}." if said[0] != "A" else
                  f"Answer: The answer is {letter}." + f" BECAUSE: {because}" * (said != "A"))
        if said == "LEPA":
            answer = "".join(f"{title}: {text}\n" for title, text in zip(("LECTURE", "SOLUTION"), why.values())
                             if text.strip()) + f"###\nANSWER: {letter}."
        for text, head in ((question, "Question: "), (answer, "Answer: ")):
            text = text.replace("  ", " ").strip()
            text = text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text
            texts.append(text.replace(head, "") if text.startswith(head) else text)
        image = problem["image"] and f"{name}/{problem['image']}"
        yield talk(name, image, [(texts[0] + f"\n{IMAGE_TAG}" * bool(image), texts[1])])


def from_okvqa(source, *, split="train", request="Answer the question using a single word or phrase."):
    """A folder with OK-VQA's questions and annotations: learned is the answer that most people gave, of equals the
    first. Or the dataset.json of the W&B article's script, whose questions lack the `<image>`."""
    if Path(source).is_file():
        yield from load(source)
        return
    said = {row["question_id"]: Counter(answer["answer"] for answer in row["answers"])
            for row in load(source, f"mscoco_{split}2014_annotations.json")["annotations"]}
    for row in load(source, f"OpenEnded_mscoco_{split}2014_questions.json")["questions"]:
        [(answer, _)] = said[row["question_id"]].most_common(1)
        yield talk(row["question_id"], f"COCO_{split}2014_{row['image_id']:012d}.jpg",
                   [(f"{IMAGE_TAG}\n{row['question']}\n{request}".strip(), answer)])


def from_csv(path, *, id="id", image="image", question="question", answer="answer"):
    """A table with a head line, between commas, semicolons or tabs: a record per row, without `image` of text alone."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        csv.field_size_limit(1 << 30)  # characters
        rows = csv.DictReader(file, delimiter=max(",;\t", key=head.count))
        for number, row in enumerate(rows):
            if any(row.get(None, ())) or None in (row[question], row[answer]):
                raise ValueError(f"{path}, line {rows.line_num}: not as many fields as the head line names, "
                                 f"{len(rows.fieldnames)}; what holds a {rows.reader.dialect.delimiter!r} needs quotes")
            yield talk(row.get(id) or number, row.get(image), [(row[question], row[answer])])


def from_ubiai(path, *, image="documentName,image", entities="annotation,tokens", relations="relations",
               id="id,token_start", text="text", label="label,entityLabel", head="head", child="child",
               question="QUESTION", answer="ANSWER"):
    """UBIAI's JSON export: documents with entities, of which relations link each QUESTION to its ANSWER. Of several
    names for a field the first counts that is there."""
    def of(item, names):
        return item[next((name for name in names.split(",") if name in item), names)]

    for number, document in enumerate(load(path)):
        known, answers = {of(entity, id): entity for entity in of(document, entities)}, {}
        for relation in of(document, relations):
            ends = {of(entity, label): entity for entity in (known[of(relation, end)] for end in (head, child))}
            if ends.keys() == {question, answer}:
                answers.setdefault(of(ends[question], id), []).append(of(ends[answer], text))
        asked = [name for name, entity in known.items() if of(entity, label) == question]
        if len(answers) < len(asked):
            print(f"{of(document, image)}: {len(asked) - len(answers)} questions without a linked answer are left out")
        if answers:
            yield talk(number, of(document, image),
                       [(of(known[name], text), " ".join(answers[name])) for name in asked if name in answers])


SOURCES = {"scienceqa": from_scienceqa, "okvqa": from_okvqa, "csv": from_csv, "ubiai": from_ubiai}


def convert(args):
    """Another data set -> LLaVA's JSON: the same source gives the same file. ValueError: it is laid out otherwise."""
    source, given = SOURCES[args.kind], dict(pair.partition("=")[::2] for pair in args.set)
    if unknown := given.keys() - source.__kwdefaults__.keys():
        raise ValueError(f"--set {', '.join(unknown)}: {args.kind} knows {', '.join(source.__kwdefaults__)}")
    try:
        records = [add_tag(record) for record in source(args.src, **given)]
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError, UnicodeError, csv.Error, OSError) as error:
        raise ValueError(f"{args.src} is no {args.kind} source as known here ({type(error).__name__}: {error}); --set "
                         f"tells what is called otherwise: {', '.join(source.__kwdefaults__)}") from None
    write_records(args.out, records)
    print(f"{len(records)} records written to {args.out}; `python data.py check` looks at them and their pictures")
