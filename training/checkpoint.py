"""The training state of a run: what a killed run needs to go on as if nothing had happened, to the last bit.

    output_dir/checkpoint-500/     written as checkpoint-500.tmp, renamed when it is complete
        __0_0.distcp, __1_0.distcp …   what trains and the optimiser's moments; every rank writes its own shards
        .metadata                      the table of torch.distributed.checkpoint (DCP): what stands where
        state.json                     all else: step, place in the data, random state of each rank, flags, files

Frozen parts are not in it; they come from their source again, as at the start. The learning rate follows from the step,
the order of the records from seed and place. Another number of ranks may go on: each reads the pieces of its shards.

.metadata is a pickle, and a pickle can run any code. It is read by an unpickler that admits DCP's own classes only, and
may tell of tensors only: for other objects DCP would unpickle what stands in the files without asking.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

import weights
from formats import files
from formats.command import say

# Flags that may change between a run and its resumption: where, how often and how fast, never what is computed. Ranks
# and accumulation may change together; `facts` of `compare` has their product.
FREE = {
    "output_dir", "overwrite_output_dir", "resume", "resume_anyway", "save_strategy", "save_steps", "save_total_limit",
    "save_projector_only", "max_shard_size", "skip_nonfinite", "gradient_accumulation_steps", "gradient_checkpointing",
    "dataloader_num_workers", "logging_steps", "log_samples", "verbose", "report_to", "run_name", "debug", "cache_dir",
    "stage", "recipe", "model", "conv_mode", "deepspeed", "fsdp", "keep_gathered", "offload", "evaluation_strategy",
    "lora_shard_base", "force", "local_rank", "fsdp_replicas", "ddp_timeout", "plan", "gpus", "plan_tokens",
    "per_device_eval_batch_size", "eval_data_path", "eval_steps", "eval_generate", "eval_pictures", "cache_features",
    "plot", "out"}
STATE = {"step": int, "epoch": int, "records": int, "skipped": int, "owed": bool, "scaler": dict, "facts": dict,
         "args": dict, "random": list, "files": dict}  # what state.json must have, to be gone on from
NUMBERED = re.compile(r"checkpoint-(\d+)")


class OnAllRanks(ValueError):
    """An error that every rank raises at the same place, so that they can still do something together."""


def on_first_rank(function, *arguments, tensors=None):
    """Call function on rank 0; every rank gets what it returns, or its error. tensors: {name: tensor}, its last
    argument: what ranks share are LazyTensors; when one is read, the others, which wait here, give their shards."""
    def read(name):  # for which the others wait below
        dist.broadcast_object_list([name])
        return tensors[name].full_tensor().cpu()

    box = [None]
    if dist.get_rank() == 0:
        arguments += () if tensors is None else ({
            name: files.LazyTensor(tensor.shape, tensor.dtype, None, partial(read, name))
            if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()},)
        try:
            box = [(function(*arguments), None)]
        except (ValueError, OSError) as error:
            box = [(None, str(error))]
    dist.broadcast_object_list(box)
    while isinstance(box[0], str):
        tensors[box[0]].full_tensor()
        dist.broadcast_object_list(box)
    result, error = box[0]
    if error is not None:
        raise OnAllRanks(error)
    return result


def gather(own):
    """What every rank holds, in a list by rank."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


# ---------------------------------------------------------------------------------------------- where a run starts from


def find(args):
    """Where the run of these flags begins -> (its checkpoint's folder or None, a sentence if it has ended already).
    Changes nothing on the disk. ValueError: a model there is to stay, --resume is incomplete, other flags."""
    out, anew, done = Path(args.output_dir), args.overwrite_output_dir, 0
    if args.resume not in ("auto", "never"):
        folder = Path(args.resume)
        if anew:
            raise ValueError(f"--overwrite_output_dir begins anew, --resume {folder} goes on; drop one")
        if why := what_is_wrong(folder):
            raise ValueError(f"--resume {folder}: {why}; name a complete checkpoint-N, or auto for the newest one")
    elif anew or args.resume == "never":
        folder = None
    else:
        folder = newest(out)
        state = files.read_json(out / "trainer_state.json", missing={})
        done = state.get("global_step", 0) if state.get("global_step") == state.get("max_steps") else 0
    if done or folder:
        before = files.read_json(out / "training_args.json") if done else read_state(folder)["args"]
        if compare(out if done else folder, before, vars(args), args.resume_anyway) and done:
            return None, f"{out} holds this run, finished after {done} steps; --overwrite_output_dir begins anew"
    elsewhere = folder is None or folder.resolve().parent != out.resolve()
    if elsewhere and (out / "config.json").exists() and not anew:
        raise ValueError(f"{out} already holds a model; give another --output_dir, or --overwrite_output_dir")
    return folder, None


