"use strict";
// Names of the runs whose curves are in colour, in the order in which colours are given.
let picked = [], touched = false;
// Column by which the table of runs is sorted, and its direction; null: as the server sorts it.
let order = null;

const TOUCH = matchMedia("(hover: none)").matches;
// Without a mouse, plotly's buttons would always lie over the figures.
const CONFIG = {responsive: true, displaylogo: false, displayModeBar: TOUCH ? false : "hover"};

function layoutOf(own) {
  const axis = given => ({automargin: true, title: {standoff: 4}, ...given});
  return {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", uirevision: "kept",
    margin: {l: 50, r: 12, t: 12, b: 36}, font: {family: "system-ui, sans-serif", size: 12},
    modebar: {bgcolor: "transparent", color: "#8a97a5", activecolor: "#2f6fde"},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hovermode: "closest",
    // Fingers scroll the page instead.
    dragmode: TOUCH ? false : "zoom",
    ...own, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  };
}

function draw(section) {
  const figure = JSON.parse(section.querySelector("script").textContent);
  const choice = section.querySelector("select");
  const panels = figure.panels ? curves(section, figure)
    : figure.views[choice ? choice.value : Object.keys(figure.views)[0]];
  const place = section.querySelector(".panels");
  while (place.children.length > panels.length) {
    Plotly.purge(place.lastChild.lastChild);
    place.lastChild.remove();
  }
  // All boxes come first: their number decides how wide each is.
  while (place.children.length < panels.length) {
    const box = place.appendChild(document.createElement("figure"));
    box.append(document.createElement("figcaption"), document.createElement("div"));
    box.lastChild.className = "plot";
  }
  panels.forEach((panel, index) => {
    const [caption, plot] = place.children[index].children;
    caption.textContent = panel.title;
    Plotly.react(plot, panel.data, layoutOf(panel.layout), CONFIG);
  });
}

// Plotly reads tags in texts.
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const shortened = text => text.length > 40 ? `${text.slice(0, 19)}…${text.slice(-20)}` : text;

function curves(section, figure) {
  const names = figure.names.map(name => name.slice(figure.prefix));
  const colors = new Map(picked.map((name, index) => [
    figure.names.indexOf(name), figure.colors[index % figure.colors.length]]));
  section.querySelector("ul").replaceChildren(...[...colors].map(([run, color]) => {
    const item = document.createElement("li");
    item.textContent = item.title = names[run];
    item.style.setProperty("--color", color);
    return item;
  }));
  const labels = names.map(name => escaped(shortened(name)));
  const style = {
    train: {mode: "lines", width: 1.5, text: "train"},
    eval: {mode: "lines+markers", width: 2, dash: "dot", text: "held out"},
  };
  return figure.panels.map(panel => {
    // All other runs are one trace, with gaps: plotly is slow with thousands of traces.
    const faint = {x: [], y: [], text: []}, own = [];
    for (const [run, split, x, y] of panel.lines) {
      const {mode, width, dash, text} = style[split];
      if (colors.has(run)) {
        own.push({
          x, y, mode, line: {color: colors.get(run), width, dash}, showlegend: false,
          hovertemplate: `${labels[run]}<br>${text}, step %{x}: %{y:.4g}<extra></extra>`,
        });
      } else if (split === "train" || x.length > 1) {
        faint.x.push(...x, null);
        faint.y.push(...y, null);
        faint.text.push(...x.map(() => `${labels[run]}<br>${text}`), "");
      }
    }
    const others = {
      ...faint, mode: "lines", line: {color: "#8a97a5", width: 1}, opacity: 0.35, showlegend: false,
      hovertemplate: "%{text}, step %{x}: %{y:.4g}<extra></extra>",
    };
    const data = faint.x.length ? [others, ...own] : own;
    return {title: panel.title, data, layout: {xaxis: {title: {text: "step"}}}};
  });
}

