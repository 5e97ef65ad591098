// What the page shows, put together; everything is drawn anew when a control changes.

const COST_NAMES = { bytes: "MB sent, down and up", macs: "GMACs of all clients", simulated_seconds: "simulated hours" };
const COST_UNITS = { bytes: 1e6, macs: 1e9, simulated_seconds: 3600 };

/** Lines of the figures: one a cell, and one a level where all levels are shown. */
function wantedLines(groups) {
  const axes = varying(groups.flatMap((g) => g.points));
  const levels = levelsShown();
  return groups.flatMap((cell) => levels.map((level) => {
    const name = levels.length > 1 ? (groups.length > 1 ? `${cellName(cell, axes)}, ${levelText(level)}` : levelText(level)) : cellName(cell, axes);
    return { cell, level, name };
  })).map((line, style) => ({ ...line, style }));
}

function halfWidth(id) {
  const whole = document.getElementById(id).clientWidth || 640;
  return whole > 984 ? (whole - 24) / 2 : whole;
}

function drawCurves(groups) {
  const every = wantedLines(groups), wanted = every.slice(0, MOST_LINES), share = DATA.metrics[state.metric], name = spaced(state.metric);
  const costs = [...new Set(DATA.points.flatMap((p) => Object.keys(p.x)))];
  const figures = ["rounds", ...costs].map((along) => {
    const unit = COST_UNITS[along] || 1, label = along === "rounds" ? "round" : COST_NAMES[along] || spaced(along);
    const lines = wanted.map((w) => ({ ...w, ...(meanLine(w.cell, state.metric, w.level, along) || { x: [], y: [], low: [], high: [] }) }))
      .map((l) => ({ ...l, x: l.x.map((v) => (v === null ? null : v / unit)) })).filter((l) => l.x.length && l.x.some((v) => v !== null));
    return lineFigure(`curve-${along}`, lines, { width: halfWidth("curves"), share, title: `${name} over ${along === "rounds" ? "rounds" : label}`, xLabel: label, yWrite: (v) => written(v, share) });
  });
  fill("curves", ...figures.filter(Boolean));
  fill("legend", ...wanted.map((w) => legendItem(w.name, w.style)));
  const band = severalSeeds() ? "Lines are means over seeds, bands one sample deviation to either side." : "";
  const cut = every.length > wanted.length ? ` ${wanted.length} of ${every.length} lines are drawn: filter to see others.` : "";
  fill("band", band + cut);
}

function drawHeat(groups) {
  const axes = varying(groups.flatMap((g) => g.points));
  document.getElementById("heat-section").hidden = AXES.length < 2;
  fill("heat", axes.length === 2 ? heatTable(groups, axes) :
    make("p", { class: "quiet" }, `${axes.length} keys vary among the points shown: filter until two remain.`));
}

/** Where a point first reaches the target: its round and what that cost; null where it never does. */
function reached(point, level, target) {
  const values = seriesOf(point, DATA.score, level), at = values.findIndex((v) => v !== null && v !== undefined && (DATA.least ? v <= target : v >= target));
  if (at < 0) return null;
  return { round: pooled(point.rounds)[at], ...Object.fromEntries(Object.entries(point.x).map(([name, n]) => [name, pooled(n)[at]])) };
}

