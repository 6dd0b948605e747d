// A comparison: pictures of two methods side by side under one w, their points on curves, and tables.

function comparison(one, number) {
  const grids = one.pictures?.grids ?? [],
    every = [...one.rows, ...grids];
  const models = unique(every.map((row) => row.model));
  const colors = Object.fromEntries(models.map((model, i) => [model, color(i)]));
  const stepsOf = (model) => ascending(every.filter((row) => row.model === model).map((row) => row.steps));
  const strengths = ascending(every.map((row) => row.guidance)),
    scored = ascending(one.rows.map((row) => row.guidance));
  const find = (rows, { model, steps }, w) =>
    rows.find((row) => row.model === model && row.steps === steps && row.guidance === w);
  const speed = (row) => {
    const timed = one.timing.rows.find(
      (r) => r.model === row.model && r.steps === row.steps && r.guidance > 0 === row.guidance > 0,
    );
    return timed ? one.timing.batch / timed.seconds : row.images_per_second;
  };

  const chosen = remembered(`comparison ${number}`, start());
  if (!strengths.includes(chosen.w)) chosen.w = start().w;
  const sides = ["A", "B"].map(side);
  const w = slider(
    "guidance w",
    (value) => `w = ${short(value)}`,
    (value) => {
      chosen.w = value;
      update();
    },
  );
  const headline = el("p", { class: "headline" });
  const plots = one.rows.length ? [plot(), plot(), plot(true)] : [];
  w.set(strengths, chosen.w);
  update();

  return el(
    "section",
    { id: `comparison-${number}` },
    el("h2", {}, one.name),
    headline,
    el("div", { class: "controls strength" }, w.node),
    el(
      "div",
      { class: "sides" },
      sides.map((it) => it.node),
    ),
    plots.length
      ? el(
          "ul",
          { class: "legend" },
          models.map((name) => legendItem({ name, color: colors[name] })),
        )
      : null,
    plots.length
      ? [
          el(
            "div",
            { class: "plots" },
            plots.map((it) => it.node),
          ),
          hint(),
        ]
      : null,
    el("h3", {}, "What the numbers are"),
    el(
      "ul",
      { class: "labels" },
      one.labels.map((text) => el("li", {}, text)),
    ),
    one.made_by ? el("p", {}, "Made by ", el("code", {}, one.made_by)) : null,
    el("h3", {}, "Tables"),
    tables(),
  );

  /** At first, the teacher's most steps against the fewest calls of another, of these the nearest to the data. */
  function start() {
    const all = scored.length ? scored : strengths,
      w = all.includes(1) ? 1 : all[Math.floor(all.length / 2)];
    const calls = (row) => row.nfe ?? row.steps,
      far = (row) => row.fd ?? 0;
    const here = (scored.length ? one.rows : every).filter((row) => row.guidance === w);
    const isTeacher = (row) => row.model.includes("teacher");
    const [most] = [...here].sort((a, b) => isTeacher(b) - isTeacher(a) || b.steps - a.steps || far(a) - far(b));
    const others = here.filter((row) => row.model !== most.model);
    const [fewest = most] = others.sort((a, b) => calls(a) - calls(b) || far(a) - far(b));
    const of = ({ model, steps }) => ({ model, steps });
    return { w, A: of(most), B: of(fewest) };
  }

  function side(letter) {
    if (!stepsOf(chosen[letter].model).includes(chosen[letter].steps)) chosen[letter] = start()[letter];
    const method = select("method", models, (model) => {
      const all = stepsOf(model);
      chosen[letter] = { model, steps: nearest(all, chosen[letter].steps) };
      steps.set(all, chosen[letter].steps);
      update();
    });
    const steps = slider(
      "steps",
      (value) => plural(value, "step"),
      (value) => {
        chosen[letter].steps = value;
        update();
      },
    );
    method.input.value = chosen[letter].model;
    steps.set(stepsOf(chosen[letter].model), chosen[letter].steps);
    const large = el("img", { class: "large" }),
      small = el("img", { class: "small" }),
      caption = el("figcaption"),
      values = el("p", { class: "values" });
    const lacking = el("p", { class: "missing" });
    const cells = { "--columns": one.pictures?.class_names.length, "--rows": one.pictures?.noises };
    const frame = el(
      "figure",
      {},
      el("div", { class: "frame" }, large),
      lacking,
      caption,
      el("div", { class: "true" }, small, el("span", {}, "true size")),
    );
    const node = el(
      "section",
      { class: `side ${letter}`, "aria-label": `side ${letter}` },
      el(
        "div",
        { class: "controls" },
        el("span", { class: `badge ${letter}`, "aria-hidden": "true" }, letter),
        method.node,
        steps.node,
      ),
      values,
      frame,
    );
    for (const [name, value] of Object.entries(cells)) frame.style.setProperty(name, value);
    large.addEventListener("load", () => enlarge(large));

    const draw = () => {
      const it = chosen[letter],
        grid = find(grids, it, chosen.w),
        row = find(one.rows, it, chosen.w);
      for (const part of [large, small]) {
        part.hidden = !grid;
        if (grid) {
          part.src = src(grid.png);
          part.alt = describe(it);
        } else {
          part.removeAttribute("src");
          part.alt = "";
        }
      }
      frame.classList.toggle("empty", !grid);
      const known = ascending(grids.filter((g) => g.model === it.model && g.steps === it.steps).map((g) => g.guidance));
      lacking.textContent = grid
        ? ""
        : known.length
          ? `No picture at w = ${short(chosen.w)}: this method is there for w = ${known.map(short).join(", ")}.`
          : "No pictures of this method were kept.";
      caption.textContent = grid
        ? `A column a class (${one.pictures.class_names.join(", ")}), a row a noise: the same in A and B.`
        : "";
      values.replaceChildren(
        ...(row
          ? [
              ["distance", fixed(row.fd)],
              ["score", fixed(row.score)],
              [row.nfe === 1 ? "call" : "calls", short(row.nfe)],
              ["images/s", short(Math.round(speed(row)))],
            ].map(([name, value]) => el("span", {}, el("b", {}, value), ` ${name}`))
          : [el("span", {}, `Not scored at w = ${short(chosen.w)}.`)]),
      );
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
    const here = nearest(scored, chosen.w),
      at = `at w = ${short(here)}${here === chosen.w ? "" : " (the nearest that is scored)"}`;
    headline.textContent = one.headline.find((line) => line.guidance === here)?.text ?? "";
    const marked = ["A", "B"]
      .map((letter) => ({ side: letter, row: find(one.rows, chosen[letter], here) }))
      .filter(({ row }) => row);
    const tell = (row) =>
      `${row.model}, ${plural(row.steps, "step")}, w = ${short(row.guidance)}: distance ${fixed(row.fd)}, score ${fixed(row.score)}, ${plural(row.nfe, "call")}`;
    const against = (key, title, y, ykind, level) => ({
      title: `${title} ${at}`,
      x: "network calls an image",
      y,
      xkind: "doubling",
      ykind,
      level,
      lines: models.map((model) => ({
        name: model,
        color: colors[model],
        points: one.rows
          .filter((row) => row.model === model && row.guidance === here)
          .sort((a, b) => a.nfe - b.nfe)
          .map((row) => ({ x: row.nfe, y: row[key], text: tell(row) })),
      })),
      marks: marked.map(({ side, row }) => ({ side, x: row.nfe, y: row[key] })),
      room: one.rows.map((row) => ({ x: row.nfe, y: row[key] })),
    });
    const floor = one.reference.half_against_half_fd,
      real = one.reference.score;
    plots[0].draw(
      against(
        "fd",
        "Distance (less is better)",
        "Fréchet distance",
        "log",
        floor ? { y: floor, text: `one half of the real images against the other: ${fixed(floor)}` } : null,
      ),
    );
    plots[1].draw(
      against(
        "score",
        "Score (more is better)",
        "score",
        "linear",
        real ? { y: real, text: `real images: ${fixed(real)}` } : null,
      ),
    );
    plots[2].draw({
      title: "The trade-off of A and B over w",
      x: "Fréchet distance",
      y: "score",
      xkind: "log",
      lines: ["A", "B"].map((letter) => ({
        name: `${letter}: ${chosen[letter].model}, ${plural(chosen[letter].steps, "step")}`,
        color: colors[chosen[letter].model],
        dashed: letter === "B",
        points: one.rows
          .filter((row) => row.model === chosen[letter].model && row.steps === chosen[letter].steps)
          .sort((a, b) => a.guidance - b.guidance)
          .map((row) => ({ x: row.fd, y: row.score, text: tell(row), label: short(row.guidance) })),
      })),
      marks: marked.map(({ side, row }) => ({ side, x: row.fd, y: row.score })),
    });
  }

  function tables() {
    const lines = unique(one.rows.map((row) => JSON.stringify([row.model, row.steps]))).map((key) => {
      const [model, steps] = JSON.parse(key),
        rows = one.rows.filter((row) => row.model === model && row.steps === steps);
      return {
        model,
        steps,
        calls: Math.max(...rows.map((row) => row.nfe)),
        at: new Map(rows.map((row) => [row.guidance, row])),
      };
    });
    const method = [
      { title: "method", value: (line) => line.model },
      { title: "steps", value: (line) => line.steps },
      { title: "calls", value: (line) => line.calls },
    ];
    const over = (key, text) =>
      scored.map((w) => ({ title: `w = ${short(w)}`, text, value: (line) => line.at.get(w)?.[key] ?? null }));
    const folded = (title, node, open) => el("details", { open: open ? "" : null }, el("summary", {}, title), node);
    const rate = scored.map((w) => ({
      title: `w = ${short(w)}`,
      value: (line) => (line.at.has(w) ? Math.round(speed(line.at.get(w))) : null),
    }));
    return el(
      "div",
      {},
      lines.length
        ? folded(
            "Distance",
            table("Fréchet distance for each w; less is better", [...method, ...over("fd", fixed)], lines),
            true,
          )
        : null,
      lines.length
        ? folded("Score", table("Score for each w; more is better", [...method, ...over("score", fixed)], lines))
        : null,
      lines.length ? folded("Speed", table("Images a second for each w", [...method, ...rate], lines)) : null,
      one.reconstruction.length
        ? folded(
            "Reconstruction",
            table(
              "Images encoded and decoded as their own class: root mean squared error",
              [
                { title: "pair", value: (row) => row.pair },
                { title: "w", value: (row) => row.guidance },
                { title: "calls", value: (row) => row.calls },
                { title: "error", value: (row) => row.rmse },
              ],
              one.reconstruction,
            ),
          )
        : null,
    );
  }
}
