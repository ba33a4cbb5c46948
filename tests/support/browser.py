"""Opens a report's page in a real browser, without a network."""

from __future__ import annotations

import html
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import skip_without

# Goes through the menus of all figures, and notes after each choice how many traces are seen, and
# whether all of them left marks in the drawing.
SCRIPT = """
<script>
const MARKS = ".scatterlayer .trace, .heatmaplayer .hm, .barlayer .trace";
addEventListener("load", async () => {
  const figures = [];
  for (const figure of document.querySelectorAll(".plotly-graph-div")) {
    const menus = figure.layout.updatemenus || [];
    const buttons = menus.length ? menus[0].buttons : [{args: [{}], label: ""}];
    const states = [];
    let drawn = true;
    for (const button of [...buttons, buttons[0]]) {
      await Plotly.update(figure, ...button.args);
      const traces = figure._fullData.filter(trace => trace.visible === true);
      states.push(traces.length);
      drawn = drawn && figure.querySelectorAll(MARKS).length >= traces.length;
    }
    const first = figure._fullData.find(trace => trace.visible === true);
    figures.push({
      states: states.slice(0, -1), drawn, menu: buttons.map(button => button.label),
      titles: (figure.layout.annotations || []).map(note => note.text),
      x: first.x, y: first.y, z: first.z,
    });
  }
  const note = document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify(figures);
  document.body.append(note);
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """A page in the browser: its console's lines, what its figures show, and the document."""

    console: list[str]
    figures: list[dict[str, Any]]
    html: str


def look_at(page: Path) -> Seen:
    """Open a page, go through every choice of its figures' menus, and tell what was there."""
    skip_without("chromium", "chromium")
    with tempfile.TemporaryDirectory() as profile:
        copy = Path(profile) / "page.html"
        copy.write_text(page.read_text(encoding="utf-8") + SCRIPT, encoding="utf-8")
        done = subprocess.run(
            [
                "chromium",
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                *("--disable-component-update", "--enable-logging=stderr", "--dump-dom"),
                *("--window-size=1400,3000", "--virtual-time-budget=30000"),
                f"--user-data-dir={profile}/user",
                f"file://{copy}",
            ],
            capture_output=True,
            text=True,
            timeout=180,
        )
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    return Seen(console, json.loads(html.unescape(seen)), done.stdout)
