import json
from pathlib import Path

import torch

from opensora.diffusion import tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())


def test_pack_equals_golden():
    shape = GOLDEN["pack"]["in_shape"]
    latents = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    assert tokens.pack(latents, 2).tolist() == GOLDEN["pack"]["out"]
    assert tokens.pack(latents, 1)[0, :3].tolist() == GOLDEN["pack"]["patch1"]


def test_unpack_undoes_pack():
    latents = torch.randn(2, 5, 3, 4, 6)
    for patch_size in (1, 2):
        assert torch.equal(tokens.unpack(tokens.pack(latents, patch_size), (3, 4, 6), patch_size), latents)


def test_position_ids_equal_golden():
    golden = GOLDEN["prepare_ids"]
    ids = tokens.position_ids(2, (2, 4, 6), 2)
    assert list(ids.shape) == golden["img_ids"]
    assert ids[0].tolist() == ids[1].tolist() == golden["img_ids_b0"]
    text_ids = tokens.text_position_ids(2, 3)
    assert list(text_ids.shape) == golden["txt_ids"] and not text_ids.any()


def test_ids_name_the_place_of_the_packed_token():
    places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(5), indexing="ij"))
    packed = tokens.pack(places[None].float(), 1)  # [1, 60, 3]: a latent that holds its own place
    assert torch.equal(packed, tokens.position_ids(1, (3, 4, 5), 1))
