from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import spatial_impute as si
from spatial_impute.encoders import _networks
from spatial_impute.encoders._networks import build_resnet, load_resnet

# Parameters of the published networks (He et al. 2016) less those of their classification head.
N_PARAMETERS = {"resnet18": 11_689_512 - 513_000, "resnet50": 25_557_032 - 2_049_000}


@pytest.fixture
def server(tmp_path):
    """Folder that a local server publishes, and its address."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """Publish an object with torch.save as the weights of a name; return the file's record."""
    folder, address = server
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path / "cache")

    def do(name: str, content: object, *, sha256: str | None = None):
        path = folder / "weights.pth"
        torch.save(content, path)
        digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        file = replace(_networks.WEIGHTS[name], name=path.name, url=address + path.name, sha256=digest)
        monkeypatch.setitem(_networks.WEIGHTS, name, file)
        return file

    return do


def state_of(architecture: str, *, seed: int = 0, head: bool = True) -> dict[str, torch.Tensor]:
    """State dict as torchvision's files have it: with a head, without counters of batch normalisation."""
    torch.manual_seed(seed)
    state = {k: v for k, v in build_resnet(architecture).state_dict().items() if not k.endswith("tracked")}
    if head:
        state |= {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    return state


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_resnet_has_the_published_size_and_names(architecture):
    network = build_resnet(architecture)
    assert sum(p.numel() for p in network.parameters()) == N_PARAMETERS[architecture]
    names = set(network.state_dict())
    last = {"resnet18": "layer4.1.bn2.weight", "resnet50": "layer4.2.bn3.weight"}[architecture]
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.0.weight", "layer3.1.conv2.weight", last} <= names
    assert ("layer1.0.downsample.1.bias" in names) == (architecture == "resnet50")


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(64, 96), (33, 50)])
def test_resnet_pyramid(architecture, size):
    network = build_resnet(architecture).eval()
    with torch.inference_mode():
        x = torch.rand(2, 3, *size)
        maps = network.pyramid(x)
        pooled = network(x)
    expected = [(2, w, -(-size[0] // s), -(-size[1] // s)) for w, s in zip(network.widths, (4, 8, 16, 32), strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    torch.testing.assert_close(pooled, maps[-1].mean(dim=(2, 3)))


def test_resnet_cells_see_their_place():
    """Cell (i, j) of stride s covers the pixels around s * (i, j): a bright pixel moves the maximum with it."""
    torch.manual_seed(0)
    network = build_resnet("resnet18").eval()
    x = torch.zeros(1, 3, 128, 128)
    with torch.inference_mode():
        base = network.pyramid(x)
        x[..., 80, 32] = 50.0
        moved = [(a - b).abs().sum(dim=1)[0] for a, b in zip(network.pyramid(x), base, strict=True)]
    for change, stride in zip(moved[:2], (4, 8), strict=True):
        y, x = divmod(int(change.argmax()), change.shape[1])
        assert abs(y - 80 / stride) <= 1
        assert abs(x - 32 / stride) <= 1


@pytest.mark.parametrize("name", ["resnet18", "ciga-resnet18"])
def test_load_resnet_downloads_and_fills_every_tensor(publish, name, tmp_path):
    state = state_of("resnet18", seed=3)
    content = {"state_dict": {f"model.resnet.{k}": v for k, v in state.items()}} if "ciga" in name else state
    publish(name, content)
    network = load_resnet(name)
    assert not network.training
    for key, value in network.state_dict().items():
        if not key.endswith("tracked"):
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert [p.name for p in (tmp_path / "cache" / "weights").iterdir()] == ["weights.pth"]


def test_load_resnet_refuses_another_hash(publish, tmp_path):
    publish("resnet18", state_of("resnet18"), sha256="0" * 64)
    with pytest.raises(ValueError, match="hash"):
        load_resnet("resnet18")
    assert not list((tmp_path / "cache" / "weights").glob("weights.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.0.conv1.weight"), r"1 of 120 tensors missing \['layer3.0.conv1.weight'\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unknown \['extra'\]"),
        (lambda s: s.update({"bn1.bias": torch.zeros(3)}), r"1 of another shape \['bn1.bias \(3,\) instead of \(64,\)"),
    ],
)
def test_load_resnet_refuses_partial_states(publish, change, message):
    state = state_of("resnet18")
    change(state)
    publish("resnet18", state)
    with pytest.raises(ValueError, match=message):
        load_resnet("resnet18")


def test_load_resnet_refuses_what_is_no_state(publish):
    publish("resnet18", [1, 2])
    with pytest.raises(ValueError, match=r"must hold a state dict .* found list"):
        load_resnet("resnet18")


class _Payload:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_load_resnet_never_unpickles(publish, tmp_path):
    """A file that would run code on loading is refused, and its code does not run."""
    target = tmp_path / "owned"
    publish("resnet18", {"weight": _Payload(target)})
    with pytest.raises(ValueError, match="would run code from the file"):
        load_resnet("resnet18")
    assert not target.exists()
    pickle.loads(pickle.dumps(_Payload(target))).close()  # the payload does work where it is let
    assert target.exists()