function drawCosts(groups) {
  const share = DATA.metrics[DATA.score], typed = Number(document.getElementById("target").value), target = share ? typed / 100 : typed;
  const names = [...new Set(DATA.points.flatMap((p) => Object.keys(p.x)))], axes = varying(groups.flatMap((g) => g.points));
  const levels = state.level === ALL ? Object.keys(DATA.levels) : [state.level];
  const titles = { bytes: "MB sent", macs: "GMACs" };
  const head = ["points", ...(levels.length > 1 ? ["level"] : []), "reached by", "round", ...names.map((n) => titles[n] || spaced(n))];
  const body = groups.flatMap((cell) => levels.map((level) => {
    const all = counted(cell.points).filter((p) => pooled(p.rounds).length), found = all.map((p) => reached(p, level, target)).filter(Boolean);
    const number = (name, write) => make("td", { "data-value": found.length ? mean(found.map((f) => f[name])) : null }, found.length ? write(mean(found.map((f) => f[name]))) : "-");
    return make("tr", {}, make("th", { scope: "row" }, cellName(cell, axes)), levels.length > 1 ? make("td", {}, levelText(level)) : null,
      make("td", {}, `${found.length} of ${all.length}`), number("round", plainNumber),
      ...names.map((n) => number(n, n === "bytes" ? megabytes : n === "macs" ? giga : plainNumber)));
  }));
  const told = `First evaluated round with ${spaced(DATA.score)} ${DATA.least ? "at most" : "at least"} ${share ? `${typed}%` : typed}` +
    `${levels.length > 1 ? "" : ` of level ${levelText(state.level)}`}; means over the seeds that reached it`;
  fill("costs", caption(told), make("thead", {}, make("tr", {}, ...head.map((h, n) => make("th", { scope: "col", class: n ? null : "text" }, h)))), make("tbody", {}, ...body));
}

function drawClients(groups) {
  const axes = varying(groups.flatMap((g) => g.points)), share = DATA.metrics[DATA.score], told = groups.filter((g) => g.points.some((p) => p.clients.length));
  document.getElementById("clients-section").hidden = !told.length;
  if (!told.length) return;
  const write = (v) => written(v, share), first = Object.keys(DATA.levels)[0];
  const lines = told.slice(0, MOST_LINES).map((cell, style) => {
    const each = counted(cell.points).filter((p) => p.clients.length).map((p) => pooled(p.clients[p.clients.length - 1].values)), found = each[0].map((_, n) => stats(each.map((q) => q[n])));
    const edge = (sign) => found.map((s) => (s && s.deviation !== null ? s.mean + sign * s.deviation : null));
    return { name: cellName(cell, axes), style: groups.indexOf(cell), x: found.map((_, n) => n / (found.length - 1)), y: found.map((s) => s && s.mean), low: edge(-1), high: edge(1) };
  });
  const figure = lineFigure("clients-figure", lines, {
    width: halfWidth("clients"), share, title: `${spaced(DATA.score)} on each client's own test data, level ${levelText(first)}, last round`,
    xLabel: "clients, from the worst to the best", xText: (t) => `${Math.round(100 * t)}%`, yWrite: write,
  });
  const shades = make("ul", { class: "legend" }, ...lines.map((l) => legendItem(l.name, l.style)));
  fill("clients", make("div", {}, figure, lines.length > 1 ? shades : null));
  const names = { mean: "mean", deviation: "deviation over clients", worst_tenth: "worst tenth", best_tenth: "best tenth" };
  fill("spread", caption("Of the last evaluated round"),
    make("thead", {}, make("tr", {}, make("th", { scope: "col", class: "text" }, "points"), ...Object.values(names).map((n) => make("th", { scope: "col" }, n)))),
    make("tbody", {}, ...told.map((cell) => make("tr", {}, make("th", { scope: "row" }, cellName(cell, axes)), ...Object.keys(names).map((n) => {
      const found = stats(counted(cell.points).map((p) => p.spread[n]));
      return make("td", { "data-value": found && found.mean }, spreadText(found, write));
    })))));
}

function drawOne() {
  const point = DATA.points[state.one], width = halfWidth("detail");
  const facts = [point.status, point.error, point.seconds === null ? null : `${point.seconds.toFixed(1)} s`, ...DATA.keys.map((k) => `${k} = ${valueText(valueOf(point, k))}`)];
  const lists = Object.entries(point.lists).map(([name, list]) => stackFigure(name, list, width));
  const held = point.partition === null ? null : partitionFigure(DATA.partitions[point.partition], width);
  fill("detail", make("p", {}, make("a", { href: point.link }, "folder"), ` \u00b7 ${facts.filter(Boolean).join(" \u00b7 ")}`), make("div", { class: "figures" }, ...lists, held));
}

