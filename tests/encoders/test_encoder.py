from __future__ import annotations

import os
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import spatial_impute as si
from spatial_impute._io.workers import requested_threads, suitable_threads, torch_threads
from spatial_impute.encoders import _networks
from spatial_impute.encoders._encoder import IMAGENET_MEAN, IMAGENET_STD, ModuleEncoder, TextureEncoder, resolve_encoder
from spatial_impute.models import Encoder


class TinyViT(nn.Module):
    """What a timm model without a head gives."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, x):
        return self.project(x).mean(dim=(2, 3))


class GatedRepoError(Exception):
    """Has the name of the hub's own error."""


@pytest.fixture
def fake_timm(monkeypatch):
    calls = []
    timm = types.ModuleType("timm")

    def create_model(name, **options):
        calls.append((name, options))
        if "gated" in name:
            msg = "no weights"
            raise RuntimeError(msg) from GatedRepoError("403 Client Error")
        if "broken" in name:
            msg = "wrong option"
            raise RuntimeError(msg)
        return TinyViT()

    timm.create_model = create_model
    config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


@pytest.fixture
def fake_transformers(monkeypatch):
    calls = []
    transformers = types.ModuleType("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Conv2d(3, 5, 4, stride=4)

        def forward(self, pixel_values):
            tokens = self.project(pixel_values).flatten(2).transpose(1, 2)
            return types.SimpleNamespace(last_hidden_state=torch.cat([tokens.sum(dim=1, keepdim=True), tokens], dim=1))

    class AutoModel:
        @staticmethod
        def from_pretrained(name, **options):
            calls.append((name, options))
            if "gated" in name:
                msg = f"You are trying to access a gated repo {name}"
                raise OSError(msg)
            return Model()

    class AutoImageProcessor:
        @staticmethod
        def from_pretrained(name):
            return types.SimpleNamespace(
                image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 4.0], crop_size={"height": 16, "width": 16}, size={}
            )

    transformers.AutoModel, transformers.AutoImageProcessor = AutoModel, AutoImageProcessor
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return calls


def patches(n: int, edge: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (n, edge, edge, 3)).astype(np.float32)


def test_timm_encoder_takes_size_and_normalisation_from_the_model(fake_timm):
    torch.manual_seed(0)
    encoder = resolve_encoder("timm:hf-hub:owner/model", device="cpu", params={"dynamic_img_size": True})
    assert fake_timm == [("hf-hub:owner/model", {"pretrained": True, "num_classes": 0, "dynamic_img_size": True})]
    assert (encoder.name, encoder.patch_px, encoder.mpp) == ("timm:hf-hub:owner/model", 32, 0.5)
    given = patches(2, 32)
    x = (torch.from_numpy(given) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.2, 0.1])
    with torch.inference_mode():
        expected = encoder.module(x.permute(0, 3, 1, 2))
    np.testing.assert_allclose(encoder(given), expected.numpy(), atol=1e-5)
    assert resolve_encoder("timm:m", device="cpu", patch_px=48, mpp=0.25).patch_px == 48


def test_transformers_encoder_takes_the_class_token_and_no_pickles(fake_transformers):
    encoder = resolve_encoder("transformers:owner/model", device="cpu")
    assert fake_transformers[0][1]["use_safetensors"] is True
    assert encoder.patch_px == 16
    given = patches(3, 16)
    x = (torch.from_numpy(given) / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2.0, 4.0])
    with torch.inference_mode():
        expected = encoder.module.model(x.permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder(given), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["timm:hf-hub:lab/gated", "transformers:lab/gated"])
def test_gated_models_say_how_to_get_access(fake_timm, fake_transformers, name):
    with pytest.raises(PermissionError, match=r"gated.*https://huggingface\.co/lab/gated, then run `hf auth login`"):
        resolve_encoder(name, device="cpu")


def test_other_errors_of_the_library_come_through(fake_timm):
    with pytest.raises(RuntimeError, match="wrong option"):
        resolve_encoder("timm:broken", device="cpu")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_missing_libraries_say_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}.*spatial-impute\[encoders\]"):
        resolve_encoder(f"{library}:x", device="cpu")


def test_resnets_come_by_name(monkeypatch, tmp_path):
    torch.manual_seed(0)
    network = _networks.build_resnet("resnet18")
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(_networks, "fetch_weights", lambda file: path)
    encoder = resolve_encoder("ciga-resnet18", device="cpu", patch_px=64)
    assert isinstance(encoder, Encoder)
    given = patches(2, 64)
    scaled = torch.from_numpy((given / 255 - IMAGENET_MEAN) / IMAGENET_STD).float().movedim(-1, 1)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder(given), network.eval()(scaled), atol=1e-4)
    assert replace(_networks.WEIGHTS["resnet18"]).sha256.startswith("f37072fd")


