"use strict";
// What the page is made of: sliders, tables and plots. All text goes in as text, never as HTML, and nothing is fetched.

const page = JSON.parse(document.getElementById("data").textContent);

// --- Elements ---

const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (!missing(value)) node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => !missing(child)));
  return node;
};
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : (value ?? ""));
const tick = (value) =>
  value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential() : short(value);
const missing = (value) => value === null || value === undefined;
const fixed = (value) => (typeof value === "number" ? value.toFixed(2) : "");
const plural = (count, word) => `${short(count)} ${word}${count === 1 ? "" : "s"}`;
const unique = (values) => [...new Set(values)];
const ascending = (values) => unique(values).sort((a, b) => a - b);
const nearest = (values, wanted) => values.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
const src = (png) => `data:image/png;base64,${png}`;
let ids = 0;

// What was chosen outlives the page loading itself again. Some browsers keep nothing for files: then it does not.
const remember = (key, value) => {
  try {
    sessionStorage.setItem(`${page.title} ${key}`, JSON.stringify(value));
  } catch {
    /* not kept */
  }
};
const remembered = (key, otherwise) => {
  try {
    return JSON.parse(sessionStorage.getItem(`${page.title} ${key}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

/** A labelled slider over some values; `set(values, value)` gives it others. */
function slider(label, text, onchange) {
  const id = `control-${ids++}`,
    output = el("output", { for: id });
  let values = [];
  const tell = () => {
    output.textContent = text(values[input.value]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  const input = el("input", {
    id,
    type: "range",
    min: 0,
    step: 1,
    oninput: () => {
      tell();
      onchange(values[input.value]);
    },
  });
  const set = (others, value) => {
    values = others;
    input.max = Math.max(0, values.length - 1);
    input.disabled = values.length < 2;
    input.value = Math.max(0, values.indexOf(value));
    tell();
  };
  return { node: el("div", { class: "control" }, el("label", { for: id }, label), input, output), input, set };
}

function select(label, names, onchange) {
  const id = `control-${ids++}`;
  const input = el(
    "select",
    { id, onchange: () => onchange(input.value) },
    names.map((name) => el("option", { value: name }, name)),
  );
  return { node: el("div", { class: "control" }, el("label", { for: id }, label), input), input };
}

/** A table with a caption, sorted by a click on a column's title. columns: {title, value(row), text(value)}. */
function table(caption, columns, rows) {
  const body = el("tbody"),
    heads = [];
  let by = null,
    up = true;
  const fillBody = () => {
    const sorted = [...rows];
    if (by) {
      sorted.sort((a, b) => {
        const [x, y] = [by.value(a), by.value(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y); // at the end, either way
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return up ? order : -order;
      });
    }
    body.replaceChildren(
      ...sorted.map((row) =>
        el(
          "tr",
          {},
          columns.map(({ value, text = short }) => {
            const cell = value(row);
            return el("td", { class: typeof cell === "number" ? "number" : null }, text(cell));
          }),
        ),
      ),
    );
    heads.forEach((head, i) =>
      head.setAttribute("aria-sort", columns[i] === by ? (up ? "ascending" : "descending") : "none"),
    );
  };
  for (const column of columns) {
    const sort = () => {
      up = by === column ? !up : true;
      by = column;
      fillBody();
    };
    heads.push(el("th", { scope: "col" }, el("button", { type: "button", onclick: sort }, column.title)));
  }
  fillBody();
  const whole = el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, whole);
}

/** As large as there is room for, by a whole factor, so that all pixels are squares of one size. */
function enlarge(image) {
  const room = image.closest("figure").clientWidth;
  if (!image.naturalWidth || !room) return;
  image.style.width = `${image.naturalWidth * Math.max(1, Math.floor(room / image.naturalWidth))}px`;
}
addEventListener("resize", () => document.querySelectorAll("img.large").forEach(enlarge));

// --- Plots ---

const WIDTH = 420,
  HEIGHT = 290,
  LEFT = 48,
  RIGHT = 12,
  TOP = 10,
  BOTTOM = 40;

function axis(values, kind, from, to) {
  let low = Math.min(...values),
    high = Math.max(...values);
  const log = kind !== "linear" && low > 0;
  if (log) [low, high] = [low / 1.2, high * 1.2];
  else {
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low - room, high + room];
  }
  const f = log ? Math.log : (value) => value;
  return {
    at: (v) => from + ((to - from) * (f(v) - f(low))) / (f(high) - f(low)),
    ticks: ticks(low, high, log && kind),
  };
}

function ticks(low, high, log) {
  const inside = (values) => values.filter((v) => v >= low && v <= high);
  const powers = (base) => Array.from({ length: 41 }, (_, i) => base ** (i - 20));
  if (log === "doubling") {
    const all = inside(powers(2));
    return all.filter((_, i) => i % Math.ceil(all.length / 8) === 0);
  }
  if (log) {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      const all = inside(powers(10).flatMap((p) => steps.map((m) => m * p)));
      if (all.length >= 3 && all.length <= 7) return all;
    }
  }
  const rough = (high - low) / 5,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  return inside(Array.from({ length: 12 }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toPrecision(12))));
}

/** A plot whose `draw` takes {title, x, y, xkind, ykind, lines: [{name, color, points: [{x, y, text}]}], marks, level,
 *  room}; room: other points [{x, y}] that the axes have room for, so that they stay while lines move.
 *  The nearest value is told under the pointer, and for each arrow key. */
const hint = () =>
  el("p", { class: "note" }, "Point at a plot, or walk through it with the arrow keys, for its values.");

function plot(legend) {
  const heading = el("h4"),
    readout = el("p", { class: "readout", "aria-live": "polite" }),
    keys = el("ul", { class: "legend" });
  const canvas = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
  const node = el("figure", { class: "plot" }, heading, canvas, legend ? keys : null, readout);
  let spots = [],
    at = -1;
  const ring = svg("circle", { r: 6, class: "ring" });
  const show = (index) => {
    if (!spots.length) return;
    at = (index + spots.length) % spots.length;
    ring.setAttribute("cx", spots[at].x);
    ring.setAttribute("cy", spots[at].y);
    canvas.append(ring);
    readout.textContent = spots[at].text;
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [
      ((event.clientX - box.left) * WIDTH) / box.width,
      ((event.clientY - box.top) * HEIGHT) / box.height,
    ];
    const distance = (spot) => (spot.x - x) ** 2 + (spot.y - y) ** 2;
    show(spots.reduce((best, spot, i) => (distance(spot) < distance(spots[best]) ? i : best), 0));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      show(at + step);
    }
  });

  const draw = ({ title, x, y, xkind = "linear", ykind = "linear", lines, marks = [], level = null, room = [] }) => {
    heading.textContent = title;
    const points = lines.flatMap((line) => line.points).filter((point) => point.y !== null);
    canvas.setAttribute(
      "aria-label",
      `${title}: ${y} against ${x}, ${plural(points.length, "point")}; arrow keys tell their values`,
    );
    readout.textContent = points.length ? "" : "Nothing to draw here.";
    at = -1;
    spots = [];
    if (!points.length) return canvas.replaceChildren();
    const all = [...points, ...room];
    const across = axis(
      all.map((point) => point.x),
      xkind,
      LEFT,
      WIDTH - RIGHT,
    );
    const upward = axis([...all.map((point) => point.y), ...(level ? [level.y] : [])], ykind, HEIGHT - BOTTOM, TOP);
    const parts = [];
    for (const value of across.ticks) {
      parts.push(
        svg("line", { class: "grid", x1: across.at(value), x2: across.at(value), y1: TOP, y2: HEIGHT - BOTTOM }),
      );
      parts.push(svg("text", { x: across.at(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, tick(value)));
    }
    for (const value of upward.ticks) {
      parts.push(
        svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: upward.at(value), y2: upward.at(value) }),
      );
      parts.push(svg("text", { x: LEFT - 6, y: upward.at(value) + 4, "text-anchor": "end" }, tick(value)));
    }
    parts.push(
      svg("text", { class: "name", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, x),
    );
    if (y !== title)
      parts.push(
        svg(
          "text",
          { class: "name", x: -(TOP + HEIGHT - BOTTOM) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" },
          y,
        ),
      );
    if (level) {
      parts.push(
        svg(
          "line",
          { class: "level", x1: LEFT, x2: WIDTH - RIGHT, y1: upward.at(level.y), y2: upward.at(level.y) },
          svg("title", {}, level.text),
        ),
      );
    }
    for (const line of lines) {
      let path = "";
      for (const point of line.points) {
        if (point.y === null) {
          path += " ";
          continue;
        }
        const [px, py] = [across.at(point.x), upward.at(point.y)];
        path += `${path === "" || path.endsWith(" ") ? "M" : "L"}${px.toFixed(1)},${py.toFixed(1)}`;
        spots.push({ x: px, y: py, text: point.text });
        if (line.points.length < 40) parts.push(svg("circle", { cx: px, cy: py, r: 2.5, fill: line.color }));
        if (point.label) parts.push(svg("text", { class: "small", x: px + 5, y: py - 5 }, point.label));
      }
      parts.push(svg("path", { d: path, stroke: line.color, class: line.dashed ? "line dashed" : "line" }));
    }
    for (const mark of marks) {
      const [px, py] = [across.at(mark.x), upward.at(mark.y)];
      parts.push(
        svg(
          "g",
          { class: `mark ${mark.side}`, transform: `translate(${px.toFixed(1)},${py.toFixed(1)})` },
          svg("circle", { r: 8 }),
          svg("text", { y: 4, "text-anchor": "middle" }, mark.side),
        ),
      );
    }
    canvas.replaceChildren(...parts);
    keys.replaceChildren(...lines.map(legendItem));
  };
  return { node, draw };
}

const legendItem = (line) =>
  el("li", {}, el("span", { class: "swatch", style: `background: ${line.color}` }), line.name);
const color = (index) => `var(--c${index % 9})`;
