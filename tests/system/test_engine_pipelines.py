"""What pipelines have of the engine."""

import copy

import pytest
import torch
from small_engines import Counter
from small_pipelines import CLASS, PROMPTS, class_pipeline, drawn, network, seeded, text_pipeline

from tim.sampling import graphs


@pytest.fixture
def captures(monkeypatch):
    captured = []

    def capture(function, device):
        out = function()
        captured.append(function)
        return lambda: out.copy_(function()), out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "obstacle", lambda device: None)
    return captured


def test_the_text_is_read_once_a_call():
    pipeline = text_pipeline()
    options = dict(num_inference_steps=5, output_type="latent", generator=seeded())
    with Counter(pipeline.transformer) as counter:
        pipeline(PROMPTS, guidance_interval=(0.0, 1.1), **options)
    of_text = {c for n, c in counter.gemms.items() if ".kv." in n or "y_embedder" in n}
    assert of_text == {1}
    assert pipeline.engine.explain().startswith("text read once")


@pytest.mark.parametrize("make_pipeline", [class_pipeline, text_pipeline])
def test_graphs_are_asked_for(make_pipeline, captures):
    pipeline = make_pipeline()
    expected = drawn(pipeline)
    drawn(pipeline)
    assert not captures
    pipeline.enable_cuda_graphs(batch_sizes=(2, 4))
    pipeline.engine._together = True  # as on a GPU
    for _ in range(3):
        torch.testing.assert_close(drawn(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert len(captures) == 2 and "no replay" not in pipeline.engine.explain()
    pipeline.disable_cuda_graphs()
    assert torch.equal(drawn(pipeline), expected)
    assert len(captures) == 2


def test_another_network_and_a_copy_have_engines_of_their_own():
    pipeline = class_pipeline()
    drawn(pipeline)
    twin = copy.deepcopy(pipeline)
    assert twin.engine.model is twin.transformer is not pipeline.transformer
    other = network(CLASS)
    with torch.no_grad():
        other.final_layer.linear.weight.mul_(2)
    before = drawn(pipeline)
    pipeline.transformer = other
    assert pipeline.engine.model is other
    assert not torch.equal(drawn(pipeline), before) and torch.equal(drawn(twin), before)
