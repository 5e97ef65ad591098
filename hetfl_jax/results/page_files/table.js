// The table of points: columns, order, filters, and its LaTeX.

const state = {
  level: Object.keys(DATA.levels)[0], metric: Object.keys(DATA.metrics)[0], each: false, filters: {}, text: "", column: null,
  down: false, one: 0,
};

/** Points that the filters leave. */
function shownPoints() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  return DATA.points.filter((point) => {
    if (!Object.entries(state.filters).every(([key, text]) => valueText(valueOf(point, key)) === text)) return false;
    const all = [point.name, point.status, ...DATA.keys.map((k) => `${k}=${valueText(valueOf(point, k))}`)].join(" ");
    return words.every((word) => all.toLowerCase().includes(word));
  });
}

const levelsShown = () =>
  !hasLevels(state.metric) ? [""] : state.level === ALL ? Object.keys(DATA.levels) : [state.level];

const severalSeeds = () => cells(DATA.points).some((cell) => cell.points.length > 1);

/** A column: name, how a row's value is found among its points, how it is written. */
function column(name, of, write, also = {}) {
  return { name, of: (points) => stats(counted(points).map(of)), write: (v) => spreadText(v, write), sort: (v) => (v ? v.mean : null), ...also };
}

function scoreColumns() {
  const share = DATA.metrics[state.metric], write = (v) => written(v, share), name = spaced(state.metric);
  const columns = levelsShown().map((level) =>
    column(`${name}${level ? ` ${level}` : ""}, last`, (p) => lastOf(p, state.metric, level), write));
  if (state.metric === DATA.score && state.level !== ALL) {
    columns.push(column("best round's", (p) => (p.rows[state.level] || {}).best, write));
  }
  if (state.level !== ALL && hasLevels(state.metric)) {
    columns.push(column("parameters", (p) => (p.rows[state.level] || {}).parameters, (v) => Math.round(v).toLocaleString("en")));
  }
  return columns;
}

function columns() {
  const keys = (state.each ? DATA.keys : AXES).map((key) => ({
    name: shortKey(key), title: key, of: (points) => valueOf(points[0], key), write: valueText, sort: (v) => v,
    text: DATA.points.some((p) => typeof valueOf(p, key) === "string"),
  }));
  const name = { name: "point", text: true, link: true, of: (points) => points[0], write: (p) => p.name, sort: (p) => p.name };
  const seeds = { name: "seeds", of: (points) => points.filter((p) => p.status === "done").length, write: String, sort: (v) => v };
  const problem = {
    name: "status", text: true, wide: true, sort: (v) => v, write: (v) => v,
    of: (points) => [...new Set(points.map((p) => (p.error ? `${p.status}: ${p.error}` : p.status)))].join(", "),
  };
  return [
    ...(state.each ? [name] : []), ...keys, ...(state.each ? [] : [seeds]), ...scoreColumns(),
    column("MB sent", (p) => p.sent, megabytes), column("GMACs", (p) => p.work, giga),
    column("seconds", (p) => p.seconds, (v) => v.toFixed(1)), problem,
  ];
}

/** Rows of the table in its order: their points, and a value a column. */
function rows() {
  const shown = shownPoints(), groups = state.each ? shown.map((p) => ({ points: [p] })) : cells(shown), all = columns();
  const found = groups.map((group) => ({ points: group.points, values: all.map((c) => c.of(group.points)) }));
  const at = all.findIndex((c) => c.name === state.column);
  if (at < 0) return found;
  const key = (row) => all[at].sort(row.values[at]);
  return found.sort((a, b) => (state.down ? -1 : 1) * compare(key(a), key(b), state.down));
}

/** Numbers by size, texts by letters, what is missing at the end in either direction. */
function compare(a, b, down) {
  const missing = (v) => v === null || v === undefined;
  if (missing(a) || missing(b)) return (missing(a) - missing(b)) * (down ? -1 : 1);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function headCell(c) {
  const chosen = state.column === c.name;
  const sort = () => {
    state.down = chosen ? !state.down : false;
    state.column = c.name;
    drawTable();
    [...document.querySelectorAll("#points thead button")].find((b) => b.textContent === c.name).focus();
  };
  return make("th", { scope: "col", class: c.text && "text", title: c.title, "aria-sort": chosen ? (state.down ? "descending" : "ascending") : "none" },
    make("button", { type: "button", onclick: sort }, c.name));
}

function bodyCell(c, value, first) {
  const text = c.write(value), sorted = c.sort(value);
  const inside = c.link ? make("a", { href: value.link }, text) : text;
  const attributes = { class: [c.text && "text", c.wide && "wide"].filter(Boolean).join(" ") || null, "data-value": typeof sorted === "number" ? sorted : null };
  return first ? make("th", { scope: "row", ...attributes }, inside) : make("td", attributes, inside);
}

function drawTable() {
  const all = columns(), found = rows();
  const told = `${state.each ? "Every point" : "Mean \u00b1 deviation over seeds"}: ${spaced(state.metric)}` +
    (hasLevels(state.metric) ? (state.level === ALL ? " of every level" : ` of level ${levelText(state.level)}`) : "");
  const body = found.map((row) => make("tr", { class: row.points.every((p) => p.status === "failed") && "failed" },
    ...all.map((c, n) => bodyCell(c, row.values[n], n === 0))));
  fill("points", caption(told), make("thead", {}, make("tr", {}, ...all.map(headCell))), make("tbody", {}, ...body));
  const count = shownPoints().length;
  fill("count", `${found.length} ${found.length === 1 ? "row" : "rows"}, ${count} of ${DATA.points.length} points`);
  document.getElementById("latex").value = latex(all, found);
}

const escaped = (text) => String(text).replace(/[\\{}%&#_$^~]/g, (c) => ({ "\\": "\\textbackslash{}", "^": "\\^{}", "~": "\\~{}" })[c] || `\\${c}`)
  .replaceAll("\u00b1", "$\\pm$");

/** The table as it stands, for booktabs. */
function latex(all, found) {
  const kept = all.map((c, n) => n).filter((n) => !all[n].wide);
  const line = (texts) => `${texts.map(escaped).join(" & ")} \\\\`;
  return [
    `\\begin{tabular}{${kept.map((n) => (all[n].text ? "l" : "r")).join("")}}`, "\\toprule", line(kept.map((n) => all[n].name)), "\\midrule",
    ...found.map((row) => line(kept.map((n) => all[n].write(row.values[n])))), "\\bottomrule", "\\end{tabular}",
  ].join("\n");
}

/** Put the LaTeX on the clipboard; where the browser forbids it, select it. */
async function copyLatex() {
  const area = document.getElementById("latex");
  let told = "copied";
  try {
    await navigator.clipboard.writeText(area.value);
  } catch {
    area.closest("details").open = true;
    area.select();
    if (!document.execCommand("copy")) told = "selected: copy it with the keyboard";
  }
  fill("copied", told);
}
