"""Hugging Face ids -> folders on this disk: only the files that loading needs; without network, what the cache holds.

Repositories often hold their weights twice or three times, as .safetensors, as .bin, for other frameworks. So the files
are listed first, then those are chosen that `load` would read, then they are fetched, several at a time, with a
progress bar; what an interrupted download left is used by the next one. `owner/name@revision` asks for a branch, a tag
or a commit.
"""

import re
from pathlib import Path

from formats.command import say
from formats.files import ADAPTER_FILES, PROJECTOR_FILES, TRAINED_BESIDE, WEIGHT_FILES, read_json

CACHE_DIR = None  # where downloads are kept, train.py's --cache_dir; None: Hugging Face's own place


def find_folder(path_or_hub_id, weights=True):
    """A local folder, or a Hugging Face id's files (weights=False: config, tokenizer) -> Path. ValueError: neither."""
    folder, (repository, revision) = Path(path_or_hub_id), parse(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; expected a folder with config.json and weights, or of a projector "
                         "a .bin or .safetensors file, like mm_projector.bin")
    if repository is None:
        raise ValueError(f"{folder} does not exist; expected a model folder or a Hugging Face id like owner/name")
    return download(repository, revision, weights)


def here(path_or_hub_id):
    """A model's folder that needs no network, local or in Hugging Face's cache; None if there is none."""
    folder, (repository, revision) = Path(path_or_hub_id), parse(path_or_hub_id)
    if not folder.is_dir() and repository:
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(
                repository, revision=revision, cache_dir=CACHE_DIR, local_files_only=True,
                allow_patterns=["config.json"]))
        except Exception:  # not in the cache: a class for that in every version of huggingface_hub
            return None
    return folder if (folder / "config.json").exists() else None


def parse(hub_id):
    """'owner/name@revision' -> ('owner/name', 'revision' or None); (None, None) for what is no id."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(hub_id))
    return match.groups() if match else (None, None)


def download(repository, revision, weights):
    """Fetch what `choose` picks, or take the cache where the hub cannot be asked. -> folder"""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # half a second, not for local folders
    hub_id = repository + (f"@{revision}" if revision else "")
    try:
        siblings = HfApi().model_info(repository, revision=revision, timeout=30).siblings
    except Exception as error:
        if folder := here(hub_id):
            say(f"{hub_id}: {reason(error)}; the copy in the cache is taken")
            return folder
        raise ValueError(f"{hub_id} is no folder here, and no download from Hugging Face: {reason(error)}") from None
    try:
        names = [sibling.rfilename for sibling in siblings]
        place = {"repo_id": repository, "revision": revision, "cache_dir": CACHE_DIR}
        files = choose(names, weights, lambda index: read_json(hf_hub_download(filename=index, **place)))
        if weights and files == choose(names, False):
            raise ValueError(f"{hub_id} holds no weights that are read here; expected {', '.join(WEIGHT_FILES)}")
        return Path(snapshot_download(allow_patterns=files, **place))
    except ValueError:
        raise
    except Exception as error:  # the network, the disk; each library below has classes of its own for it
        raise ValueError(f"{hub_id}: the download broke off ({reason(error)}); the same command goes on from "
                         "there") from None


def choose(names, weights, read_index=None):
    """The names of a repository's files that `load` reads. read_index(name) -> the content of an index of shards."""
    files = [name for name in names if "/" not in name and name != "trainer_state.json"
             and (name.endswith((".json", ".jinja")) or name == "tokenizer.model")]
    for kind in (WEIGHT_FILES, PROJECTOR_FILES, ADAPTER_FILES, TRAINED_BESIDE) if weights else ():
        name = next((name for name in kind if name in names), "")
        if name.endswith(".index.json"):
            files += sorted(set(read_index(name).get("weight_map", {}).values()) & set(names))
        elif name:
            files.append(name)
    return files


def reason(error):
    """Why the hub gave nothing, in a few words."""
    from huggingface_hub import errors
    known = (
        (errors.GatedRepoError, "it is gated: accept its terms on its page and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private: log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    answered = getattr(error, "response", None) is not None
    return next((words for kind, words in known if isinstance(error, kind)),
                first if answered else f"the hub cannot be reached ({first})")
