"""What waits on the host, what is measured of it, and what is encoded ahead."""

import mmap
import time

import pytest
import torch
from torch import nn

from opensora.inference import offload
from opensora.inference.offload import Offloaded, called_at_work, residence
from opensora.inference.phases import PhaseMeter
from opensora.inference.pipeline import Request
from opensora.inference.text_phase import EmbeddedTexts
from opensora.parallel.memory import PeakMemory

CPU = torch.device("cpu")


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval().requires_grad_(False)


def addresses(module):
    return [tensor.data_ptr() for tensor in module.state_dict().values()]


def test_weights_come_when_they_are_needed_and_go_again():
    module, x = network(), torch.ones(2, 4)
    home, expected = addresses(module), module(x)
    at_work = Offloaded(module, CPU)  # copies of the weights, as on any device
    for _ in range(2):
        with at_work():
            assert not set(addresses(module)) & set(home)
            assert torch.equal(module(x), expected)
        assert addresses(module) == home
    assert torch.equal(module(x), expected)


def test_it_moves_within_inference_mode_and_after_an_error():
    module = network()
    home, at_work = addresses(module), Offloaded(module, CPU)
    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"), at_work():
                assert addresses(module) != home
                raise RuntimeError("broken")
            assert addresses(module) == home
    module.requires_grad_(True)
    module(torch.ones(2, 4)).sum().backward()  # they are no tensors of inference mode


def test_where_the_device_is_the_host_nothing_moves():
    module = network()
    home = addresses(module)
    with residence(module, CPU, offload=True)(), residence(module, CPU, offload=False)():
        assert addresses(module) == home
    assert isinstance(residence(module, torch.device("cuda"), offload=True), Offloaded)
    assert not isinstance(residence(module, torch.device("cuda"), offload=False), Offloaded)


def test_a_module_can_be_called_at_work(monkeypatch):
    module, seen = network(), []
    home, expected = addresses(module), module(torch.ones(2, 4))
    module.register_forward_hook(lambda *_: seen.append(addresses(module)))
    assert torch.equal(called_at_work(module, CPU, offload=True)(torch.ones(2, 4)), expected)
    monkeypatch.setattr(offload, "residence", lambda module, device, _: Offloaded(module, device))
    assert torch.equal(called_at_work(module, CPU, offload=True)(torch.ones(2, 4)), expected)
    assert seen[0] == home == addresses(module) and not set(seen[1]) & set(home)


def test_texts_are_encoded_once_in_batches(hash_text):
    encoder = hash_text(5, 12)
    texts = [f"text {i % 5}" for i in range(20)]
    embedded = EmbeddedTexts(encoder, texts, batch_size=2)
    assert encoder.encoded == texts[:5]
    assert torch.equal(embedded(["text 3", "text 0"]), hash_text(5, 12)(["text 3", "text 0"]))
    assert len(encoder.encoded) == 5
    with pytest.raises(KeyError):
        embedded(["another"])


def test_samples_of_texts_encoded_ahead_are_the_same(toy_pipeline, hash_text):
    asked = [Request("a", 1, negative="bad"), Request("b", 2)]
    ahead = tuple(EmbeddedTexts(hash_text(*shape), ["a", "b", "bad", ""]) for shape in ((5, 12), (8,)))
    assert torch.equal(toy_pipeline(texts=ahead).sample_latents(asked), toy_pipeline().sample_latents(asked))


def use_memory(size: int) -> None:
    """Take pages from the system and give them back: an allocator would hand out what earlier tests left it."""
    with mmap.mmap(-1, size) as pages:
        for begin in range(0, size, mmap.PAGESIZE):
            pages[begin] = 1


def test_phases_add_up_and_keep_their_own_peaks():
    meter, begin = PhaseMeter(CPU), time.perf_counter()
    with meter("large"):
        use_memory(64 << 20)
        time.sleep(0.05)
    for _ in range(2):
        with meter("small"):
            time.sleep(0.02)
    report, elapsed = meter.report(), time.perf_counter() - begin
    assert list(report) == ["large", "small"]
    assert report["large"]["times"] == 1 and report["small"]["times"] == 2
    large, small = (report[phase]["seconds"] for phase in ("large", "small"))
    assert large >= 0.05 and small >= 0.04 and large + small <= elapsed + 0.001  # rounded to milliseconds
    assert report["large"]["peak_host_gib"] > report["small"]["peak_host_gib"] + 0.05
    assert "peak_device_gib" not in report["large"]


def test_the_peak_begins_anew_after_a_reset():
    memory = PeakMemory(CPU)
    memory.reset()
    use_memory(64 << 20)
    high = memory.read()["host"]
    memory.reset()
    assert memory.read()["host"] < high - (50 << 20)


@pytest.mark.gpu
def test_offloaded_weights_leave_the_device():
    device = torch.device("cuda")
    module = nn.Linear(4096, 4096).requires_grad_(False)
    at_work = Offloaded(module, device)
    x = torch.randn(2, 4096)
    before = torch.cuda.memory_allocated()
    with torch.inference_mode(), at_work():
        assert torch.cuda.memory_allocated() - before >= module.weight.nbytes
        found = module(x.to(device)).cpu()
    assert torch.cuda.memory_allocated() - before < module.weight.nbytes // 2
    assert torch.allclose(found, module(x), atol=1e-3)
