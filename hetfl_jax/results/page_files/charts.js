// Figures: lines with bands, stacks, and maps of cells.

const MARGIN = { left: 52, right: 20, top: 10, bottom: 40 };

/** Round steps between two values, about as many as asked. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) out.push(Number((k * step).toPrecision(12)));
  return out;
}

/** Scales, axes and grid of a figure of a given width. */
function frame(width, height, xs, ys, options) {
  const inside = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
  const [x0, x1] = xs[0] === xs[1] ? [xs[0] - 1, xs[1] + 1] : xs, [y0, y1] = ys[0] === ys[1] ? [ys[0] - 0.5, ys[1] + 0.5] : ys;
  const x = (v) => MARGIN.left + ((v - x0) / (x1 - x0)) * inside.w, y = (v) => MARGIN.top + (1 - (v - y0) / (y1 - y0)) * inside.h;
  const parts = [];
  for (const t of ticks(y0, y1, 5)) {
    parts.push(make("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(t), y2: y(t) }));
    parts.push(make("text", { x: MARGIN.left - 6, y: y(t) + 4, "text-anchor": "end" }, options.yText(t)));
  }
  for (const t of ticks(x0, x1, Math.max(3, Math.floor(inside.w / 80)))) {
    parts.push(make("line", { class: "axis", x1: x(t), x2: x(t), y1: height - MARGIN.bottom, y2: height - MARGIN.bottom + 4 }));
    parts.push(make("text", { x: x(t), y: height - MARGIN.bottom + 17, "text-anchor": "middle" }, options.xText(t)));
  }
  parts.push(make("path", { class: "axis", d: `M${MARGIN.left},${MARGIN.top}V${height - MARGIN.bottom}H${width - MARGIN.right}` }));
  parts.push(make("text", { x: MARGIN.left + inside.w / 2, y: height - 6, "text-anchor": "middle" }, options.xLabel));
  return { x, y, parts };
}

const color = (n) => `var(--c${n % COLORS})`;
const dash = (n) => DASHES[Math.floor(n / COLORS) % DASHES.length] || null;

/** Text of an axis: 1,000,000 as 1e6, short. */
const tickText = (v) => (Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(0).replace("+", "") : String(v));

/** The path through points, interrupted where one is missing. */
function pathOf(xs, ys, x, y) {
  let out = "", open = false;
  xs.forEach((v, n) => {
    if (ys[n] === null || ys[n] === undefined) { open = false; return; }
    out += `${open ? "L" : "M"}${x(v).toFixed(1)},${y(ys[n]).toFixed(1)}`;
    open = true;
  });
  return out;
}

function bandOf(line, x, y) {
  const there = line.x.map((v, n) => n).filter((n) => line.low[n] !== null);
  if (!there.length) return null;
  const up = there.map((n) => `${x(line.x[n]).toFixed(1)},${y(line.high[n]).toFixed(1)}`);
  const back = there.reverse().map((n) => `${x(line.x[n]).toFixed(1)},${y(line.low[n]).toFixed(1)}`);
  return `M${up.join("L")}L${back.join("L")}Z`;
}

/** A figure of lines {name, x, y, low, high, style}, with a text for those who do not see it. */
function lineFigure(id, lines, options) {
  const width = Math.max(280, Math.floor(options.width)), height = Math.round(Math.min(300, 90 + width * 0.42));
  const xs = present(lines.flatMap((l) => l.x)), ys = present(lines.flatMap((l) => [...l.y, ...l.low, ...l.high]));
  if (!ys.length) return null;
  const top = options.share ? Math.min(1, 0.1 * Math.floor(Math.max(...ys) / 0.1 + 1)) : Math.max(...ys);
  const low = options.share || Math.min(...ys) > 0 && Math.min(...ys) < 0.5 * Math.max(...ys) ? Math.min(0, ...ys) : Math.min(...ys);
  const f = frame(width, height, [Math.min(...xs), Math.max(...xs)], [low, top], {
    xLabel: options.xLabel, xText: options.xText || tickText, yText: options.share ? (t) => `${Number((100 * t).toPrecision(6))}%` : tickText,
  });
  const drawn = lines.map((l) => {
    const band = bandOf(l, f.x, f.y), few = l.x.length <= 30;
    return make("g", { "data-name": l.name }, band && make("path", { d: band, fill: color(l.style), "fill-opacity": 0.15, stroke: "none" }),
      make("path", { d: pathOf(l.x, l.y, f.x, f.y), fill: "none", stroke: color(l.style), "stroke-width": 1.8, "stroke-dasharray": dash(l.style) }),
      ...(few ? l.x.map((v, n) => (l.y[n] === null || l.y[n] === undefined ? null : make("circle", { cx: f.x(v).toFixed(1), cy: f.y(l.y[n]).toFixed(1), r: 2.4, fill: color(l.style) },
        make("title", {}, `${l.name}: ${options.yWrite(l.y[n])} at ${options.xLabel} ${plainNumber(v)}`)))) : []));
  });
  const ends = lines.slice(0, 8).map((l) => `${l.name} ends at ${options.yWrite(present(l.y).slice(-1)[0])}`).join("; ");
  const more = lines.length > 8 ? `; and ${lines.length - 8} more lines` : "";
  return make("figure", {}, make("h3", { id: `${id}-name` }, options.title),
    make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${id}-title ${id}-desc` },
      make("title", { id: `${id}-title` }, options.title), make("desc", { id: `${id}-desc` }, `${ends}${more}.`), ...f.parts, ...drawn));
}

function legendItem(name, style) {
  return make("li", {}, make("svg", { width: 28, height: 10, "aria-hidden": "true" },
    make("line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke: color(style), "stroke-width": 3, "stroke-dasharray": dash(style) })), name);
}

/** Mean and band of a metric over what `along` gives, of the points of a cell, at the rounds that all of them have. */
function meanLine(cell, metric, level, along) {
  const there = counted(cell.points).filter((p) => pooled(p.rounds).length);
  if (!there.length) return null;
  const places = there.map((p) => new Map(pooled(p.rounds).map((round, n) => [round, n])));
  const rounds = pooled(there[0].rounds).filter((round) => places.every((at) => at.has(round)));
  const columns = there.map((p) => ({ x: along === "rounds" ? pooled(p.rounds) : pooled(p.x[along]), y: seriesOf(p, metric, level) }));
  const at = (round, of) => columns.map((c, n) => c[of][places[n].get(round)]);
  const found = rounds.map((round) => stats(at(round, "y")));
  const edge = (sign) => found.map((s) => (s && s.deviation !== null ? s.mean + sign * s.deviation : null));
  const xs = rounds.map((round) => stats(at(round, "x")));
  return { rounds, x: xs.map((s) => (s ? s.mean : null)), y: found.map((s) => (s ? s.mean : null)), low: edge(-1), high: edge(1) };
}

/** How a share of `most` is coloured: from the paper to blue, and what is read on it. */
const shade = (part) => `color-mix(in srgb, var(--c0) ${Math.round(100 * Math.max(0, Math.min(1, part)))}%, var(--paper))`;

/** A heat map as a table, whose cells hold their numbers. */
function heatTable(groups, axes) {
  const [down, across] = axes, points = groups.flatMap((g) => g.points);
  const rows = valuesOf(points, down), cols = valuesOf(points, across), level = levelsShown()[0], share = DATA.metrics[state.metric];
  const found = rows.map((r) => cols.map((c) => stats(counted(points.filter((p) =>
    valueText(valueOf(p, down)) === valueText(r) && valueText(valueOf(p, across)) === valueText(c))).map((p) => lastOf(p, state.metric, level)))));
  const means = found.flat().filter(Boolean).map((s) => s.mean), low = Math.min(...means), high = Math.max(...means);
  const cell = (s) => {
    const part = s ? (s.mean - low) / (high - low || 1) : 0;
    const style = s ? `background:${shade(0.1 + 0.65 * part)}` : null;  // beyond, ink has less than 5 : 1 against it
    return make("td", { style, "data-value": s && s.mean }, spreadText(s, (v) => written(v, share)));
  };
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Heat map" }, make("table", { class: "heat" },
    caption(`${spaced(state.metric)}${level ? ` of level ${levelText(level)}` : ""} after the last round; rows: ${down}, columns: ${across}; darker blue is more`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, shortKey(down)), ...cols.map((c) => make("th", { scope: "col" }, valueText(c))))),
    make("tbody", {}, ...rows.map((r, n) => make("tr", {}, make("th", { scope: "row" }, valueText(r)), ...found[n].map(cell))))));
}

/** Lists of numbers over rounds, one upon the other. */
function stackFigure(name, list, width) {
  const rounds = pooled(list.rounds), rows = list.rows.map(pooled), height = 240, w = Math.max(280, Math.floor(width));
  const title = `${spaced(name)} over rounds`, sums = rounds.map((_, n) => rows.reduce((a, r) => a + r[n], 0));
  const f = frame(w, height, [Math.min(...rounds), Math.max(...rounds)], [0, Math.max(...sums) || 1], { xLabel: "round", xText: tickText, yText: tickText });
  let below = rounds.map(() => 0);
  const areas = rows.map((row, k) => {
    const above = below.map((v, n) => v + row[n]);
    const line = { x: rounds.length > 1 ? rounds : [rounds[0] - 0.5, rounds[0] + 0.5] };
    line.low = rounds.length > 1 ? below : [below[0], below[0]];
    line.high = rounds.length > 1 ? above : [above[0], above[0]];
    below = above;
    return make("path", { d: bandOf(line, f.x, f.y), fill: color(k), "fill-opacity": 0.8, stroke: "var(--paper)", "stroke-width": 1 }, make("title", {}, `number ${k}`));
  });
  const ends = rows.map((row, k) => `number ${k}: ${plainNumber(row[row.length - 1])}`).join(", ");
  return make("figure", {}, make("h3", {}, title), make("ul", { class: "legend" }, ...rows.map((_, k) => legendItem(`number ${k}`, k % COLORS))),
    make("svg", { viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": `${title}; in the last round ${ends}` }, ...areas, ...f.parts));
}

/** Examples of every class that every client holds. */
function partitionFigure(held, width) {
  const w = Math.max(280, Math.floor(width)), many = held.clients.length, classes = held.classes.length;
  const left = 34, cw = (w - left - 4) / many, ch = Math.max(4, Math.min(16, 220 / classes)), height = Math.ceil(classes * ch + 40);
  const most = Math.max(1, ...held.counts.flat()), boxes = [];
  held.counts.forEach((row, i) => row.forEach((count, j) => count && boxes.push(make("rect", {
    x: (left + i * cw).toFixed(2), y: (4 + j * ch).toFixed(2), width: (cw + 0.05).toFixed(2), height: (ch + 0.05).toFixed(2), fill: "var(--c0)", "fill-opacity": (0.12 + 0.88 * count / most).toFixed(2),
  }))));
  const text = (x, y, t, anchor) => make("text", { x, y, "text-anchor": anchor }, t), base = 4 + classes * ch;
  const some = [...new Set([0, Math.floor((classes - 1) / 2), classes - 1])];
  const labels = some.map((j) => text(left - 5, 4 + j * ch + ch / 2 + 4, held.classes[j], "end"));
  const cut = many < held.all[0] ? ` (${many} of ${held.all[0]} clients drawn)` : "", less = classes < held.all[1] ? ` (the ${classes} most common of ${held.all[1]} classes)` : "";
  return make("figure", {}, make("h3", {}, "Examples by client and class"),
    make("svg", { viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": `Examples of each class that each client holds; ${held.text}; at most ${most} of one class` },
      ...boxes, ...labels, text(left, base + 15, held.clients[0], "start"), text(w - 4, base + 15, held.clients[many - 1], "end"),
      text(w / 2, base + 30, "client"), make("path", { class: "axis", d: `M${left},4V${base}H${w - 4}` })),
    make("figcaption", {}, `${held.text}${cut}${less}; rows: classes; the darkest: ${most} examples`));
}