def newest(out):
    """The complete checkpoint with the highest number, or None; incomplete ones are passed over with a word."""
    for folder in reversed(checkpoints(out).values()):
        why = what_is_wrong(folder)
        if why is None:
            return folder
        say(f"{folder} is skipped: {why}")
    return None


def checkpoints(out):
    """{step: folder checkpoint-N} of a run, complete or not, in order."""
    found = {NUMBERED.fullmatch(folder.name): folder for folder in Path(out).glob("checkpoint-*")}
    return dict(sorted((int(match[1]), folder) for match, folder in found.items() if match))


def what_is_wrong(folder):
    """Why a folder is no complete checkpoint, in words; None if it is one: every file is there in its full length."""
    try:
        state = read_state(folder)
        if wrong := [key for key, kind in STATE.items() if not isinstance(state.get(key), kind)]:
            return f"incomplete, or of another program: its state.json has no proper {', '.join(wrong)}"
        for name, size in state["files"].items():
            if not (folder / name).is_file():
                return f"incomplete, {name} is missing"
            if (folder / name).stat().st_size != size:
                return f"incomplete, {name} has {(folder / name).stat().st_size} of {size} bytes"
    except (ValueError, OSError):
        return "incomplete, or of another program: it has no readable state.json"
    return None


def read_state(folder):
    """state.json of a checkpoint, a dict."""
    return files.read_json(Path(folder) / "state.json")


def compare(where, before, now, anyway):
    """Whether two runs have the same flags (or facts). ValueError, with a list, if not; with `anyway` a warning."""
    now = json.loads(json.dumps(now))  # as it was written: tuples are lists
    changed = "; ".join(f"{name} was {before[name]}, is {now[name]}" for name in now
                        if name in before and name not in FREE and before[name] != now[name])
    if changed and not anyway:
        raise ValueError(f"{where} is of a run with other flags: {changed}; give the same ones, another --output_dir, "
                         "--resume_anyway to go on with these, or --overwrite_output_dir to begin anew")
    if changed:
        say(f"WARNING: {where} goes on with other flags: {changed}")
    return not changed


def settle(args, step, owed=False):
    """Make output_dir hold these flags, and only what led to `step` (None: a new run). What belongs to another course
    is renamed to *.old; rows of log.jsonl that will come again are cut, if `owed` also this step's evaluation."""
    out = Path(args.output_dir)
    (out / "trainer_state.json").unlink(missing_ok=True)  # the run is not finished, or not any more
    for folder in out.glob("checkpoint-*.tmp"):
        say(f"{folder} was never completed: skipped and removed")
        shutil.rmtree(folder)
    log = out / "log.jsonl"
    aside = [folder for number, folder in checkpoints(out).items() if step is None or number > step]
    if step is None and log.exists() and log.stat().st_size:
        aside.append(log)
    for path in aside:
        names = (path.with_name(f"{path.name}.old{i or ''}") for i in range(10**6))
        say(f"{path} is of another run and set aside as {path.rename(next(n for n in names if not n.exists())).name}")
    if step is not None and (cut := cut_log(log, step, owed)):
        say(f"{log}: {cut} rows after step {step} are cut, and will be written again")
    files.write_files(out, {"training_args.json": vars(args)})


def cut_log(log, step, owed=False):
    """Drop the rows later than `step`, with `owed` also its evaluation's, and half lines of a dying run. -> how many"""
    if not log.exists():
        return 0
    lines, kept = log.read_text(encoding="utf-8").splitlines(), []
    for line in lines:
        try:
            row = json.loads(line)
            if row["step"] <= step - (owed and "eval_set" in row):
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            pass
    with files.new_file(log, replace=True) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return len(lines) - len(kept)


