"""The world as files: pictures, and records in LLaVA's JSON about them (LLAVA.md 4.1, 9.1).

    OUT/pretrain.json    stage 1: one caption per picture
    OUT/finetune.json    stage 2: conversations, descriptions, reasoning, some text only, some with two pictures
    OUT/eval.json        held-out pictures, one question per record, with its `kind`; answers balanced within a kind
    OUT/unseen.json      the same on combinations of colour and shape that no training picture or text contains
    OUT/pictures/SET/NUMBER.png
"""

import json
import pathlib
import random

from miniature import words
from miniature.world import draw, make_scene, training_scene

TURNS = 7  # questions per conversation: they share the cost of the system prompt and of the picture's tokens
SHARES = {"conversation": 0.84, "description": 0.06, "reasoning": 0.06, "text": 0.03, "two pictures": 0.01}


def write_world(folder, captions, conversations, questions, seed, report=print):
    """Draw everything into `folder`; the same arguments give the same files, byte for byte.

    captions, conversations: records of stage 1 and stage 2. questions: evaluation records per kind.
    """
    sets = {"pretrain": caption_records(seed, captions), "finetune": finetune_records(seed, conversations),
            "eval": question_records(seed, questions), "unseen": question_records(seed, questions, withheld=True)}
    folder = pathlib.Path(folder)
    for name, (records, scenes) in sets.items():
        (folder / "pictures" / name).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            draw(scene).save(folder / picture(name, number), compress_level=1)
        lines = ",\n".join(json.dumps(record) for record in records)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        report(f"{folder / name}.json: {len(records)} records, {len(scenes)} pictures")


def picture(name, number):
    """The path of a picture inside the world's folder, as records give it."""
    return f"pictures/{name}/{number:06d}.png"


def record(name, number, turns, images=None, **more):
    """One record: `turns` is [(question, answer)]; a picture's tag stands before the first question."""
    tags = "<image>\n" * (len(images) if isinstance(images, list) else images is not None)
    said = [(tags * (i == 0) + question, answer) for i, (question, answer) in enumerate(turns)]
    messages = [{"from": role, "value": value} for pair in said for role, value in zip(("human", "gpt"), pair)]
    return {"id": f"{name}-{number:06d}", **({} if images is None else {"image": images}), **more,
            "conversations": messages}


def caption_records(seed, count):
    """Stage 1: (records, scenes)."""
    rng = random.Random(f"pretrain {seed}")
    scenes = [training_scene(rng) for _ in range(count)]
    return [record("pretrain", i, [(rng.choice(words.BRIEF_REQUESTS), words.caption(scene))], picture("pretrain", i))
            for i, scene in enumerate(scenes)], scenes


def finetune_records(seed, count):
    """Stage 2: (records, scenes). The parts stand in LLaVA's proportions roughly: mostly conversations."""
    rng = random.Random(f"finetune {seed}")
    records, scenes = [], []

    def look():
        scenes.append(training_scene(rng))
        return scenes[-1], picture("finetune", len(scenes) - 1)

    for number, part in enumerate(rng.choices(list(SHARES), list(SHARES.values()), k=count)):
        if part == "text":
            turns, image = text_turns(rng), None
        elif part == "two pictures":
            (one, first), (two, second) = look(), look()
            turns, image = two_picture_turns(one, two, rng), [first, second]
        else:
            scene, image = look()
            if part == "conversation":
                turns = words.dialogue(scene, rng, TURNS)
            elif part == "description":
                turns = [(rng.choice(words.DETAIL_REQUESTS), words.description(scene))]
            else:
                turns = [words.reasoning(scene, rng)]
        records.append(record("finetune", number, turns, image))
    return records, scenes


def text_turns(rng):
    """A conversation without a picture: common knowledge, or questions about a scene told in words."""
    if rng.random() < 0.5:
        return list(dict(words.general(rng) for _ in range(3)).items())
    scene = training_scene(rng)
    turns = words.dialogue(scene, rng, TURNS)
    return [(f"{words.caption(scene)}.\n{turns[0][0]}", turns[0][1]), *turns[1:]]


def two_picture_turns(one, two, rng):
    """Questions that need both pictures, or one of them by its number."""
    more = (len(one.objects) > len(two.objects)) - (len(one.objects) < len(two.objects))
    turns = [("Which picture has more objects?", ("neither", "the first", "the second")[more])]
    for number, scene in (("first", one), ("second", two)):
        thing = rng.choice(scene.objects)
        kind = "color" if thing.color else "shape"
        turns += [(f"What {kind} is the object at the {thing.place} of the {number} picture?", getattr(thing, kind)),
                  (f"How many objects are there in the {number} picture?", words.NUMBERS[len(scene.objects)])]
    return turns


def question_records(seed, count, withheld=False):
    """Evaluation: (records, scenes), `count` per kind and half as many descriptions, one picture and one question each.

    Within a kind, its groups of answers take turns, so that each is right equally often. With `withheld` every question
    is about a withheld combination. The order is random: any part of the file holds all kinds, and to show a record its
    neighbour's picture is to show it any picture.
    """
    name = "unseen" if withheld else "eval"
    rng = random.Random(f"{name} {seed}")
    asked = [(kind, *_scene_for(kind, number, rng, withheld)) for kind in words.KINDS for number in range(count)]
    for scene in [make_scene(rng, withheld) for _ in range(count // 2)]:
        asked.append(("description", scene, (words.DETAIL_REQUESTS[0], words.description(scene))))
    rng.shuffle(asked)
    records = [record(name, i, [turn], picture(name, i), kind=kind) for i, (kind, _, turn) in enumerate(asked)]
    return records, [scene for _, scene, _ in asked]


def _scene_for(kind, number, rng, withheld):
    """A scene that allows a question of the group whose turn it is, and that question: (scene, (question, answer))."""
    groups = words.GROUPS[kind]
    if withheld and kind in ("color", "shape"):
        groups = [pair[kind == "shape"] for pair in words.WITHHELD]
    wanted = list(groups)[number % len(groups)]
    while True:
        scene = make_scene(rng, withheld)
        asked = scene.objects if not withheld else [t for t in scene.objects if (t.color, t.shape) in words.WITHHELD]
        turns = words.groups(kind, scene, asked, rng).get(wanted)
        if turns:
            return scene, rng.choice(turns)
