"""What a model is, known before any of its weights: config.json alone, of a folder or of the hub, or of
public_models.json, where the best known models are written down, so that planning with them needs no network."""

from dataclasses import replace
from pathlib import Path

from formats import hub, layouts
from formats.files import read_json
from formats.vocabulary import HEAD


def values_of(name):
    """A folder or a hub id -> its config.json, a dict. Asked are the disk, public_models.json, then the hub."""
    public = {key.lower(): values for key, values in read_json(Path(__file__).with_name("public_models.json")).items()}
    values, folder = public.get(str(name).lower()), hub.here(name)
    if folder or values is None:
        return read_json((folder or hub.find_folder(name, weights=False)) / "config.json")
    return public[values.lower()] if isinstance(values, str) else values


def tower_config(name):
    """A folder or a hub id -> ClipVisionConfig."""
    return layouts.read_vision_config(values_of(name), name)


def model_config(name):
    """A folder or a hub id -> LlavaConfig, with the tower that it names."""
    values = values_of(name)
    config, tower = layouts.read_config(values, {HEAD}, name), values.get("mm_vision_tower")
    tower = tower or values.get("vision_tower")
    return replace(config, vision=tower_config(tower)) if config.vision is None and tower else config
