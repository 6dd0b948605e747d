"use strict";
// Draws the page from the JSON in it. All text goes in as text, never as HTML, and nothing is fetched.

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
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value ?? "");
const tick = (value) => (value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential() : short(value));
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
  try { sessionStorage.setItem(`${page.title} ${key}`, JSON.stringify(value)); } catch { /* not kept */ }
};
const remembered = (key, otherwise) => {
  try { return JSON.parse(sessionStorage.getItem(`${page.title} ${key}`)) ?? otherwise; } catch { return otherwise; }
};

/** A labelled slider over some values; `set(values, value)` gives it others. */
function slider(label, text, onchange) {
  const id = `control-${ids++}`, output = el("output", { for: id });
  let values = [];
  const tell = () => {
    output.textContent = text(values[input.value]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  const input = el("input", { id, type: "range", min: 0, step: 1, oninput: () => { tell(); onchange(values[input.value]); } });
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
  const input = el("select", { id, onchange: () => onchange(input.value) }, names.map((name) => el("option", { value: name }, name)));
  return { node: el("div", { class: "control" }, el("label", { for: id }, label), input), input };
}

/** A table with a caption, sorted by a click on a column's title. columns: {title, value(row), text(value)}. */
function table(caption, columns, rows) {
  const body = el("tbody"), heads = [];
  let by = null, up = true;
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
    body.replaceChildren(...sorted.map((row) => el("tr", {}, columns.map(({ value, text = short }) => {
      const cell = value(row);
      return el("td", { class: typeof cell === "number" ? "number" : null }, text(cell));
    }))));
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i] === by ? (up ? "ascending" : "descending") : "none"));
  };
  for (const column of columns) {
    const sort = () => { up = by === column ? !up : true; by = column; fillBody(); };
    heads.push(el("th", { scope: "col" }, el("button", { type: "button", onclick: sort }, column.title)));
  }
  fillBody();
  const whole = el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, whole);
}

// --- Plots ---

const WIDTH = 420, HEIGHT = 290, LEFT = 48, RIGHT = 12, TOP = 10, BOTTOM = 40;

function axis(values, kind, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  const log = kind !== "linear" && low > 0;
  if (log) [low, high] = [low / 1.2, high * 1.2];
  else { const room = (high - low || Math.abs(high) || 1) * 0.06; [low, high] = [low - room, high + room]; }
  const f = log ? Math.log : (value) => value;
  return { at: (v) => from + ((to - from) * (f(v) - f(low))) / (f(high) - f(low)), ticks: ticks(low, high, log && kind) };
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
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  return inside(Array.from({ length: 12 }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toPrecision(12))));
}

/** A plot whose `draw` takes {title, x, y, xkind, ykind, lines: [{name, color, points: [{x, y, text}]}], marks, level,
 *  room}; room: other points [{x, y}] that the axes have room for, so that they stay while lines move.
 *  The nearest value is told under the pointer, and for each arrow key. */
const hint = () => el("p", { class: "note" }, "Point at a plot, or walk through it with the arrow keys, for its values.");

