"""`tim app`: the page's functions, a server, and what a visitor sees in a browser."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import browser
import gradio as gr
import httpx
import numpy as np
import pytest
import small_pipelines
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from small_pipelines import CLASS, network
from typer.testing import CliRunner

from tim.app import assets, drawing, record, web
from tim.app.cli import app
from tim.app.page import LAUNCH, PICTURES, SIDE_BY_SIDE, _Page, page
from tim.app.settings import settings_of
from tim.pipelines import TiMClassPipeline, TiMTextPipeline

ASKED = dict(
    what="a red cat", mode=PICTURES, steps=2, compared=[2, 1], count=1, guidance=1.5, low=0.0,
    high=1.0, height=32, width=32, seed=5, is_random=False,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The shipped network, whose text encoder has random weights here."""
    text = small_pipelines.package(tmp_path_factory.mktemp("site"))
    return assets.open_pipeline("emoji", text_encoder=text)


@pytest.fixture(scope="module")
def address(emoji):
    blocks = page(emoji, "emoji", examples=["a red cat", "a dog"])
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def asked(client, **changes):
    """The pictures, their captions, and the settings that are told."""
    gallery, again, seed = client.predict(
        *(ASKED | changes).values(), api_name="/generate"
    )  # fmt: skip
    shown = gallery["value"]
    return [one["image"] for one in shown], [one["caption"] for one in shown], again["value"], seed


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_page_is_served_with_all_that_it_needs(address):
    answer = httpx.get(address)
    assert answer.status_code == 200 and "Transition Models" in answer.text
    assert "2.2 M parameters" in answer.text and ".thumbnail-item" in answer.text
    assert "fonts.googleapis" not in answer.text
    assert httpx.get(f"{address}config").json()["analytics_enabled"] is False


def test_a_seed_draws_its_picture_again(client, emoji):
    (path,), (caption,), again, seed = asked(client)
    assert pixels(path).shape == (32, 32, 3) and caption.startswith("2 steps\n") and seed == 5
    assert again == "tim sample emoji 'a red cat' --steps 2 --seed 5"
    assert (pixels(asked(client)[0][0]) == pixels(path)).all()
    paths, captions, again, _ = asked(client, count=3, seed=4)
    assert len(paths) == len(captions) == 3 and again.endswith("--seed 4 --count 3")
    assert (pixels(paths[1]) == pixels(path)).all()
    assert not (pixels(paths[0]) == pixels(path)).all()
    first, second = (asked(client, is_random=True)[3] for _ in range(2))
    assert first != second


def test_a_picture_is_that_of_its_settings_which_it_holds(client, emoji):
    changes = dict(guidance=2.5, low=0.1, high=0.9, height=36, width=28, what="a dog", seed=7)
    (path,), _, again, _ = asked(client, **changes)
    held = record.read(Path(path))
    assert {"network", "text_encoder"} <= held["weights"].keys()
    (drawn,) = drawing.draw(emoji, settings_of(held["settings"]))
    assert (np.asarray(drawn.picture) == pixels(path)).all() and drawn.picture.size == (28, 36)
    assert again == (
        "tim sample emoji 'a dog' --height 36 --width 28 --steps 2 --guidance 2.5 "
        "--guidance-interval 0.1 0.9 --seed 7"
    )


def test_steps_side_by_side_from_one_noise(client):
    paths, captions, again, _ = asked(client, mode=SIDE_BY_SIDE, count=4)
    assert [caption.partition("\n")[0] for caption in captions] == ["1 step", "2 steps"]
    assert all(float(caption.split()[-2]) >= 0 for caption in captions)
    for path, steps, line in zip(paths, (1, 2), again.splitlines(), strict=True):
        assert line == f"tim sample emoji 'a red cat' --steps {steps} --seed 5"
        assert (pixels(asked(client, steps=steps)[0][0]) == pixels(path)).all()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(height=33), "height and width must be multiples of 4, got 33×32"),
        (dict(width=4000, height=4000), "at most 512 × 512 px, got 4000 × 4000"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(seed=2.5), "seed must be a whole number, got 2.5"),
        (dict(low=0.9, high=0.1), "0 ≤ low ≤ high"),
        (dict(mode=SIDE_BY_SIDE, compared=[]), "choose at least one number of steps"),
        (dict(steps=129), "129"),
    ],
)
def test_what_is_wrong_is_said(client, changes, said):
    with pytest.raises(AppError, match=said.replace("(", r"\(")):
        asked(client, **changes)


