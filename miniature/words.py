"""What can be said about a scene: captions, questions with short answers, descriptions, reasoning.

A question is a tuple `(question, answer, group)`. The *group* is what balancing goes by: for a colour the answer
itself, for a comparison whether the first, the second or neither is right. Picking a group first and then a question
of that group keeps a blind guess near chance. Withheld combinations need no rule of their own here: only the question
about something absent invents a combination, and in a scene without withheld ones it draws from `ALLOWED`.
"""

from miniature.world import ALLOWED, COLORS, PLACES, SHAPES, WITHHELD

NUMBERS = ("zero", "one", "two", "three", "four")
DETAIL_REQUESTS = ("Describe the picture in detail.", "What do you see in the picture?",
                   "Give a detailed description of the picture.")
BRIEF_REQUESTS = ("Describe the picture.", "What is in the picture?", "Give a caption for the picture.")


def name(thing):
    """"red circle"; "circle" where the colour has no name."""
    return f"{thing.color} {thing.shape}" if thing.color else thing.shape


def a(words):
    """The words behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape):
    """"circles", "crosses"."""
    return shape + ("es" if shape == "cross" else "s")


def objects(count):
    """"one object", "two objects"."""
    return f"{NUMBERS[count]} object" + ("" if count == 1 else "s")


def join(parts):
    """"x, y and z"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def full(thing):
    """"a small red circle at the top-left"."""
    return f"a {thing.size} {name(thing)} at the {thing.place}"


def caption(scene):
    """The caption of stage 1: everything, in reading order."""
    return f"{objects(len(scene.objects))}: {join([full(thing) for thing in scene.objects])}"


def glimpse(scene, rng):
    """What someone noticed: everything, or of every object only the shape, or only the colour (if it has a name)."""
    style = rng.choice(("all", "shape", "color")) if scene.objects[0].color else "shape"
    if style == "all":
        return caption(scene)
    return join([f"a {thing.shape} at the {thing.place}" if style == "shape" else f"{thing.color} at the {thing.place}"
                 for thing in scene.objects])


def description(scene):
    """The detailed description: the caption's facts in a whole sentence."""
    things = scene.objects
    start = f"There {'is' if len(things) == 1 else 'are'} {objects(len(things))} in the picture: "
    return start + join([full(thing) for thing in things]) + "."


def unique(scene, attribute, thing):
    """No other object has the same colour, or shape."""
    return sum(getattr(other, attribute) == getattr(thing, attribute) for other in scene.objects) == 1


# ---------------------------------------------------------------- questions with short answers, by kind
# Each takes a scene, the objects of it that may be asked about, and a random.Random; yields (question, answer, group).

def color_questions(scene, things, rng):
    """What colour something has, named by its shape where that is unique, or by its place."""
    for thing in things:
        if thing.color:
            yield f"What color is the object at the {thing.place}?", thing.color, thing.color
            if unique(scene, "shape", thing):
                yield f"What color is the {thing.shape}?", thing.color, thing.color


def shape_questions(scene, things, rng):
    """What shape something has, named by its colour where that is unique, or by its place."""
    for thing in things:
        yield f"What shape is the object at the {thing.place}?", thing.shape, thing.shape
        if thing.color and unique(scene, "color", thing):
            yield f"What shape is the {thing.color} object?", thing.shape, thing.shape


def count_questions(scene, things, rng):
    """How many objects there are, of all, of a shape, or of a colour; never zero (presence asks for that)."""
    yield "How many objects are there?", NUMBERS[len(scene.objects)], len(scene.objects)
    for thing in things:
        number = sum(other.shape == thing.shape for other in scene.objects)
        yield f"How many {plural(thing.shape)} are there?", NUMBERS[number], number
        if thing.color:
            number = sum(other.color == thing.color for other in scene.objects)
            yield f"How many {thing.color} objects are there?", NUMBERS[number], number


def position_questions(scene, things, rng):
    """Where something is, one of four places."""
    for thing in things:
        yield f"Where is the {name(thing)}?", thing.place, thing.place