function plot(legend) {
  const heading = el("h4"), readout = el("p", { class: "readout", "aria-live": "polite" }), keys = el("ul", { class: "legend" });
  const canvas = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
  const node = el("figure", { class: "plot" }, heading, canvas, legend ? keys : null, readout);
  let spots = [], at = -1;
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
    const [x, y] = [((event.clientX - box.left) * WIDTH) / box.width, ((event.clientY - box.top) * HEIGHT) / box.height];
    const distance = (spot) => (spot.x - x) ** 2 + (spot.y - y) ** 2;
    show(spots.reduce((best, spot, i) => (distance(spot) < distance(spots[best]) ? i : best), 0));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { event.preventDefault(); show(at + step); }
  });

  const draw = ({ title, x, y, xkind = "linear", ykind = "linear", lines, marks = [], level = null, room = [] }) => {
    heading.textContent = title;
    const points = lines.flatMap((line) => line.points).filter((point) => point.y !== null);
    canvas.setAttribute("aria-label", `${title}: ${y} against ${x}, ${plural(points.length, "point")}; arrow keys tell their values`);
    readout.textContent = points.length ? "" : "Nothing to draw here.";
    at = -1;
    spots = [];
    if (!points.length) return canvas.replaceChildren();
    const all = [...points, ...room];
    const across = axis(all.map((point) => point.x), xkind, LEFT, WIDTH - RIGHT);
    const upward = axis([...all.map((point) => point.y), ...(level ? [level.y] : [])], ykind, HEIGHT - BOTTOM, TOP);
    const parts = [];
    for (const value of across.ticks) {
      parts.push(svg("line", { class: "grid", x1: across.at(value), x2: across.at(value), y1: TOP, y2: HEIGHT - BOTTOM }));
      parts.push(svg("text", { x: across.at(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, tick(value)));
    }
    for (const value of upward.ticks) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: upward.at(value), y2: upward.at(value) }));
      parts.push(svg("text", { x: LEFT - 6, y: upward.at(value) + 4, "text-anchor": "end" }, tick(value)));
    }
    parts.push(svg("text", { class: "name", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, x));
    if (y !== title) parts.push(svg("text", { class: "name", x: -(TOP + HEIGHT - BOTTOM) / 2, y: 11, "text-anchor": "middle", transform: "rotate(-90)" }, y));
    if (level) {
      parts.push(svg("line", { class: "level", x1: LEFT, x2: WIDTH - RIGHT, y1: upward.at(level.y), y2: upward.at(level.y) }, svg("title", {}, level.text)));
    }
    for (const line of lines) {
      let path = "";
      for (const point of line.points) {
        if (point.y === null) { path += " "; continue; }
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
      parts.push(svg("g", { class: `mark ${mark.side}`, transform: `translate(${px.toFixed(1)},${py.toFixed(1)})` },
        svg("circle", { r: 8 }), svg("text", { y: 4, "text-anchor": "middle" }, mark.side)));
    }
    canvas.replaceChildren(...parts);
    keys.replaceChildren(...lines.map(legendItem));
  };
  return { node, draw };
}

const legendItem = (line) => el("li", {}, el("span", { class: "swatch", style: `background: ${line.color}` }), line.name);
const color = (index) => `var(--c${index % 9})`;

// --- A comparison: two methods side by side ---

