from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import spatial_impute as si
from spatial_impute._stack.elements import registration_state
from spatial_impute._stack.record import load_record

CHROMIUM = shutil.which("chromium")
OFFLINE = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# What a person does, and what would be saved then.
CLICKS = """<script>
document.querySelector("input[value=approved][name=s0]").click();
document.querySelector("input[value=rejected][name=s2]").click();
const range=document.querySelector("input[type=range]");range.value=20;range.dispatchEvent(new Event("input"));
document.title=JSON.stringify([decisions(),document.getElementById("count").textContent,
document.querySelector(".swipe img+img").style.clipPath]);
</script>"""


@pytest.fixture(scope="module")
def page(plot_stack, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "check.html"
    si.pl.registration_page(plot_stack, path)
    return path


def test_page_holds_all_it_needs(page, plot_stack):
    text = page.read_text()
    assert re.findall(r"<h2>(\S+)", text) == ["s0", "s2"]
    assert text.count("data:image/jpeg;base64,") == 6
    assert not re.search(r'https?:|(src|href)="(?!data:)', text)
    rows = load_record(plot_stack).registration["sections"]
    assert f"Expected error: {rows['s0']['error_um']:.0f} µm" in text


def test_verdict_and_reasons_are_on_the_page(plot_stack, tmp_path, monkeypatch):
    row = load_record(plot_stack).registration["sections"]["s2"]
    change = {"verdict": "weak", "reasons": ["Dice < 0.9"], "error_um": None}
    for key, value in change.items():
        monkeypatch.setitem(row, key, value)
    si.pl.registration_page(plot_stack, tmp_path / "check.html", sections="s2")
    text = (tmp_path / "check.html").read_text()
    assert '<section class="weak">' in text
    assert "<li>Dice &lt; 0.9</li>" in text
    assert "Expected error: unknown." in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_decisions_in_a_browser(page, plot_stack, tmp_path):
    copy = tmp_path / "clicked.html"
    copy.write_text(page.read_text().replace("</body>", f"{CLICKS}</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    shown = subprocess.run(
        [CHROMIUM, *options, *OFFLINE, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    saved, count, clip = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    state = registration_state(load_record(plot_stack))
    assert saved == {"registration": state, "sections": {"s0": "approved", "s2": "rejected"}}
    assert count == "2 of 2 sections decided"
    assert clip == "inset(0px 0px 0px 20%)"


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [("check.pdf", ValueError, "must end in .html"), ("no/check.html", FileNotFoundError, "folder")],
)
def test_wrong_paths(plot_stack, tmp_path, path, error, match):
    with pytest.raises(error, match=match):
        si.pl.registration_page(plot_stack, tmp_path / path)
