"""formats/hub.py: what is downloaded, from a server that speaks like the hub; the cache; all ways of not getting it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from test_weights import same_tensors

from formats import hub
from weights import load

REPOSITORY, SHA = "someone/tiny-llama", "0123456789" * 4


class Server(ThreadingHTTPServer):
    """One repository, as the hub would serve it.

    files: {name: bytes}; asked: [(method, name)] of files; broken: names that cannot be fetched; status: 200, or what
    every question gets for an answer, with `headers`."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.status, self.broken = files, [], 200, set()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, files = self.path.split("?")[0], self.server.files
        if self.server.status != 200:
            self.answer(self.server.status, b"{}", **self.server.headers)
        elif path in {f"/api/models/{REPOSITORY}{revision}" for revision in ("", "/revision/main", "/revision/v1")}:
            self.answer(200, json.dumps({"id": REPOSITORY, "sha": SHA, "siblings": [
                {"rfilename": name} for name in files]}).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            rows = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            self.answer(200, json.dumps(rows).encode())
        elif path.startswith(f"/{REPOSITORY}/resolve/") and (name := path.split("/")[-1]) in files:
            self.server.asked.append((self.command, name))
            status = 416 if name in self.server.broken else 200
            self.answer(status, files[name], X_Repo_Commit=SHA, ETag=f'"{abs(hash(name)):x}"')
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tiny_llama, tmp_path, monkeypatch):
    """A hub with a tiny LLaMA in every format, an empty cache, no waiting between tries."""
    files = {file.name: file.read_bytes() for file in tiny_llama().iterdir()}
    others = "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "model.fp16.safetensors", "a/b.json"
    server = Server(files | dict.fromkeys(others, b"x"))
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
                        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_only_what_is_read_is_downloaded_and_only_once(server, tiny_llama):
    expected = load(tiny_llama()).model
    assert same_tensors(load(REPOSITORY).model, expected)
    got = [name for method, name in server.asked if method == "GET"]
    assert set(got) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                        "tokenizer_config.json"} and len(got) == 5
    server.asked.clear()
    assert same_tensors(load(REPOSITORY).model, expected)
    assert not [name for method, name in server.asked if method == "GET"]


def test_another_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE_DIR", str(tmp_path / "mine"))
    assert hub.find_folder(REPOSITORY).is_relative_to(tmp_path / "mine") and hub.here(REPOSITORY)


def test_config_and_tokenizer_alone(server):
    folder = hub.find_folder(f"{REPOSITORY}@v1", weights=False)
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json", "tokenizer.json",
                                                        "tokenizer_config.json"}


@pytest.mark.parametrize("trouble", ["offline", "unreachable", "down"])
def test_the_cache_does_without_the_hub(server, tiny_llama, trouble, monkeypatch, capsys):
    hub.find_folder(REPOSITORY)
    assert hub.here(REPOSITORY) and hub.here("someone/else") is None and hub.here("nowhere") is None
    break_hub(server, trouble, monkeypatch)
    assert same_tensors(load(REPOSITORY).model, load(tiny_llama()).model)
    assert "the copy in the cache is taken" in capsys.readouterr().err


def break_hub(server, trouble, monkeypatch):
    if trouble == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif trouble == "unreachable":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        server.status, server.headers = {
            "down": (500, {}), "gated": (403, {"X_Error_Code": "GatedRepo"}),
            "private": (401, {"X_Error_Code": "RepoNotFound"}),
            "no revision": (404, {"X_Error_Code": "RevisionNotFound"}),
        }[trouble]


@pytest.mark.parametrize("trouble, sentence", [
    ("offline", "HF_HUB_OFFLINE is set"), ("unreachable", "the hub cannot be reached"), ("down", "500"),
    ("gated", "accept its terms"), ("private", "no such repository, or it is private"),
    ("no revision", "it has no such revision")])
def test_every_way_of_not_getting_it_is_one_sentence(server, trouble, sentence, monkeypatch):
    break_hub(server, trouble, monkeypatch)
    with pytest.raises(ValueError, match=f"^{REPOSITORY} is no folder here, and no download .*{sentence}") as error:
        load(REPOSITORY)
    assert "\n" not in str(error.value)


def test_a_repository_without_weights_and_a_download_that_breaks_off(server):
    body = server.files.pop("model.safetensors")
    server.files.pop("pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no weights that are read here; expected model.safetensors.index.json"):
        load(REPOSITORY)
    server.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    server.files["model-1.safetensors"] = body
    server.broken = {"model-1.safetensors"}
    with pytest.raises(ValueError, match="the download broke off .*; the same command goes on from there"):
        load(REPOSITORY)


@pytest.mark.parametrize("names, chosen", [
    (["model.safetensors.index.json", "m1.safetensors", "m2.safetensors", "old.safetensors", "pytorch_model.bin"],
     ["model.safetensors.index.json", "m1.safetensors", "m2.safetensors"]),
    (["pytorch_model.bin", "tf_model.h5", "mm_projector.bin", "tokenizer.model"],
     ["tokenizer.model", "pytorch_model.bin", "mm_projector.bin"]),
    (["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin",
      "trainer_state.json"], ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"])])
def test_one_format_is_chosen(names, chosen):
    index = {"weight_map": {"a": "m1.safetensors", "b": "m2.safetensors"}}
    assert hub.choose(names, True, lambda name: index) == chosen
