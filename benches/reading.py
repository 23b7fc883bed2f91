"""Reading data: a JSON array of 300,000 records, and pictures.

Records: ours remembers where each stands in the file and parses it when asked; the plain way is `json.load`, as in the
original. Each runs in a process of its own, on a file of 1.3 kB per record. `memory` is what a reading process, forked
as by a DataLoader, holds for itself alone once it has read a quarter of the records in random order: the plain way's
objects are copied, page by page, as they are touched.

`startup`: train.py itself from its beginning to its first batch, imports, a model, a look at each record and at whether
its picture exists included, for 300,000 records and for 700,000; CPU seconds beside the minute that we allow.

`pipeline`: 200 records, one picture each, through train.py's loader with 4 workers, to pixels of 336; beside it what a
stage-1 step of SmolLM2's shape on one core takes for as many. Seconds on the clock. Above 1, the loader waits.

Pictures: a JPEG of 640 x 480 to the pixels of a tower of 336, ours and Pillow with transformers' CLIPImageProcessor,
both padding to a square; CPU seconds of one thread for 100 pictures, medians of five.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import weights
from benches import loading
from data import Records
from formats.records import read_records, write_records
from vision import ImageProcessor, open_picture

MINIATURE = Path(__file__).parent.parent / "miniature" / "llava"
WORDS = "the a dog cat red ball runs through green park with small child under old tree near quiet street".split()


def records(smoke):
    """Seconds until the first record can be read."""
    return race(smoke, "seconds", "s")


def records_memory(smoke):
    """MB that each reading process holds for itself."""
    return race(smoke, "memory", "MB")


def race(smoke, measure, unit):
    """Both ways on the same file. -> a row"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records.json")
        write_records(path, made(1000 if smoke else 300_000))
        ours, peer = (loading.child("reading", who, path) for who in ("ours", "json.load"))
    if ours["checksum"] != peer["checksum"]:
        raise ValueError("ours and json.load did not read the same records")
    return {"ours": ours[measure], "peer": peer[measure], "peer_name": "json.load", "unit": unit, "error": 0.0}


def made(count):
    """Records like those of the published mix: one to four questions and answers."""
    draw = random.Random(0)
    for number in range(count):
        turns = [{"from": who, "value": " ".join(draw.choices(WORDS, k=draw.randint(5, most)))}
                 for _ in range(draw.randint(1, 4)) for who, most in (("human", 20), ("gpt", 150))]
        yield {"id": f"{number:012d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}


def startup(smoke):
    """Seconds until the first batch of 300,000 records."""
    return until_first_batch(1000 if smoke else 300_000)


def startup_700k(smoke):
    """Seconds until the first batch of 700,000 records."""
    return until_first_batch(2000 if smoke else 700_000)


def until_first_batch(count):
    """train.py with --group_by_modality_length, which asks for every record's length. -> a row"""
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "records.json"), (
            shown(record, f"{i % 100}.jpg") for i, record in enumerate(made(count))))
        for i in range(100):
            Image.new("RGB", (64, 48), (i, 0, 0)).save(Path(folder, f"{i}.jpg"))
        seconds = loading.child("reading", "train.py", folder)["seconds"]
    return {"ours": seconds, "peer": 60.0, "peer_name": "a minute", "unit": "s", "error": 0.0}


def first_batch(folder):
    """What the child does: train until the first batch has come, and leave."""
    import train

    def arrived(loop, batch):
        assert len(batch.ids) == 4
        raise KeyboardInterrupt

    train.Loop.forward_backward = arrived
    try:
        train.main(["--stage", "finetune", "--use_cpu", "--model_name_or_path", str(MINIATURE), "--data_path",
                    f"{folder}/records.json", "--image_folder", folder, "--output_dir", f"{folder}/out",
                    "--group_by_modality_length", "--per_device_train_batch_size", "4", "--max_steps", "1",
                    "--gradient_accumulation_steps", "1", "--model_max_length", "2048"])
    except KeyboardInterrupt:
        return {"seconds": time.process_time()}


def pipeline(smoke):
    """Seconds on the clock for 200 records."""
    from benches.training import seconds_per_record
    count = 20 if smoke else 200
    loaded = weights.load(MINIATURE, dtype="float32", device="cpu")
    loaded.image_processor = ImageProcessor(336)
    with tempfile.TemporaryDirectory() as folder:
        photo(Path(folder, "photo.jpg"))
        write_records(Path(folder, "records.json"), (shown(record, "photo.jpg") for record in made(count)))
        records = Records(f"{folder}/records.json", folder, loaded, "v1", 2048)
        loader = DataLoader(records, 4, collate_fn=records.pack, num_workers=4)
        began = time.perf_counter()
        assert sum(len(batch.pixel_values) for batch in loader) == count
        spent = time.perf_counter() - began
    return {"ours": spent, "peer": count * seconds_per_record(smoke), "peer_name": "a stage-1 step", "unit": "s",
            "error": 0.0}


def shown(record, image):
    """The record with a picture, which its first question is about."""
    record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
    return {**record, "image": image}


def photo(path):
    """A JPEG of 640 x 480."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def measured(who, path):
    """What the child does. -> {"seconds", "memory" (MB), "checksum"}"""
    if who == "train.py":
        return first_batch(path)
    began = time.perf_counter()
    if who == "ours":
        rows = read_records(path)
    else:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    seconds = time.perf_counter() - began
    reader = torch.multiprocessing.get_context("fork")
    answers = reader.Queue()
    process = reader.Process(target=read_a_quarter, args=(rows, answers))
    process.start()
    held, checksum = answers.get()
    process.join()
    return {"seconds": seconds, "memory": held / 1e6, "checksum": checksum}


def read_a_quarter(rows, answers):
    """What a reading process does with the records; it answers with the bytes that it holds alone."""
    before, checksum = alone(), 0
    for i in random.Random(0).sample(range(len(rows)), len(rows) // 4):
        checksum += sum(len(turn["value"]) for turn in rows[i]["conversations"])
    answers.put((alone() - before, checksum))


def alone():
    """Bytes of memory that this process shares with no other (Linux)."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private")) * 1024


def pictures(smoke):
    """CPU seconds for 100 pictures, from file to pixels."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    edge, count = 336, 2 if smoke else 100
    ours = ImageProcessor(edge)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})
    grey = tuple(int(255 * mean) for mean in theirs.image_mean)

    def plain(path):
        picture = Image.open(path).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), grey)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return theirs.preprocess(square, return_tensors="pt")["pixel_values"]

    torch.set_num_threads(1)
    ways, seconds = (lambda path: ours(open_picture(path)), plain), ([], [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photo.jpg")
        photo(path)
        error = (ways[0](path) - ways[1](path)).abs().max().item()
        for _ in range(1 if smoke else 5):
            for way, spent in zip(ways, seconds):
                began = time.process_time()
                for _ in range(count):
                    way(path)
                spent.append((time.process_time() - began) * 100 / count)
    mine, plain_way = map(statistics.median, seconds)
    return {"ours": mine, "peer": plain_way, "peer_name": "PIL+CLIPImageProcessor", "unit": "s", "error": error}


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:])))