function comparison(one, number) {
  const grids = one.pictures?.grids ?? [], every = [...one.rows, ...grids];
  const models = unique(every.map((row) => row.model));
  const colors = Object.fromEntries(models.map((model, i) => [model, color(i)]));
  const stepsOf = (model) => ascending(every.filter((row) => row.model === model).map((row) => row.steps));
  const strengths = ascending(every.map((row) => row.guidance)), scored = ascending(one.rows.map((row) => row.guidance));
  const find = (rows, { model, steps }, w) => rows.find((row) => row.model === model && row.steps === steps && row.guidance === w);
  const speed = (row) => {
    const timed = one.timing.rows.find((r) => r.model === row.model && r.steps === row.steps && (r.guidance > 0) === (row.guidance > 0));
    return timed ? one.timing.batch / timed.seconds : row.images_per_second;
  };

  const chosen = remembered(`comparison ${number}`, start());
  const sides = ["A", "B"].map(side);
  const w = slider("guidance w", (value) => `w = ${short(value)}`, (value) => { chosen.w = value; update(); });
  const headline = el("p", { class: "headline" });
  const plots = one.rows.length ? [plot(), plot(), plot(true)] : [];
  w.set(strengths, chosen.w);
  update();

  return el("section", { id: `comparison-${number}` },
    el("h2", {}, one.name),
    headline,
    el("div", { class: "controls strength" }, w.node),
    el("div", { class: "sides" }, sides.map((it) => it.node)),
    plots.length ? el("ul", { class: "legend" }, models.map((name) => legendItem({ name, color: colors[name] }))) : null,
    plots.length ? [el("div", { class: "plots" }, plots.map((it) => it.node)), hint()] : null,
    el("h3", {}, "What the numbers are"),
    el("ul", { class: "labels" }, one.labels.map((text) => el("li", {}, text))),
    one.made_by ? el("p", {}, "Made by ", el("code", {}, one.made_by)) : null,
    el("h3", {}, "Tables"),
    tables());

  /** At first, the most calls against the fewest, of the methods that are known at the middle w. */
  function start() {
    const all = scored.length ? scored : strengths, w = all.includes(1) ? 1 : all[Math.floor(all.length / 2)];
    const here = every.filter((row) => row.guidance === w).sort((a, b) => a.steps - b.steps || (a.fd ?? 0) - (b.fd ?? 0));
    const most = here.filter((row) => row.model.includes("teacher")).pop() ?? here[here.length - 1];
    const fewest = here.find((row) => row.model !== most.model) ?? here[0];
    const of = ({ model, steps }) => ({ model, steps });
    return { w, A: of(most), B: of(fewest) };
  }

  function side(letter) {
    if (!models.includes(chosen[letter].model)) chosen[letter] = start()[letter];
    const method = select("method", models, (model) => {
      const all = stepsOf(model);
      chosen[letter] = { model, steps: nearest(all, chosen[letter].steps) };
      steps.set(all, chosen[letter].steps);
      update();
    });
    const steps = slider("steps", (value) => plural(value, "step"), (value) => { chosen[letter].steps = value; update(); });
    method.input.value = chosen[letter].model;
    steps.set(stepsOf(chosen[letter].model), chosen[letter].steps);
    const large = el("img", { class: "large" }), small = el("img", { class: "small" }), caption = el("figcaption"), values = el("p", { class: "values" });
    const lacking = el("p", { class: "missing" });
    const cells = { "--columns": one.pictures?.class_names.length, "--rows": one.pictures?.noises };
    const frame = el("figure", {}, el("div", { class: "frame" }, large), lacking, caption, el("div", { class: "true" }, small, el("span", {}, "true size")));
    const node = el("section", { class: `side ${letter}`, "aria-label": `side ${letter}` },
      el("div", { class: "controls" }, el("span", { class: `badge ${letter}`, "aria-hidden": "true" }, letter), method.node, steps.node), values, frame);
    for (const [name, value] of Object.entries(cells)) frame.style.setProperty(name, value);
    large.addEventListener("load", () => enlarge(large));

    const draw = () => {
      const it = chosen[letter], grid = find(grids, it, chosen.w), row = find(one.rows, it, chosen.w);
      for (const part of [large, small]) {
        part.hidden = !grid;
        if (grid) { part.src = src(grid.png); part.alt = describe(it); } else { part.removeAttribute("src"); part.alt = ""; }
      }
      frame.classList.toggle("empty", !grid);
      const known = ascending(grids.filter((g) => g.model === it.model && g.steps === it.steps).map((g) => g.guidance));
      lacking.textContent = grid ? "" : known.length
        ? `No picture at w = ${short(chosen.w)}: this method is there for w = ${known.map(short).join(", ")}.`
        : "No pictures of this method were kept.";
      caption.textContent = grid ? `A column a class (${one.pictures.class_names.join(", ")}), a row a noise: the same in A and B.` : "";
      values.replaceChildren(...(row
        ? [["distance", fixed(row.fd)], ["score", fixed(row.score)], [row.nfe === 1 ? "call" : "calls", short(row.nfe)], ["images/s", short(Math.round(speed(row)))]]
            .map(([name, value]) => el("span", {}, el("b", {}, value), ` ${name}`))
        : [el("span", {}, `Not scored at w = ${short(chosen.w)}.`)]));
    };
    return { node, draw };
  }

  function describe({ model, steps }) {
    const { noises, class_names } = one.pictures;
    return `${plural(noises * class_names.length, "image")} of ${model} with ${plural(steps, "step")} at w = ${short(chosen.w)}: ${plural(noises, "noise")} of each class (${class_names.join(", ")})`;
  }

  function update() {
    remember(`comparison ${number}`, chosen);
    sides.forEach((it) => it.draw());
    if (!one.rows.length) return;
    const here = nearest(scored, chosen.w), at = `at w = ${short(here)}${here === chosen.w ? "" : " (the nearest that is scored)"}`;
    headline.textContent = one.headline.find((line) => line.guidance === here)?.text ?? "";
    const marked = ["A", "B"].map((letter) => ({ side: letter, row: find(one.rows, chosen[letter], here) })).filter(({ row }) => row);
    const tell = (row) => `${row.model}, ${plural(row.steps, "step")}, w = ${short(row.guidance)}: distance ${fixed(row.fd)}, score ${fixed(row.score)}, ${plural(row.nfe, "call")}`;
    const against = (key, title, y, ykind, level) => ({
      title: `${title} ${at}`, x: "network calls an image", y, xkind: "doubling", ykind, level,
      lines: models.map((model) => ({
        name: model, color: colors[model],
        points: one.rows.filter((row) => row.model === model && row.guidance === here).sort((a, b) => a.nfe - b.nfe)
          .map((row) => ({ x: row.nfe, y: row[key], text: tell(row) })),
      })),
      marks: marked.map(({ side, row }) => ({ side, x: row.nfe, y: row[key] })),
      room: one.rows.map((row) => ({ x: row.nfe, y: row[key] })),
    });
    const floor = one.reference.half_against_half_fd, real = one.reference.score;
    plots[0].draw(against("fd", "Distance (less is better)", "Fréchet distance", "log", floor ? { y: floor, text: `one half of the real images against the other: ${fixed(floor)}` } : null));
    plots[1].draw(against("score", "Score (more is better)", "score", "linear", real ? { y: real, text: `real images: ${fixed(real)}` } : null));
    plots[2].draw({
      title: "The trade-off of A and B over w", x: "Fréchet distance", y: "score", xkind: "log",
      lines: ["A", "B"].map((letter) => ({
        name: `${letter}: ${chosen[letter].model}, ${plural(chosen[letter].steps, "step")}`,
        color: colors[chosen[letter].model], dashed: letter === "B",
        points: one.rows.filter((row) => row.model === chosen[letter].model && row.steps === chosen[letter].steps)
          .sort((a, b) => a.guidance - b.guidance).map((row) => ({ x: row.fd, y: row.score, text: tell(row), label: short(row.guidance) })),
      })),
      marks: marked.map(({ side, row }) => ({ side, x: row.fd, y: row.score })),
    });
  }

  function tables() {
    const lines = unique(one.rows.map((row) => JSON.stringify([row.model, row.steps]))).map((key) => {
      const [model, steps] = JSON.parse(key), rows = one.rows.filter((row) => row.model === model && row.steps === steps);
      return { model, steps, calls: Math.max(...rows.map((row) => row.nfe)), at: new Map(rows.map((row) => [row.guidance, row])) };
    });
    const method = [{ title: "method", value: (line) => line.model }, { title: "steps", value: (line) => line.steps }, { title: "calls", value: (line) => line.calls }];
    const over = (key, text) => scored.map((w) => ({ title: `w = ${short(w)}`, text, value: (line) => line.at.get(w)?.[key] ?? null }));
    const folded = (title, node, open) => el("details", { open: open ? "" : null }, el("summary", {}, title), node);
    const rate = scored.map((w) => ({ title: `w = ${short(w)}`, value: (line) => (line.at.has(w) ? Math.round(speed(line.at.get(w))) : null) }));
    return el("div", {},
      lines.length ? folded("Distance", table("Fréchet distance for each w; less is better", [...method, ...over("fd", fixed)], lines), true) : null,
      lines.length ? folded("Score", table("Score for each w; more is better", [...method, ...over("score", fixed)], lines)) : null,
      lines.length ? folded("Speed", table("Images a second for each w", [...method, ...rate], lines)) : null,
      one.reconstruction.length ? folded("Reconstruction", table("Images encoded and decoded as their own class: root mean squared error", [
        { title: "pair", value: (row) => row.pair }, { title: "w", value: (row) => row.guidance },
        { title: "calls", value: (row) => row.calls }, { title: "error", value: (row) => row.rmse },
      ], one.reconstruction)) : null);
  }
}