def presence_questions(scene, things, rng):
    """Whether something is there. What is absent mostly shares colour or shape with something present.

    If all that may be asked about is withheld, the absent one is withheld too: else familiarity alone would answer.
    """
    present = [(thing.color, thing.shape) for thing in scene.objects]
    strange = all((thing.color, thing.shape) in WITHHELD for thing in things)
    absent = [pair for pair in (WITHHELD if strange else ALLOWED) if pair not in present]
    near = [pair for pair in absent if any((pair[0] == color) != (pair[1] == shape) for color, shape in present)]
    for thing in things:
        yield f"Is there {a(name(thing))}?", "yes", "yes"
    for color, shape in rng.sample(near, min(2, len(near))) + rng.sample(absent, 2):
        yield f"Is there {a(f'{color} {shape}')}?", "no", "no"
    if not strange:
        for attribute, values, form in (("color", COLORS, "{} object"), ("shape", SHAPES, "{}")):
            here = {getattr(thing, attribute) for thing in scene.objects} - {None}
            for answer, some in (("yes", sorted(here)), ("no", sorted(set(values) - here))):
                if some:
                    yield f"Is there {a(form.format(rng.choice(some)))}?", answer, answer


def comparison_questions(scene, things, rng):
    """Which of two objects is bigger (or neither), or further left."""
    for one in scene.objects:
        for two in scene.objects:
            if one is two or not (one in things or two in things):
                continue
            pair = f"the {name(one)} or the {name(two)}?"
            answers = "neither", f"the {name(one)}", f"the {name(two)}"
            bigger = (one.size == "big") - (two.size == "big")
            yield f"Which is bigger, {pair}", answers[bigger], ("bigger", bigger)
            left = PLACES.index(two.place) % 2 - PLACES.index(one.place) % 2
            if left:
                left //= abs(left)
                yield f"Which is further left, {pair}", answers[left], ("left", left)


KINDS = {"color": color_questions, "shape": shape_questions, "count": count_questions, "position": position_questions,
         "presence": presence_questions, "comparison": comparison_questions}
GROUPS = {"color": COLORS, "shape": SHAPES, "count": (1, 2, 3, 4), "position": PLACES, "presence": ("yes", "no"),
          "comparison": (("bigger", 0), ("bigger", 1), ("bigger", -1), ("left", 1), ("left", -1))}


def groups(kind, scene, things, rng):
    """{group: [(question, answer)]}: what can be asked of one kind about `things` of the scene; empty if nothing."""
    found = {}
    for question, answer, group in KINDS[kind](scene, things, rng):
        found.setdefault(group, []).append((question, answer))
    return found


def dialogue(scene, rng, turns):
    """`turns` different questions, or all there are, of all kinds in random order: [(question, answer)]."""
    asked, kinds = {}, []
    for _ in range(4 * turns):
        if len(asked) == turns:
            break
        kinds = kinds or rng.sample(list(KINDS), len(KINDS))
        found = groups(kinds.pop(), scene, scene.objects, rng)
        if found:  # first a group, evenly, then a question of it
            asked.setdefault(*rng.choice(found[rng.choice(list(found))]))
    return list(asked.items())


# ---------------------------------------------------------------- reasoning, and texts without a picture

def reasoning(scene, rng):
    """A question whose answer needs a step beyond looking, and says that step: (question, answer)."""
    things = scene.objects
    chosen = rng.choice(things)
    left = len(things) - 1
    found = [(f"If the {name(chosen)} is taken away, how many objects are left?",
              f"There {'is' if left == 0 else 'are'} {objects(left + 1)}, so {NUMBERS[left]} "
              f"{'is' if left == 1 else 'are'} left.")]
    if left:
        colors = list(dict.fromkeys(filter(None, (thing.color for thing in things))))
        if colors:
            found.append(("Do all objects have the same color?", f"Yes, they are all {colors[0]}." if len(colors) == 1
                          else f"No, the colors are {join(colors)}."))
        size = {thing.size for thing in things}
        found.append(("Would all objects fit into a small box?",
                      "Yes, because all objects are small." if size == {"small"} else
                      f"No, because {join(['the ' + name(thing) for thing in things if thing.size == 'big'])} "
                      f"{'is' if sum(thing.size == 'big' for thing in things) == 1 else 'are'} big."))
    return rng.choice(found)


CORNERS = {"circle": "zero", "square": "four", "triangle": "three"}


def general(rng):
    """A question that needs no picture: (question, answer)."""
    one = rng.randint(1, 3)
    two = rng.randint(0, 4 - one)
    shape = rng.choice(list(CORNERS))
    return rng.choice([(f"What is {NUMBERS[one]} plus {NUMBERS[two]}?", NUMBERS[one + two]),
                       (f"How many corners does a {shape} have?", CORNERS[shape]),
                       ("Which colors do you know?", join(list(COLORS)) + "."),
                       ("Which shapes do you know?", join(list(SHAPES)) + ".")])