# --------------------------------------------------------------------------------------------------------------- saving


def tensors_of(trained, optimizer):
    """{name: tensor} of what trains and of what the optimiser, if given, keeps for it: no copies."""
    tensors = {f"model.{name}": p for name, p in trained.items()}
    for name, p in trained.items() if optimizer else ():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return tensors


def random_state(device):
    """Every random number generator of this rank. (numpy's is not used in training.)"""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state, device):
    """Put back what random_state took."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


class Writer(filesystem.FileSystemWriter):
    """DCP's, without the path in the metadata: a class of pathlib has no place in a pickle that is to be harmless."""

    def storage_meta(self):
        return metadata.StorageMeta(save_id=self.save_id)


def save(folder, tensors, state, own_random):
    """Write one checkpoint, all ranks together: first under a temporary name, which is changed when all is on the disk.
    state: what becomes state.json; own_random: this rank's random_state. OnAllRanks: why not; nothing is left then."""
    folder = Path(folder)
    temporary, randoms = folder.with_name(folder.name + ".tmp"), gather(own_random)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C twice must not cost what the first one saves
    try:
        on_first_rank(make_room, temporary, sum(tensor.nbytes for tensor in tensors.values()))
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(tensors, storage_writer=Writer(temporary), planner=planner)
        on_first_rank(complete, temporary, folder, state | {"random": randoms})
    except (CheckpointException, OnAllRanks) as error:
        on_first_rank(shutil.rmtree, temporary, True)
        raise OnAllRanks(f"{folder} could not be written: {causes(error)}") from None
    finally:
        signal.signal(signal.SIGINT, before)


def causes(error):
    """What went wrong, by rank: DCP's own text is a page of tracebacks."""
    failures = getattr(error, "failures", {})
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failures.items()) or str(error)


def make_room(temporary, size):
    """Begin a checkpoint of `size` bytes; ValueError if the disk has too little room."""
    shutil.rmtree(temporary, ignore_errors=True)  # what an earlier try left
    temporary.mkdir(parents=True)
    if size > (free := files.free_bytes(temporary)):
        raise ValueError(f"it needs {files.gigabytes(size)}, and {files.gigabytes(free)} are free")