/** As large as there is room for, by a whole factor, so that all pixels are squares of one size. */
function enlarge(image) {
  const room = image.closest("figure").clientWidth;
  if (!image.naturalWidth || !room) return;
  image.style.width = `${image.naturalWidth * Math.max(1, Math.floor(room / image.naturalWidth))}px`;
}
addEventListener("resize", () => document.querySelectorAll("img.large").forEach(enlarge));

// --- A run ---

function run(one, number) {
  const curves = one.curves.map((panel) => {
    const drawn = plot(panel.lines.length > 1);
    drawn.draw({
      title: panel.title, x: "thousands of images", y: panel.title, ykind: panel.log ? "log" : "linear",
      lines: panel.lines.map((line, i) => ({
        name: line.name, color: color(i),
        points: line.points.map(([x, y]) => ({ x, y, text: `${line.name} ${short(y)} at ${short(x)} thousand images` })),
      })),
    });
    return drawn.node;
  });
  const columns = unique(one.scores.flatMap(Object.keys));
  return el("section", { id: `run-${number}` },
    el("h2", {}, one.name, " ", el("span", { class: `state ${one.state}` }, one.state)),
    el("progress", { max: 1, value: one.share, "aria-label": "done" }),
    one.alarms.length ? el("ul", { class: "alarms" }, one.alarms.map((text) => el("li", {}, text))) : null,
    el("div", { class: "sides" },
      one.film.length ? film(one, number) : el("p", { class: "missing" }, "No sample grids yet: they are made whenever the run saves."),
      el("div", {}, el("pre", {}, one.status), el("details", {}, el("summary", {}, "Command, device, seed and versions"),
        el("dl", {}, Object.entries(one.about).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]))))),
    curves.length ? [el("div", { class: "plots" }, curves), hint()] : el("p", { class: "missing" }, "Nothing was logged yet."),
    one.merged > 1 ? el("p", { class: "note" }, `Each point of a curve is the mean of ${one.merged} logged rows.`) : null,
    one.scores.length ? table("Scores while training", columns.map((key) => ({ title: key, value: (row) => row[key] ?? null })), one.scores)
      : el("p", { class: "note" }, "This run was not scored while it trained."));
}

