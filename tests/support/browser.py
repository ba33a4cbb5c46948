"""Opens pages in a real browser, without a network, and drives it over the DevTools protocol."""

from __future__ import annotations

import atexit
import base64
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.programs import skip_without

# Goes through the views of all figures, and notes after each choice how many traces are seen, and
# whether all of them left marks in the drawing.
LOOK = """(async () => {
  const MARKS = ".scatterlayer .trace, .heatmaplayer .hm, .barlayer .trace";
  const figures = [];
  for (const section of document.querySelectorAll("section:has(.panels)")) {
    const select = section.querySelector("select");
    const labels = select ? [...select.options].map(option => option.value) : [""];
    const states = [];
    let drawn = true;
    for (const label of [...labels, labels[0]]) {
      if (select) {
        select.value = label;
        select.dispatchEvent(new Event("change", {bubbles: true}));
      }
      await new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)));
      const plots = [...section.querySelectorAll(".plot")];
      const traces = plots.flatMap(plot => plot._fullData);
      states.push(traces.length);
      drawn = drawn && plots.every(
        plot => plot.querySelectorAll(MARKS).length >= plot._fullData.length);
    }
    const first = section.querySelector(".plot")._fullData[0];
    figures.push({
      states: states.slice(0, -1), drawn, menu: labels,
      titles: [...section.querySelectorAll("figcaption")].map(caption => caption.textContent),
      x: first.x, y: first.y, z: first.z,
    });
  }
  return figures;
})()"""
ANSWER_S = 120
SWITCHES = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--remote-debugging-pipe"),
]


class Browser:
    """A running Chromium; ends with this process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads commands from file 3 and writes answers to file 4.
        command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", "chromium"]
        self._process = subprocess.Popen(
            [*command, *SWITCHES, f"--user-data-dir={self._folder.name}"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._folder.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol; events before it go to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + ANSWER_S
        while time.monotonic() < until:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self.events.append(answer)
        raise AssertionError(f"no answer to {method}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 2**20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))


@cache
def browser() -> Browser:
    """The browser that all tests of a process share."""
    skip_without("chromium", "chromium")
    return Browser()


class Tab:
    """A tab of that browser with a page of a file or address.

    Args:
        width: of the window, in CSS pixels; below 500 it is a phone's.
        dark: whether the reader prefers dark colours.
    """

    def __init__(self, address: str, width: int = 1400, dark: bool = False) -> None:
        self._browser = browser()
        target = self._browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._target, self._session = target, attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        phone, scheme = width < 500, "dark" if dark else "light"
        size = {"width": width, "height": 844 if phone else 900}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, or what its promise gives."""
        told = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key, such as Enter, where the focus is."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text)

    @property
    def console(self) -> list[str]:
        """Errors, warnings and messages of the page so far."""
        self.run("0")
        found = []
        for event in self._browser.events:
            params = event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", params)))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(" ".join(str(word.get("value")) for word in params["args"]))
            elif event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
        return found

    def picture(self, file: Path, whole: bool = False) -> None:
        """Save what the window shows, or the whole page, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@dataclass(frozen=True)
class Seen:
    """A page in the browser: its console's lines, what its figures show, and the document."""

    console: list[str]
    figures: list[dict[str, Any]]
    html: str


def look_at(page: Path) -> Seen:
    """Open a page, go through every view of its figures, and tell what was there."""
    with Tab(page.resolve().as_uri()) as tab:
        figures = tab.run(LOOK)
        document = tab.run("document.documentElement.outerHTML")
        return Seen(tab.console, figures, re.sub(r"<script>.*?</script>", "", document, flags=re.S))