function sortRuns() {
  const table = document.querySelector("#runs table");
  if (!table || !order) return;
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex(head => head.firstElementChild?.id === order.by);
  if (column < 0) return;
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", order.down ? "descending" : "ascending");
  const compare = (a, b) => {
    const [one, two] = [a, b].map(row => row.cells[column].dataset.sort);
    // Runs without a value are last, either way.
    if (!one || !two) return !one - !two;
    const way = isNaN(one) || isNaN(two) ? one.localeCompare(two, "en", {numeric: true}) : one - two;
    return order.down ? -way : way;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function pick() {
  const boxes = [...document.querySelectorAll("#runs .pick input")];
  if (touched) boxes.forEach(box => { box.checked = picked.includes(box.value); });
  else if (boxes.length) picked = boxes.filter(box => box.checked).map(box => box.value);
  else if (document.querySelector("#curves")) {
    picked = JSON.parse(document.querySelector("#curves script").textContent).names;
  }
}

document.addEventListener("click", event => {
  const head = event.target.closest("#runs th button")?.parentElement;
  if (!head) return;
  // Metrics begin with the highest, texts with the first.
  const before = head.getAttribute("aria-sort");
  const number = head.closest("table").tBodies[0].rows[0].cells[head.cellIndex].className === "number";
  order = {by: head.firstElementChild.id, down: before ? before === "ascending" : number};
  sortRuns();
});
document.addEventListener("change", event => {
  const {target} = event;
  if (target.matches("select")) draw(target.closest("section"));
  if (!target.matches(".pick input")) return;
  touched = true;
  picked = picked.filter(name => name !== target.value);
  if (target.checked) picked.push(target.value);
  draw(document.querySelector("#curves"));
});

const main = document.querySelector("main");
// What the server sent last for each section, by id.
let sent = new Map([...main.children].map(section => [section.id, section.outerHTML]));
pick();
main.querySelectorAll("section:has(.panels)").forEach(draw);

// Puts a section in the place of its older version, with the choices that a reader made there.
function replace(now, next) {
  const place = now.querySelector(".panels"), slot = next.querySelector(".panels");
  if (place && slot) slot.replaceWith(place);
  for (const details of next.querySelectorAll("details")) {
    const was = document.getElementById(details.id);
    if (was) details.open = was.open;
  }
  const [old, select] = [now, next].map(section => section.querySelector("select"));
  if (old && select && [...select.options].some(option => option.value === old.value)) {
    select.value = old.value;
  }
  now.replaceWith(next);
}

function update(html) {
  const fresh = [...new DOMParser().parseFromString(html, "text/html").querySelectorAll("section")];
  const ids = fresh.map(section => section.id), before = picked.join("\n");
  const focus = document.activeElement, [x, y] = [scrollX, scrollY];
  const boxes = new Map([...main.children].map(section => {
    const box = section.querySelector(".box");
    return [section.id, [box?.scrollLeft || 0, box?.scrollTop || 0]];
  }));
  for (const section of [...main.children]) {
    if (!ids.includes(section.id)) section.remove();
  }
  const changed = fresh.filter(section => sent.get(section.id) !== section.outerHTML);
  sent = new Map(fresh.map(section => [section.id, section.outerHTML]));
  for (const section of changed) {
    const now = document.getElementById(section.id);
    if (now) replace(now, section);
    else main.insertBefore(section, main.children[ids.indexOf(section.id)] || null);
  }
  pick();
  sortRuns();
  for (const section of main.querySelectorAll("section:has(.panels)")) {
    const recolored = section.id === "curves" && picked.join("\n") !== before;
    if (recolored || changed.includes(section)) draw(section);
  }
  for (const section of changed) section.querySelector(".box")?.scrollTo(...boxes.get(section.id) || [0, 0]);
  if (!focus.isConnected) {
    [...main.querySelectorAll(focus.tagName)].find(
      other => focus.id ? other.id === focus.id : other.value === focus.value,
    )?.focus({preventScroll: true});
  }
  document.title = `simpo: ${main.querySelector("h1").textContent}`;
  scrollTo(x, y);
}

const live = document.getElementById("live");
if (live) {
  let version = "";
  const poll = async () => {
    setTimeout(poll, 2000);
    if (document.hidden) return;
    let answer;
    try {
      const headers = version ? {"If-None-Match": version} : {};
      answer = await fetch("content", {cache: "no-store", headers});
    } catch {
      live.textContent = "not live: simpo report --serve has ended";
      live.className = "lost";
      return;
    }
    live.textContent = "live";
    live.className = "";
    if (answer.status !== 200) return;
    version = answer.headers.get("ETag");
    update(await answer.text());
  };
  poll();
}