function drawAll() {
  const groups = cells(shownPoints());
  for (const button of document.querySelectorAll("[data-level]")) {
    button.setAttribute("aria-pressed", String(button.dataset.level === state.level));
    button.disabled = !hasLevels(state.metric);
  }
  drawTable();
  drawCurves(groups);
  drawHeat(groups);
  drawCosts(groups);
  drawClients(groups);
  drawOne();
}

const option = (text, value, chosen) => make("option", { value, selected: chosen }, text);

/** A labelled select. */
function select(label, id, options, change) {
  return make("span", { class: "choice" }, make("label", { for: id }, label), make("select", { id, onchange: (e) => { change(e.target.value); drawAll(); } }, ...options));
}

function buildControls() {
  const levels = Object.keys(DATA.levels), names = Object.keys(DATA.metrics);
  const button = (level, text) => make("button", { type: "button", "data-level": level, onclick: () => { state.level = level; drawAll(); } }, text);
  if (levels.length > 1 && cells(DATA.points).length === 1) state.level = ALL;
  const choice = levels.length > 1 ? make("div", { class: "choice", role: "group", "aria-label": "Level" }, make("span", { "aria-hidden": "true" }, "Level"),
    button(ALL, "all"), ...levels.map((level) => button(level, levelText(level)))) : null;
  fill("controls", ...[choice, select("Metric", "metric", names.map((n) => option(spaced(n), n, n === state.metric)), (v) => { state.metric = v; })].filter(Boolean));
  const filters = DATA.keys.map((key, n) => {
    const found = valuesOf(DATA.points, key);
    if (found.length < 2) return null;
    return select(shortKey(key), `filter-${n}`, [option("all", "", true), ...found.map((v) => option(valueText(v), valueText(v)))], (v) => {
      if (v === "") delete state.filters[key];
      else state.filters[key] = v;
    });
  });
  const search = make("span", { class: "choice" }, make("label", { for: "search" }, "Search"),
    make("input", { id: "search", type: "search", oninput: (e) => { state.text = e.target.value; drawAll(); } }));
  const each = severalSeeds() ? make("button", { type: "button", id: "each", "aria-pressed": "false", onclick: (e) => {
    state.each = !state.each;
    e.currentTarget.setAttribute("aria-pressed", String(state.each));
    drawAll();
  } }, "every seed") : null;
  if (!severalSeeds()) state.each = true;
  const several = DATA.points.length > 1;
  fill("filters", ...[each, ...(several ? [...filters, search] : [])].filter(Boolean));
}

function begin() {
  const share = DATA.metrics[DATA.score], target = document.getElementById("target");
  const bad = DATA.points.filter((p) => p.status !== "done");
  fill("summary", `${DATA.points.length} ${DATA.points.length === 1 ? "run" : "points"}${AXES.length ? ` over ${AXES.map(shortKey).join(", ")}` : ""}` +
    (severalSeeds() ? `, up to ${Math.max(...cells(DATA.points).map((c) => c.points.length))} seeds each` : ""));
  const notes = [bad.length ? `${bad.length} of ${DATA.points.length} points are not done.` : "", DATA.fewer ? `At most ${DATA.fewer} evaluated rounds of a point are on this page; the folders have all.` : ""];
  document.getElementById("note").hidden = !notes.some(Boolean);
  fill("note", notes.filter(Boolean).join(" "));
  fill("target-label", `Target ${spaced(DATA.score)}${share ? ", in percent" : ""}`);
  const best = present(DATA.points.flatMap((p) => Object.keys(DATA.levels).map((level) => lastOf(p, DATA.score, level))));
  const middle = best.length ? best.sort((a, b) => a - b)[Math.floor(best.length / 2)] : 0;
  target.value = share ? Math.floor(100 * middle) : Number(middle.toPrecision(2));
  target.addEventListener("input", () => drawCosts(cells(shownPoints())));
  state.one = Math.max(0, DATA.points.findIndex((p) => p.status === "done"));
  fill("one", ...DATA.points.map((p, n) => option(p.name, n, n === state.one)));
  document.getElementById("one").addEventListener("change", (e) => { state.one = Number(e.target.value); drawOne(); });
  document.getElementById("copy").addEventListener("click", copyLatex);
  buildControls();
  drawAll();
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
}

begin();