def test_tellez_slides_as_it_encodes_patches(weights_at_hand):
    """Every cell of a window equals the patch cut out and encoded by itself."""
    if not weights_at_hand:
        pytest.skip("needs the weights")
    encoder = resolve_encoder("tellez-multitask", device="cpu")
    assert isinstance(encoder, Encoder)
    window = patches(2, 64 + 3 * 16)
    slid = encoder.slide(window)
    assert slid.shape == (2, 4, 4, 128)
    for i, j in [(0, 0), (1, 3), (3, 2)]:
        alone = encoder(window[:, 16 * i : 16 * i + 64, 16 * j : 16 * j + 64])
        np.testing.assert_allclose(slid[:, i, j], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("n_threads", [1, 2, 64])
def test_texture_has_the_same_bits_on_any_number_of_threads(n_threads, monkeypatch):
    patches = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    encoder, used = TextureEncoder(), set()
    encode = encoder._encode
    whole = encode(patches)
    monkeypatch.setattr(encoder, "_encode", lambda part: (used.add(threading.get_ident()), encode(part))[1])
    monkeypatch.setenv("OMP_NUM_THREADS", str(n_threads))
    np.testing.assert_array_equal(encoder(patches), whole)
    assert len(used) <= n_threads


def test_texture_tells_stain_from_texture():
    encoder = TextureEncoder()
    rng = np.random.default_rng(0)
    flat = np.broadcast_to(np.float32([200, 120, 180]), (1, 32, 32, 3))
    rough = flat + rng.normal(0, 20, (1, 32, 32, 1)).astype(np.float32)
    smooth, noisy = encoder(flat)[0], encoder(rough)[0]
    assert smooth.shape == (25,)
    np.testing.assert_allclose(smooth[:3], noisy[:3], atol=0.05)  # means
    assert (smooth[3:6] < 1e-3).all()
    assert (noisy[3:6] > 10 * smooth[3:6]).all()
    np.testing.assert_allclose(encoder(rough[:, ::-1])[0], noisy, rtol=1e-3, atol=1e-3)  # mirrored tissue is the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_px": 64}, r"Encoder 'texture' takes `patch_px=32`, found 64"),
        ({"mpp": 0.5}, r"Encoder 'texture' takes `mpp=2.0`, found 0.5"),
        ({"mpp": -1}, "`mpp` must be a positive number"),
        ({"patch_px": 2.5}, "`patch_px` must be a whole number"),
        ({"precision": "float16"}, "`precision` must be one of"),
    ],
)
def test_resolve_encoder_refuses_impossible_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_encoder("texture", **options)


def test_resolve_encoder_takes_objects_that_follow_the_protocol():
    class Mine:
        name, mpp, patch_px = "mine", 1.0, 16

        def __call__(self, given):
            return given.mean(axis=(1, 2))

    mine = Mine()
    assert resolve_encoder(mine) is mine


def test_module_encoder_in_mixed_precision_is_close():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    full, mixed = (
        ModuleEncoder(module, patch_px=16, mpp=0.5, device="cpu", precision=p) for p in ("float32", "bfloat16")
    )
    assert full.identity != mixed.identity
    a, b = full(patches(4, 16)), mixed(patches(4, 16))
    assert b.dtype == np.float32
    assert not np.array_equal(a, b)
    assert np.abs(a - b).mean() < 0.02 * a.std()


@pytest.mark.parametrize("wanted", ["1", "2", "", "many"])
def test_requested_threads_follow_the_environment(wanted, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", wanted)
    before = torch.get_num_threads()
    with requested_threads():
        assert torch.get_num_threads() == (int(wanted) if wanted.isdigit() else before)
    assert torch.get_num_threads() == before


def test_networks_of_any_size_obey_the_environment(monkeypatch):
    """Also after numba, which scanpy starts, has set the number of threads to that of the cores."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    with torch_threads(2):
        for n_rows in (10, 10**6):
            with suitable_threads(n_rows, 64):
                assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


@pytest.mark.gpu
def test_encoders_give_the_same_on_a_gpu(weights_at_hand):
    if not torch.cuda.is_available() or not weights_at_hand:
        pytest.skip("needs a CUDA device and the weights")
    given = patches(8, 64)
    one, other = (resolve_encoder("tellez-multitask", device=device)(given) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    assert si.settings.device