function film(one, number) {
  const frames = one.film.map((_, i) => i), image = el("img", { class: "large", onload: () => enlarge(image) }), key = `film ${number}`;
  const name = (i) => `${one.film[i].run}, update ${one.film[i].update}`;
  const show = (i) => {
    image.src = src(one.film[i].png);
    image.alt = `samples of ${name(i)}`;
    remember(key, i === frames.length - 1 ? null : i);
  };
  const control = slider("samples", name, show);
  const go = (i) => { control.set(frames, i); show(i); };
  let timer = null;
  const play = el("button", { type: "button", onclick: () => {
    if (timer) return stop();
    if (Number(control.input.value) === frames.length - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      const following = Number(control.input.value) + 1;
      if (following < frames.length) go(following);
      else stop();
    }, 400);
  } }, "Play");
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  go(Math.min(remembered(key, frames.length - 1), frames.length - 1));
  const part = one.film_count > frames.length ? ` ${frames.length} of the run's ${one.film_count} pictures are in this page.` : "";
  return el("figure", { class: "reel" }, image, el("figcaption", { class: "controls" }, control.node, frames.length > 1 ? play : null),
    el("p", { class: "note" }, `The same noises and classes all the time.${part}`));
}

// --- All of it ---

const sections = [...page.comparisons.map(comparison), ...page.runs.map(run)];
document.getElementById("page").append(
  el("header", {}, el("h1", {}, "fastdiff report"),
    el("p", { class: "note" }, `${page.title}, as of ${page.written}${page.reload ? `; loads itself again every ${short(page.reload)} s` : ""}. Make this page again with `, el("code", {}, page.command)),
    page.notes.map((note) => el("p", { class: "alarms" }, note)),
    sections.length > 1 ? el("nav", { "aria-label": "parts of this page" }, sections.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").firstChild.textContent))) : null),
  ...sections);

if (page.reload) {
  let touched = 0; // nobody is interrupted
  for (const name of ["pointerdown", "keydown", "input"]) addEventListener(name, () => { touched = Date.now(); });
  const again = () => (Date.now() - touched < 5000 ? setTimeout(again, 5000) : location.reload());
  setTimeout(again, 1000 * page.reload);
}