def test_two_visitors_at_once_get_their_own(address, client):
    other = Client(address, verbose=False)
    jobs = [
        each.submit(*(ASKED | dict(seed=seed, steps=8)).values(), api_name="/generate")
        for each, seed in ((client, 1), (other, 2), (client, 3))
    ]
    for job, seed in zip(jobs, (1, 2, 3), strict=True):
        (path,) = (one["image"] for one in job.result(timeout=60)[0]["value"])
        assert record.read(Path(path))["settings"]["seed"] == seed
        assert (pixels(path) == pixels(asked(client, seed=seed, steps=8)[0][0])).all()


def directly(a_page, session="me", progress=lambda *told, **more: None, **changes):
    """What a visitor gets last, with their pictures as PIL's."""
    visitor = SimpleNamespace(session_hash=session)
    *_, last = a_page._draw(*(ASKED | changes).values(), visitor, progress)
    return last


@pytest.fixture
def a_page(emoji):
    return _Page(emoji, "emoji", None, (), 1.5)


def test_stop_ends_the_visitors_own_pictures_alone(a_page, monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Gallery", lambda pictures, **more: shown.append(pictures))
    me, other = (SimpleNamespace(session_hash=name) for name in ("me", "other"))
    told = []

    def stopping(done, desc):
        told.append((*done, desc))
        if done[0] == 3:
            a_page._stop(me)

    a_page._begin(me)
    a_page._stop(other)  # who draws nothing
    directly(a_page, progress=stopping, steps=8, count=2)
    ((picture, caption),) = shown[-1]
    assert caption == "stopped at 3 of 8 steps" and record.KEY not in picture.info
    assert told == [(1, 16, "8 steps"), (2, 16, "8 steps"), (3, 16, "8 steps")]
    directly(a_page, "other")
    assert shown[-1][0][1].startswith("2 steps") and record.KEY in shown[-1][0][0].info
    directly(a_page)  # stopped while it waited
    assert shown[-1] == []
    a_page._end(me)
    directly(a_page)
    assert shown[-1][0][1].startswith("2 steps")


def test_what_of_a_prompt_is_not_read_is_said(a_page, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    directly(a_page, what="a dog " * 12 + "red cat")
    assert not warnings[1:] and "red cat" in warnings[0]
    directly(a_page)
    assert len(warnings) == 1


def pixel_network(classes, **options):
    params = CLASS | dict(num_classes=classes, in_channels=3, **options)
    return small_pipelines.quiet(TiMClassPipeline(network(params)))


@pytest.mark.parametrize(
    "classes, kind, what", [(10, gr.Radio, 3), (1000, gr.Dropdown, 207), (30, gr.Number, 29)]
)
def test_classes_by_what_the_network_knows(classes, kind, what, monkeypatch):
    a_page = _Page(pixel_network(classes), "runs/mine", None, None, 1.5)
    assert type(a_page.what) is kind
    shown = []
    monkeypatch.setattr(gr, "Gallery", lambda pictures, **more: shown.append(pictures))
    again = directly(a_page, what=what, height=4, width=4)[1].value
    assert again == f"tim sample runs/mine {what} --steps 2 --seed 5"
    assert shown[-1][0][0].size == (4, 4)
    if kind is gr.Dropdown:
        assert ("207 · golden retriever", 207) in a_page.what.choices


def test_a_network_that_cannot_be_guided_is_not():
    a_page = _Page(pixel_network(10, class_dropout_prob=0.0), "mine", None, None, 1.5)
    assert not a_page.guidance.visible and a_page.guidance.value == 1


def test_a_pipeline_without_a_text_encoder_is_refused(emoji):
    with pytest.raises(ValueError, match="with a text encoder"):
        page(TiMTextPipeline(emoji.transformer), "emoji")


def tim_app(*arguments):
    return CliRunner().invoke(app, ["app", *map(str, arguments)])


def test_the_command_serves_what_it_is_told(monkeypatch, tmp_path):
    small_pipelines.package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.append(options))
    for arguments in ([], ["mnist", "--port", 8123, "--host", "0.0.0.0", "--share"]):
        result = tim_app(*arguments, "--device", "cpu")
        assert result.exit_code == 0, result.output
    names = "server_name", "server_port", "share"
    assert [tuple(options[name] for name in names) for options in launched] == [
        (None, None, False), ("0.0.0.0", 8123, True),
    ]  # fmt: skip
    assert all(LAUNCH.items() <= options.items() for options in launched)


def test_the_command_refuses_in_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = {
            ("nowhere",): "there is no checkpoint nowhere",
            ("mnist", "--dtype", "int8"): "dtype must be one of",
            ("mnist", "--port", port): str(port),
        }
        for arguments, line in said.items():
            result = tim_app(*arguments, "--device", "cpu")
            assert result.exit_code == 1 and "Traceback" not in result.output
            assert line in result.output.strip().splitlines()[-1], result.output
    monkeypatch.setattr("tim.requirements.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "tim.app.page")
    result = tim_app("mnist")
    assert result.exit_code == 1
    assert result.output.strip() == (
        'error: tim needs gradio: pip install "tim-kernels[app]"'
    )  # fmt: skip


def test_a_space_of_the_page_s_three_lines(monkeypatch):
    """docs/app.md's `app.py`."""
    text = (Path(__file__).parents[2] / "docs/app.md").read_text()
    (lines,) = [block.partition("```")[0] for block in text.split("```py\n")[1:]]
    served = []
    monkeypatch.setattr(web, "serve", lambda *given, **options: served.append(given))
    exec(lines, {})
    assert served == [("mnist",)]


@pytest.mark.skipif(
    None in (browser.CHROMIUM, browser.DRIVER),
    reason="no Chromium here: apt-get install chromium chromium-driver",
)
def test_what_a_visitor_sees(address, tmp_path):
    with browser.opened(tmp_path / "profile", 1280, 900) as visitor:
        visitor.driver.get(address)
        visitor.fill("Prompt", "a dog")
        visitor.click("1")  # step
        visitor.click("Generate")
        found = visitor.until(lambda: len(visitor.pictures()) == 4 and visitor.pictures())
        assert all(width == 32 and caption.startswith("1 step\n") for width, caption in found)
        assert visitor.value("The same again").startswith("tim sample emoji 'a dog' --steps 1 ")
        shown = lambda: visitor.driver.find_element("css selector", ".pictures img")  # noqa: E731
        assert visitor.until(lambda: shown().size["width"]) > 100
        style = visitor.until(lambda: shown().value_of_css_property("image-rendering"))
        assert style == "pixelated"

        visitor.click(SIDE_BY_SIDE)
        visitor.click("Generate")
        found = visitor.until(lambda: len(visitor.pictures()) == 5 and visitor.pictures())
        steps = [caption.partition("\n")[0] for _, caption in found]
        assert steps == ["1 step", "2 steps", "4 steps", "8 steps", "32 steps"]

        visitor.click(PICTURES)
        visitor.until(lambda: "Number of pictures" in visitor.text())
        visitor.click("128")
        visitor.click("Generate")
        visitor.click("Stop")
        visitor.until(lambda: "of 128 steps" in visitor.text() and "Generate" in visitor.text())
        assert "stopped at" in visitor.pictures()[-1][1]

        visitor.click("Size and guidance interval")
        visitor.fill("Height", "33")
        visitor.click("Generate")
        visitor.until(lambda: "must be multiples of 4, got 33×32" in visitor.text())
        visitor.until(lambda: "Generate" in visitor.text())
        assert visitor.driver.save_screenshot(str(tmp_path / "page.png"))
        assert Image.open(tmp_path / "page.png").size == (1280, 900)
        assert not visitor.strangers()
        log = visitor.driver.get_log("browser")
        assert not [entry for entry in log if entry["level"] == "SEVERE"]
