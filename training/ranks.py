"""The ranks of a run watch each other: when one dies, the others say which one and on which records, and stop.

A rank that waits for a dead one learns little (gloo: a closed connection; NCCL: nothing at all) and can wait as long as
--ddp_timeout. So each rank keeps a word about itself in the store through which the ranks found each other, and renews
it every second from a thread of its own, whatever else it is doing. A word that is not renewed any more is the last one
of a dead rank; a rank that leaves because of an error says so in its last word.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Event, Lock, Thread

import torch.distributed as dist

BEAT = 1.0  # seconds between two words
SHORT = 5.0  # seconds of silence that tell of a death where something has gone wrong already
LONG = 20.0  # the same where nothing else does, and SHORT to leave; after 30 torchrun kills all that are left


class Watch(Thread):
    """This rank's word, and its ear for the others'."""

    def __init__(self):
        super().__init__(daemon=True)
        self.rank, self.size, self.lock, self.over = dist.get_rank(), dist.get_world_size(), Lock(), Event()
        self.word = {"beat": 0, "pid": os.getpid(), "host": socket.gethostname(), "step": 0, "ids": [], "error": None}
        self.heard = {}  # rank -> (its word, when it was new)
        where = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", 0))
        self.store = dist.HashStore() if self.size == 1 else dist.TCPStore(
            *where, is_master=False, timeout=timedelta(seconds=SHORT))
        self.tell()
        dist.barrier()
        self.start()

    def tell(self, **news):
        """Renew this rank's word. news: `step` under way and `ids` of its records, or the `error` that ends it."""
        with self.lock, suppress(RuntimeError):  # without the store there is silence, which says enough
            self.word |= news | {"beat": self.word["beat"] + 1}
            self.store.set(f"word of rank {self.rank}", json.dumps(self.word))

    def run(self):
        """The thread: tell, listen. A main thread that goes on waiting for what will not come is ended from here."""
        while not self.over.wait(BEAT):
            self.tell()
            with suppress(RuntimeError):
                words = self.store.multi_get([f"word of rank {rank}" for rank in range(self.size)])
                for rank, word in enumerate(map(json.loads, words)):
                    if rank not in self.heard or self.heard[rank][0] != word:
                        self.heard[rank] = word, time.monotonic()
            if (why := self.verdict(LONG)) and not self.over.wait(SHORT):
                print("error:", why, file=sys.stderr, flush=True)
                os._exit(2)

    def verdict(self, patience):
        """Why this rank cannot go on: ranks have died (no news for `patience` seconds), or else left; "": it can."""
        now, words = time.monotonic(), {rank: word for rank, (word, _) in self.heard.items()}
        silent = [rank for rank, (_, since) in self.heard.items() if now - since > patience]
        if self.rank in silent:  # the store itself is gone with what kept it; its word may be a second old
            silent = [0]
        dead = {rank: words[rank] for rank in silent if not words[rank]["error"]}
        lines, left = [], {rank: word for rank, word in words.items() if word["error"] and rank != self.rank}
        for rank, word in (dead or left).items():
            at = f"in step {word['step']}, at work on records {', '.join(word['ids'])}"
            how, why = ("stopped", f": {word['error']}") if word["error"] else ("died", "")
            lines.append(f"rank {rank} of {self.size} (process {word['pid']} on {word['host']}) has {how} "
                         f"{at if word['step'] else 'before the first step'}{why}")
        return "; ".join(lines)

    def blame(self, error):
        """An error ends this rank. ConnectionError, after some seconds, if it came of another rank that is gone."""
        end = time.monotonic() + SHORT + 2 * BEAT
        while self.size > 1 and not isinstance(error, (ValueError, OSError)) and time.monotonic() < end:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would not wait for the sentence
            if why := self.verdict(SHORT):
                self.tell(error=why)
                raise ConnectionError(f"{why}; the same command goes on from the newest checkpoint") from None
            time.sleep(BEAT / 5)
        self.tell(error=" ".join(str(error).split()) or type(error).__name__)

    def stop(self):
        """The run is over: nobody is to be missed any more."""
        self.over.set()
        self.join()
