"""`tim download` against a hub of this machine, and without any."""

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from golden_files import GOLDEN
from huggingface_hub import constants
from small_pipelines import sd_vae
from typer.testing import CliRunner

from tim import config, data
from tim.app.cli import app
from tim.data import download
from tim.encoders import Autoencoder


class Hub(ThreadingHTTPServer):
    """Serves `files` by repository and name as huggingface.co does. `cuts` are of the next
    transfers: after how many bytes the line breaks, None for a file that is refused."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cuts, self.sent = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, is_head=True):
        hub, path = self.server, self.path.partition("?")[0]
        commit = hashlib.sha1(repr(sorted(hub.files)).encode()).hexdigest()
        kind, _, rest = path.removeprefix("/api/").partition("/")
        if path.startswith("/api/"):
            repo, _, wanted = rest.partition("/revision/" if "/revision/" in rest else "/tree/")
            names = [name for of, name in hub.files if of == repo]
            entries = [
                {"type": "file", "path": name, "size": len(hub.files[repo, name]), "oid": "0"}
                for name in names
            ]
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            body = json.dumps(entries if "/tree/" in rest else info).encode()
            return self.send(200, body, {"Content-Type": "application/json"}, is_head)
        repo, _, name = path.strip("/").removeprefix("datasets/").partition("/resolve/")
        name = name.partition("/")[2]
        if (repo, name) not in hub.files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, is_head)
        body = hub.files[repo, name]
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if not is_head:
            if hub.cuts and hub.cuts[0] is None:
                hub.cuts.pop()
                return self.send(404, b"", {}, is_head)
            hub.sent.append((name, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.send(206 if start else 200, body[start:], headers, is_head)

    def send(self, status, body, headers, is_head):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            is_file = "ETag" in headers
            cuts = self.server.cuts
            self.wfile.write(body[: cuts.pop(0)] if is_file and cuts else body)
            self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace("https://huggingface.co", server.url),
    )  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def tim(*arguments, code=0):
    result = CliRunner().invoke(app, ["download", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        for name, content in files.items():
            pack.writestr(name, content)
    return buffer.getvalue()


IMAGENET = "GoodEnough/NiT-Preprocessed-ImageNet1K"


def test_imagenet(hub, tmp_path):
    (part,) = download.SETS["imagenet-256"]
    assert len(part.files) == len({*part.files}) == 20
    tops = ["", "sd-vae-ft-ema-256x256/", "a/b/"]  # whatever is above the class folders
    for i, file in enumerate(part.files):
        first, last = file.partition("/")[2].removesuffix(".zip").split("_")
        hub.files[IMAGENET, file] = zipped(
            {f"{tops[i % 3]}{name}/{name}_1.safetensors": name * 9 for name in (first, last)}
        )
    said = tim("imagenet-256")
    assert "licence: ImageNet's terms" in said
    assert "datasets/imagenet1k/images/train/nXXXXXXXX" in said
    folder = tmp_path / "datasets/imagenet1k/sd-vae-ft-ema-256x256"
    made = sorted(folder.rglob("*.safetensors"))
    assert len(made) == 40 and not list(folder.rglob("*.zip"))
    assert all(path.parent.parent == folder for path in made)
    assert all(path.read_text() == path.parent.name * 9 for path in made)

    hub.sent.clear()
    assert "licence" not in tim("imagenet-256") and not hub.sent  # all there
    made[0].unlink()
    made[-1].write_text("cut")
    listed = [line.split() for line in tim("imagenet-256", "--list").splitlines()]
    gone = [name for state, name, *_ in listed if state == "missing"]
    assert gone == [part.files[0], part.files[-1]]
    tim("imagenet-256")
    assert hub.sent == [(name, 0) for name in gone]
    assert sorted(folder.rglob("*.safetensors")) == made
    assert all(path.read_text() == path.parent.name * 9 for path in made)


def test_a_download_goes_on(hub, tmp_path, monkeypatch):
    """A line that breaks goes on there; a run that fails says so, and the next begins anew."""
    content = bytes(range(256)) * 200_000
    hub.files["GoodEnough/TiM-T2I", "t2i_model.bin"] = content
    monkeypatch.setitem(download.SETS, "weights", [download.SETS["weights"][1]])
    hub.cuts = [None]
    said = tim("weights", code=1).strip().splitlines()[-1]
    assert said.startswith("error: GoodEnough/TiM-T2I: 1 of 1 files are missing: t2i_model.bin;")
    assert "404" in said and not (tmp_path / "checkpoints/t2i_model.bin").exists()
    hub.cuts = [30_000_000]
    tim("weights")
    (_, first), (_, second) = hub.sent
    assert first == 0 and 0 < second < len(content)
    assert (tmp_path / "checkpoints/t2i_model.bin").read_bytes() == content


def test_native_latents_with_their_metadata(hub, tmp_path):
    (part,) = download.SETS["imagenet-native"]
    for file in part.files:
        if file.endswith(".zip"):
            hub.files[IMAGENET, file] = zipped({f"n{file[-6:-4]}/1.safetensors": "z"})
    said = tim("imagenet-native", code=1)
    assert "2 of 12 files are missing: data_meta/*.jsonl, sampler_meta/*.json" in said
    for name in ("data_meta/a.jsonl", "sampler_meta/b.json", "sampler_meta/c.json", "other.bin"):
        hub.files[IMAGENET, name] = name.encode()
    tim("imagenet-native")
    folder = tmp_path / "datasets/imagenet1k"
    assert (folder / "sampler_meta/c.json").read_text() == "sampler_meta/c.json"
    assert (folder / "data_meta/a.jsonl").exists() and not (folder / "other.bin").exists()


def test_t2i_toy_is_what_the_preset_reads(hub, tmp_path):
    """Of the golden set, packed as published."""
    golden = GOLDEN / "training/t2i"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as pack:
        pack.add(golden / "images", "images")
    repo = "GoodEnough/TiM-Toy-T2I-Dataset"
    for name in ("bucket_sampler.json", "data_info.jsonl"):
        hub.files[repo, name] = (golden / name).read_bytes()
    hub.files |= {(repo, "bucket_categorization.json"): b"{}", (repo, "get_sampler.py"): b""}
    hub.files[repo, "dataset.tar.gz"] = buffer.getvalue()
    tim("t2i-toy")
    section = config.resolved(config.load("t2i").data)
    images = data.make(section["data_type"], section["dataset"])
    assert images[0]["image"].shape[0] == 3 and images[0]["caption"]
    hub.sent.clear()
    tim("t2i-toy")
    assert not hub.sent


def test_weights_into_the_cache(hub, tmp_path, monkeypatch):
    """From where diffusers takes them by the name that the presets give, without network too."""
    part = download.SETS["weights"][2]
    monkeypatch.setitem(download.SETS, "weights", [part])
    sd_vae().save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "vae").iterdir():
        hub.files[part.repo, path.name] = path.read_bytes()
    hub.files[part.repo, "diffusion_pytorch_model.bin"] = b"not this one"
    assert "licence: MIT" in tim("weights")
    assert sorted(name for name, _ in hub.sent) == sorted(part.files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "licence" not in tim("weights")
    listed = tim("weights", "--list")
    assert "missing" not in listed and f"{tmp_path}/cache/models--stabilityai--sd-vae-ft" in listed
    vae = config.load("xl-256").model.vae_dir
    loaded = Autoencoder.load(vae)
    assert loaded.scaling_factor == 0.5


def test_without_network_a_line_says_what_is_missing(no_hub, tmp_path):
    (part,) = download.SETS["imagenet-512"]
    folder = tmp_path / "datasets/imagenet1k"
    by_hand = folder / part.files[0]
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(zipped({"n01440764/n01440764_1.safetensors": "z"}))
    said = tim("imagenet-512", code=1).strip().splitlines()[-1]
    assert said.startswith(f"error: {IMAGENET}: 19 of 20 files are missing: {part.files[1]}, ")
    assert " and 16 more; without network put them into datasets/imagenet1k, from https://" in said
    assert (by_hand.parent / "n01440764/n01440764_1.safetensors").exists()  # and it was taken
    for name in part.files[1:]:
        (folder / name).write_bytes(zipped({f"n{name[-6:-4]}/1.safetensors": "z"}))
    tim("imagenet-512")
    assert "missing" not in tim("imagenet-512", "--list")
    said = tim("weights", code=1).strip().splitlines()[-1]
    assert "2 of 2 files are missing: c2i_model_256.safetensors, c2i_model_512.saf" in said
    assert "put them into checkpoints, from https://huggingface.co/GoodEnough/TiM-C2I" in said


def test_a_list_for_a_machine_without_network(no_hub, tmp_path):
    listed = tim("weights", "--list", "--root", "elsewhere")
    assert "https://huggingface.co/nvidia/RADIO → elsewhere/checkpoints/radio" in listed
    assert "  missing radio-v2.5-b_half.pth.tar" in listed
    assert f"gemma-3-1b-it → {tmp_path}/cache/models--google--gemma-3-1b-it, laid out as" in listed
    assert "not for commercial use" in listed and "Gemma terms of use" in listed
    said = tim("imagenet-265", code=1)
    assert "got 'imagenet-265' (did you mean imagenet-256?)" in said


ARCHIVES = {
    "cut": (zipped({"a/b.safetensors": "z" * 99})[:80], "may be deleted and fetched again: BadZip"),
    "out of its folder": (zipped({"../b.safetensors": "z"}), r"\.\./b.safetensors leads out of"),
    "empty": (zipped({}), "it is empty"),
}


@pytest.mark.parametrize("content, words", ARCHIVES.values(), ids=ARCHIVES)
def test_wrong_archives(no_hub, tmp_path, content, words):
    (part,) = download.SETS["imagenet-256"]
    path = tmp_path / "datasets/imagenet1k" / part.files[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    said = tim("imagenet-256", code=1).strip().splitlines()[-1]
    assert re.search(words, said) and part.files[0] in said and path.exists()