def complete(temporary, folder, state):
    """All ranks' pieces are there: write state.json, and give the folder its name."""
    sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
    table = Reader(temporary).read_metadata().storage_data  # what dcp.save returns lacks it in torch 2.11
    missing = {entry.relative_path for entry in table.values()} - sizes.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} of other ranks are not in it; --output_dir must be one folder "
                         "that all nodes share")
    write_state(temporary, state | {"files": sizes})
    temporary.rename(folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    os.fsync(directory)  # the name, too, outlives a power cut
    os.close(directory)


def write_state(folder, state):
    """state.json, whole or not at all, and on the disk."""
    with files.new_file(Path(folder, "state.json"), replace=True) as temporary:
        temporary.write_text(json.dumps(state, default=torch.Tensor.tolist), encoding="utf-8")


def amend(folder, state):
    """Note in a checkpoint, written before an evaluation, what that told."""
    if Path(folder).exists():
        write_state(folder, read_state(folder) | {key: state[key] for key in ("owed", "best")})


def thin_out(out, limit, best=None):
    """Delete the oldest checkpoints but `limit` (--save_total_limit; None, 0 or less: none), never that of `best`."""
    for step, folder in [*checkpoints(out).items()][:-limit] if limit and limit > 0 else ():
        if step != best:
            shutil.rmtree(folder.rename(folder.with_name(folder.name + ".tmp")))  # never half there under its own name


# -------------------------------------------------------------------------------------------------------------- loading


ADMITTED = {(cls.__module__, cls.__name__): cls for cls in (
    metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo)}
ADMITTED |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): lambda name: torch.strided}
ADMITTED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Unpickler(pickle.Unpickler):
    """Builds what DCP writes into .metadata, and refuses every other name."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return ADMITTED[module, name]


class Reader(dcp.FileSystemReader):
    """DCP's, with a harmless unpickler, and for tensors alone (read with weights_only=True)."""

    def read_metadata(self):
        """The table of the checkpoint. ValueError: it is damaged, or holds what only an attacker would put there."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                table = Unpickler(file).load()
            for name, entry in table.state_dict_metadata.items():
                if not isinstance(entry, metadata.TensorStorageMetadata):
                    raise ValueError(f"{name} is no tensor")
            for entry in table.storage_data.values():
                if entry.transform_descriptors or not re.fullmatch(r"__\d+_\d+\.distcp", entry.relative_path):
                    raise ValueError(f"it leads to {entry.relative_path!r}")
        except Exception as error:  # a damaged pickle can raise anything
            said = f"{path} is refused and nothing in it was run: {error}; go on from another checkpoint"
            raise ValueError(said) from None
        return table


def load(folder, trained, optimizer=None):
    """Fill parameters and an optimiser's state in place, each rank its own shards. ValueError: other parts train."""
    reader = Reader(folder)
    table = {key: entry for key, entry in reader.read_metadata().state_dict_metadata.items()
             if optimizer or key.startswith("model.")}
    for key, entry in table.items():
        kind, _, rest = key.partition(".")
        name, _, leaf = rest.rpartition(".")
        if kind == "optimizer" and name in trained:
            p = trained[name]
            optimizer.state[p][leaf] = (torch.zeros_like(p, dtype=entry.properties.dtype) if entry.size == p.shape else
                                        torch.zeros(entry.size, dtype=entry.properties.dtype, device=p.device))
    tensors = tensors_of(trained, optimizer)
    wrong = [name for name in tensors.keys() | table.keys()
             if name not in tensors or name not in table or tensors[name].shape != table[name].size]
    if wrong:
        raise ValueError(f"{folder} and this run do not train the same: {', '.join(sorted(wrong)[:5])}"
                         f"{', …' if len(wrong) > 5 else ''}; give the flags and parts of the run that wrote it")
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {causes(error)}; --resume another checkpoint") from None


# ------------------------------------------------------------------------------------------------------------ test-save


@torch.no_grad()
def rehearse(args, loaded, trained, device, step, left):
    """Before the first step: all that will be saved can be. A small tensor goes to the disk and back, the final model's
    layout follows from shapes, the room is measured. left: checkpoints to come. -> a line. OnAllRanks: why not."""
    out = Path(args.output_dir)
    name, small = min(trained.items(), key=lambda item: item[1].numel())
    test, before = out / "test-save", small.detach().clone()
    on_first_rank(shutil.rmtree, test, True)  # an earlier run may have died here
    save(test, {f"model.{name}": small}, {}, random_state(device))
    small.zero_()
    load(test, {name: small})
    if not torch.equal(*((t.to_local() if hasattr(t, "to_local") else t) for t in (small, before))):
        raise ValueError(f"{out} gives back other numbers than were written; name --output_dir on another disk")
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in loaded.model.state_dict().items()}

    def measure():  # all files but the tensors are written and removed, sizes summed
        model, checkpoint = 0, 3 * sum(p.nbytes for p in trained.values())  # Adam keeps two moments beside each number
        if not args.save_projector_only:
            tensors, contents, _, _ = weights.lay_out(loaded, tensors=shapes)
            model = sum(tensor.nbytes for tensor in tensors.values())
            files.write_files(test, contents)
        shutil.rmtree(test)
        limit, there, count = args.save_total_limit, sum(n <= step for n in checkpoints(out)), left
        if limit and limit > 0:  # the oldest goes when the newest is complete; the best one stays, too
            count = max(0, min(left, limit + args.load_best_model_at_end + 1 - there))
        need, free = model + count * checkpoint, files.free_bytes(out)
        sizes = (f"{count} checkpoints of {files.gigabytes(checkpoint)} and a model of {files.gigabytes(model)} need "
                 f"{files.gigabytes(need)}, {files.gigabytes(free)} are free")
        if need > free:
            raise ValueError(f"{out}: {sizes}; make room, name another --output_dir, or write less with "
                             "--save_total_limit 1, --save_steps or --save_strategy no")
        return f"test-save passed: {sizes}"

    return on_first_rank(measure)
