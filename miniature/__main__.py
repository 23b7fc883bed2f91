"""Make the miniature's world and towers.

    python -m miniature world OUT         pictures, captions, conversations and held-out questions (LLaVA's JSON)
    python -m miniature towers OUT        pretrain a tiny CLIP and a tiny LLaMA on that world (OUT/vision, OUT/llm)
    python -m miniature examples OUT      a few pictures to ask about; unseen.png shows a combination never trained
"""

import random
from pathlib import Path

import torch

from formats import command
from miniature import records, towers
from miniature.world import WITHHELD, draw, make_scene


def main(argv=None):
    """The three commands above."""
    parser = command.Parser(prog="python -m miniature", description=__doc__)
    doors = parser.add_subparsers(dest="door", required=True)
    world = doors.add_parser("world", help="pictures and records")
    world.add_argument("--captions", type=int, default=6000, help="records of stage 1 (default 6000)")
    world.add_argument("--conversations", type=int, default=12000, help="records of stage 2 (default 12000)")
    world.add_argument("--questions", type=int, default=40, help="held-out questions of each kind (default 40)")
    pretrain = doors.add_parser("towers", help="a tiny CLIP and a tiny LLaMA")
    pretrain.add_argument("--clip_steps", type=int, default=900, help="steps of 96 pictures (default 900)")
    pretrain.add_argument("--llama_steps", type=int, default=750, help="steps of 32 texts (default 750)")
    examples = doors.add_parser("examples", help="a few pictures")
    for door in (world, pretrain, examples):
        door.add_argument("out", help="the folder to write")
        door.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    args = parser.parse_args(argv)
    if args.door == "world":
        records.write_world(args.out, args.captions, args.conversations, args.questions, args.seed)
    elif args.door == "towers":
        torch.manual_seed(args.seed)
        towers.write_towers(args.out, args.seed, args.clip_steps, args.llama_steps)
    else:
        write_examples(Path(args.out), args.seed)


def write_examples(folder, seed):
    """Three pictures, twelve times the training size: one object, three, and a withheld combination beside another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"examples {seed}")
    scenes = {"one": make_scene(rng, count=1), "scene": make_scene(rng, count=3)}
    while "unseen" not in scenes:
        scene = make_scene(rng, withheld=True, count=2)
        if sum((thing.color, thing.shape) in WITHHELD for thing in scene.objects) == 1:
            scenes["unseen"] = scene
    for name, scene in scenes.items():
        draw(scene, side=576).save(folder / f"{name}.png")
        print(f"{folder / name}.png: " + ", ".join(f"{t.size} {t.color} {t.shape} {t.place}" for t in scene.objects))


if __name__ == "__main__":
    command.run(main)
