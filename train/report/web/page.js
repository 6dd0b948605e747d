// Runs, and all of the page.

function run(one, number) {
  const curves = one.curves.map((panel) => {
    const drawn = plot(panel.lines.length > 1);
    drawn.draw({
      title: panel.title,
      x: "thousands of images",
      y: panel.title,
      ykind: panel.log ? "log" : "linear",
      lines: panel.lines.map((line, i) => ({
        name: line.name,
        color: color(i),
        points: line.points.map(([x, y]) => ({
          x,
          y,
          text: `${line.name} ${short(y)} at ${short(x)} thousand images`,
        })),
      })),
    });
    return drawn.node;
  });
  const columns = unique(one.scores.flatMap(Object.keys));
  return el(
    "section",
    { id: `run-${number}` },
    el("h2", {}, one.name, " ", el("span", { class: `state ${one.state}` }, one.state)),
    el("progress", { max: 1, value: one.share, "aria-label": "done" }),
    one.alarms.length
      ? el(
          "ul",
          { class: "alarms" },
          one.alarms.map((text) => el("li", {}, text)),
        )
      : null,
    el(
      "div",
      { class: "sides" },
      one.film.length
        ? film(one, number)
        : el("p", { class: "missing" }, "No sample grids yet: they are made whenever the run saves."),
      el(
        "div",
        {},
        el("pre", {}, one.status),
        el(
          "details",
          {},
          el("summary", {}, "Command, device, seed and versions"),
          el(
            "dl",
            {},
            Object.entries(one.about).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
          ),
        ),
      ),
    ),
    curves.length
      ? [el("div", { class: "plots" }, curves), hint()]
      : el("p", { class: "missing" }, "Nothing was logged yet."),
    one.merged > 1
      ? el("p", { class: "note" }, `Each point of a curve is the mean of ${one.merged} logged rows.`)
      : null,
    one.scores.length
      ? table(
          "Scores while training",
          columns.map((key) => ({ title: key, value: (row) => row[key] ?? null })),
          one.scores,
        )
      : el("p", { class: "note" }, "This run was not scored while it trained."),
  );
}

function film(one, number) {
  const frames = one.film.map((_, i) => i),
    image = el("img", { class: "large", onload: () => enlarge(image) }),
    key = `film ${number}`;
  const name = (i) => `${one.film[i].run}, update ${one.film[i].update}`;
  const show = (i) => {
    image.src = src(one.film[i].png);
    image.alt = `samples of ${name(i)}`;
    remember(key, i === frames.length - 1 ? null : i);
  };
  const control = slider("samples", name, show);
  const go = (i) => {
    control.set(frames, i);
    show(i);
  };
  let timer = null;
  const play = el(
    "button",
    {
      type: "button",
      onclick: () => {
        if (timer) return stop();
        if (Number(control.input.value) === frames.length - 1) go(0);
        play.textContent = "Pause";
        timer = setInterval(() => {
          const following = Number(control.input.value) + 1;
          if (following < frames.length) go(following);
          else stop();
        }, 400);
      },
    },
    "Play",
  );
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  go(Math.min(remembered(key, frames.length - 1), frames.length - 1));
  const part =
    one.film_count > frames.length ? ` ${frames.length} of the run's ${one.film_count} pictures are in this page.` : "";
  return el(
    "figure",
    { class: "reel" },
    image,
    el("figcaption", { class: "controls" }, control.node, frames.length > 1 ? play : null),
    el("p", { class: "note" }, `The same noises and classes all the time.${part}`),
  );
}

// --- All of it ---

const sections = [...page.comparisons.map(comparison), ...page.runs.map(run)];
document.getElementById("page").append(
  el(
    "header",
    {},
    el("h1", {}, "fastdiff report"),
    el(
      "p",
      { class: "note" },
      `${page.title}, as of ${page.written}${page.reload ? `; loads itself again every ${short(page.reload)} s` : ""}. Make this page again with `,
      el("code", {}, page.command),
    ),
    page.notes.map((note) => el("p", { class: "alarms" }, note)),
    sections.length > 1
      ? el(
          "nav",
          { "aria-label": "parts of this page" },
          sections.map((section) =>
            el("a", { href: `#${section.id}` }, section.querySelector("h2").firstChild.textContent),
          ),
        )
      : null,
  ),
  ...sections,
);

if (page.reload) {
  let touched = 0; // nobody is interrupted
  for (const name of ["pointerdown", "keydown", "input"])
    addEventListener(name, () => {
      touched = Date.now();
    });
  const again = () => (Date.now() - touched < 5000 ? setTimeout(again, 5000) : location.reload());
  setTimeout(again, 1000 * page.reload);
}
